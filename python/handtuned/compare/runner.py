"""One pretrained model under comparison: its replaced modules in groups, then the model as a whole."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..integrations import transformers as integration
from ..replace import Report, replace
from .attention import Attention
from .measure import (
    Side,
    Subject,
    catch_inputs,
    cosine_distance,
    interleave,
    kernels,
    map_floats,
    relative_error,
)
from .models import Model
from .result import Cosine, Left, Row, Settings, title

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
Progress = Callable[[str, float], None]  # (what is being done, how much of everything is done: 0..1)


def part(progress: Progress, start: float, end: float) -> Progress:
    """A progress whose 0..1 is start..end of another's."""
    return lambda stage, done: progress(stage, start + (end - start) * min(done, 1.0))


@dataclass(frozen=True)
class Step:
    """A row to come. weight: its share of the time, against one row of a group of modules."""

    stage: str
    weight: int
    measure: Callable[[Callable[[float], None], float], Row]  # (progress of this row, seconds for its timing)


class Runner:
    """Measures one model; `seconds` is for all of its rows. model.module has torch's modules again afterwards."""

    def __init__(self, model: Model, settings: Settings, seconds: float, progress: Progress) -> None:
        self.model, self.settings, self.seconds, self.progress = model, settings, seconds, progress
        dtype = DTYPES[settings.dtype]
        batches = {*model.batches, settings.batch}
        self.inputs = {batch: map_floats(lambda t: t.to(dtype), model.inputs(batch)) for batch in batches}
        self.module = model.module.to(dtype)
        progress("catching the modules' inputs", 0.0)
        of_transformers = hasattr(self.module, "set_attn_implementation")
        self.report: Report = integration.replace(self.module) if of_transformers else replace(self.module)
        self.report.undo()
        self.attention = Attention(self.module) if of_transformers else None
        self.left = [Left(row.name, row.type, row.why) for row in self.report.left]
        groups = self._groups() | self._attention_groups()
        self.titles = [title(name, len(subjects)) for name, subjects in groups.items()]
        self.groups = {name: chosen for name, group in groups.items() if (chosen := self._chosen(name, group))}

    def rows(self) -> list[Row]:
        steps = self._steps()
        total, done, found = sum(step.weight for step in steps), 0, []
        for step in steps:
            within = part(self.progress, done / total, (done := done + step.weight) / total)
            within(step.stage, 0.0)
            found.append(step.measure(partial(within, step.stage), self.seconds * step.weight / total))
        return found

    def _steps(self) -> list[Step]:
        steps = []
        for name, subjects in self.groups.items():
            for backward, direction in ((False, "forward"), (True, "forward+backward")):
                stage = f"{title(name, len(subjects))}, {direction}"
                steps.append(Step(stage, 1, partial(self._module_row, name, subjects, backward)))
        if self.settings.module is None:  # a round of the whole model takes long, so it gets more time
            for batch in sorted(self.inputs):
                name = f"{self.model.whole}, batch {batch}"
                steps.append(Step(name, 2 if batch == 1 else 6, partial(self._model_row, name, batch)))
        return steps

    # ---- modules ----

    def _groups(self) -> dict[str, list[Subject]]:
        """Modules of one kind, on inputs of one shape, whose names differ in numbers only; without what is in them."""
        rows = self.report.replaced
        names = tuple(f"{row.name}." for row in rows)
        outer = [row for row in rows if not any(row.name.startswith(name) for name in names)]
        caught = catch_inputs(outer, self._run(self.settings.batch))
        groups: dict[tuple[str, str, tuple[int, ...]], list[Subject]] = {}
        for row in outer:
            if row.name not in caught:
                self.left.append(Left(row.name, row.before.__name__, "replaced, but this input does not reach it"))
                continue
            subject = Subject.of(row, rows, *caught[row.name])
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name)
            groups.setdefault((pattern, subject.kind, tuple(subject.shape)), []).append(subject)
        patterns = [pattern for pattern, _, _ in groups]
        # A pattern that is ambiguous (other kinds or shapes under it) gives way to the name of the first module.
        return {
            pattern if len(group) > 1 and patterns.count(pattern) == 1 else group[0].name: group
            for (pattern, _, _), group in groups.items()
        }

    def _attention_groups(self) -> dict[str, list[Subject]]:
        """The attention of all layers, for each batch; of transformers' models."""
        if self.attention is None:
            return {}
        return {f"attention, batch {b}": self.attention.catch(self._run(b)) for b in sorted(self.inputs)}

    def _chosen(self, name: str, group: list[Subject]) -> list[Subject]:
        wanted = self.settings.module
        return [subject for subject in group if wanted is None or wanted in subject.name or wanted in name]

    def _module_row(
        self, name: str, subjects: list[Subject], backward: bool, progress: Callable[[float], None], seconds: float
    ) -> Row:
        errors = [subject.errors(backward) for subject in subjects]
        theirs, ours = (Side(_pass(subjects, side, backward)) for side in ("theirs", "ours"))
        timing = interleave(theirs, ours, seconds, self.settings.rounds, progress)
        return Row(
            model=self.model.name,
            name=name,
            modules=[subject.name for subject in subjects],
            kind=subjects[0].kind,
            shape=subjects[0].shape,
            direction="forward+backward" if backward else "forward",
            error_torch=max(error for error, _ in errors),
            error_handtuned=max(error for _, error in errors),
            seconds_torch=timing.theirs / len(subjects),
            seconds_handtuned=timing.ours / len(subjects),
            ratio=timing.ratio,
            ratios=timing.ratios,
            kernels=kernels(ours.run),
        )

    # ---- the whole model ----

    def _run(self, batch: int) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: self.model.result(self.module, self.inputs[batch]))

    def _model_row(self, name: str, batch: int, progress: Callable[[float], None], seconds: float) -> Row:
        run = self._run(batch)
        with torch.no_grad():
            doubled = map_floats(lambda t: t.double(), self.inputs[batch])
            exact = self.model.result(copy.deepcopy(self.module).double(), doubled)
        theirs = run()
        self.report.redo()
        ours = run()
        served = kernels(run)
        sides = Side(run, self.report.undo), Side(run, self.report.redo)
        timing = interleave(*sides, seconds, self.settings.rounds, progress)
        self.report.undo()
        return Row(
            model=self.model.name,
            name=name,
            modules=[],
            kind=type(self.module).__name__,
            shape=list(next(iter(self.inputs[batch].values())).shape),
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
