"""One pretrained model under comparison: its replaced modules in groups, then the model as a whole."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch
from torch import Tensor

from ..replace import replace
from .measure import Side, Subject, catch_inputs, cosine_distance, interleave, kernels, relative_error
from .models import Model
from .result import Cosine, Left, Row, Settings, title

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
Progress = Callable[[str, float], None]  # (what is being done, how much of everything is done: 0..1)


def part(progress: Progress, start: float, end: float) -> Progress:
    """A progress whose 0..1 is start..end of another's."""
    return lambda stage, done: progress(stage, start + (end - start) * min(done, 1.0))


class Runner:
    """Measures one model; `seconds` is for all of its rows. model.module has torch's modules again afterwards."""

    def __init__(self, model: Model, settings: Settings, seconds: float, progress: Progress) -> None:
        self.model, self.settings, self.progress = model, settings, progress
        self.inputs = model.inputs(settings.batch)
        self.module = model.module.to(DTYPES[settings.dtype])
        progress("catching the modules' inputs", 0.0)
        self.report = replace(self.module)
        self.report.undo()
        self.left = [Left(row.name, row.type, row.why) for row in self.report.left]
        groups = self._groups()
        self.titles = [title(name, len(subjects)) for name, subjects in groups.items()]
        self.groups = {name: chosen for name, group in groups.items() if (chosen := self._chosen(name, group))}
        # Two rows a group; the whole model gets as much time as all of them, because a round of it takes longest.
        self.whole = settings.module is None
        self.parts = 2 * len(self.groups) * (1 + self.whole)
        self.parts_done = 0
        self.seconds_per_part = seconds / max(1, self.parts)

    def rows(self) -> list[Row]:
        found = []
        for name, subjects in self.groups.items():
            found += [self._module_row(name, subjects, backward) for backward in (False, True)]
        if self.whole:
            found.append(self._model_row())
        return found

    # ---- modules ----

    def _groups(self) -> dict[str, list[Subject]]:
        """Modules of one kind, on inputs of one shape, whose names differ in numbers only."""
        caught = catch_inputs(self.report.replaced, self._result)
        groups: dict[tuple[str, str, tuple[int, ...]], list[Subject]] = {}
        for row in self.report.replaced:
            if row.name not in caught:
                self.left.append(Left(row.name, row.before.__name__, "replaced, but this input does not reach it"))
                continue
            subject = Subject.of(row, *caught[row.name])
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name)
            groups.setdefault((pattern, subject.kind, tuple(subject.shape)), []).append(subject)
        patterns = [pattern for pattern, _, _ in groups]
        # A pattern that is ambiguous (other kinds or shapes under it) gives way to the name of the first module.
        return {
            pattern if len(group) > 1 and patterns.count(pattern) == 1 else group[0].name: group
            for (pattern, _, _), group in groups.items()
        }

    def _chosen(self, name: str, group: list[Subject]) -> list[Subject]:
        wanted = self.settings.module
        return [subject for subject in group if wanted is None or wanted in subject.name or wanted in name]

    def _module_row(self, name: str, subjects: list[Subject], backward: bool) -> Row:
        direction = "forward+backward" if backward else "forward"
        progress = self._begin(f"{title(name, len(subjects))}, {direction}", 1)
        errors = [subject.errors(backward) for subject in subjects]
        theirs, ours = (Side(_pass(subjects, side, backward)) for side in ("theirs", "ours"))
        timing = interleave(theirs, ours, self.seconds_per_part, self.settings.rounds, progress)
        return Row(
            model=self.model.name,
            name=name,
            modules=[subject.name for subject in subjects],
            kind=subjects[0].kind,
            shape=subjects[0].shape,
            direction=direction,
            error_torch=max(error for error, _ in errors),
            error_handtuned=max(error for _, error in errors),
            seconds_torch=timing.theirs / len(subjects),
            seconds_handtuned=timing.ours / len(subjects),
            ratio=timing.ratio,
            ratios=timing.ratios,
            kernels=kernels(ours.run),
        )

    def _begin(self, stage: str, parts: int) -> Callable[[float], None]:
        """Announces a row that takes `parts` of self.parts; the row then reports its own 0..1."""
        start = self.parts_done / self.parts
        self.parts_done += parts
        within = part(self.progress, start, self.parts_done / self.parts)
        within(stage, 0.0)
        return lambda done: within(stage, done)

    # ---- the whole model ----

    def _result(self) -> Tensor:
        with torch.no_grad():
            return self.model.result(self.module, self.inputs)

    def _model_row(self) -> Row:
        parts = self.parts - self.parts_done
        progress = self._begin(f"whole model, {self.model.name}", parts)
        with torch.no_grad():
            exact = self.model.result(copy.deepcopy(self.module).double(), self.inputs)
        theirs = self._result()
        self.report.redo()
        ours = self._result()
        served = kernels(self._result)
        sides = Side(self._result, self.report.undo), Side(self._result, self.report.redo)
        timing = interleave(*sides, self.seconds_per_part * parts, self.settings.rounds, progress)
        self.report.undo()
        return Row(
            model=self.model.name,
            name="whole model",
            modules=[],
            kind=type(self.module).__name__,
            shape=list(next(iter(self.inputs.values())).shape),
            direction="forward",
            error_torch=relative_error([theirs], [exact]),
            error_handtuned=relative_error([ours], [exact]),
            seconds_torch=timing.theirs,
            seconds_handtuned=timing.ours,
            ratio=timing.ratio,
            ratios=timing.ratios,
            kernels=served,
            cosine=Cosine(
                between_sides=cosine_distance(theirs, ours),
                torch=cosine_distance(theirs, exact),
                handtuned=cosine_distance(ours, exact),
            ),
        )


def _pass(subjects: list[Subject], side: str, backward: bool) -> Callable[[], None]:
    """One call of every module of a group: what is timed."""
    modules = [(subject, getattr(subject, side)) for subject in subjects]

    def forward() -> None:
        with torch.no_grad():
            for subject, module in modules:
                module(*subject.args, **subject.kwargs)

    def training() -> None:
        for subject, module in modules:
            subject.gradients(module)

    return training if backward else forward
