"""Text generation by a small GPT-2: the prompt at once, then tokens one by one with the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..integrations import transformers as integration
from .measure import Side, interleave, kernels, relative_error
from .models import small_gpt2
from .result import Row, Settings
from .runner import DTYPES, Progress, part

NAME = "GPT-2 of 6 layers with random weights"
PROMPT, NEW = 256, 32  # tokens
ROWS = {"generation, prefill": PROMPT, "generation, decode": NEW}


class Generation:
    """One sequence. The tokens are fixed, so that both sides and the float64 run do the same work."""

    def __init__(self, settings: Settings, seconds: float, progress: Progress) -> None:
        self.settings, self.seconds, self.progress = settings, seconds, progress
        module: Any = small_gpt2().to(DTYPES[settings.dtype])
        self.module = module
        self.report = integration.replace(self.module)
        self.report.undo()
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(module.config.vocab_size, (1, PROMPT + NEW), generator=generator)
        self.prompt, self.new = tokens.split([PROMPT, NEW], 1)
        self.cache: Any = None

    def rows(self) -> list[Row]:
        passes = self._prefill, self._decode
        return [
            self._row(name, run, part(self.progress, i / 2, (i + 1) / 2))
            for i, (name, run) in enumerate(zip(ROWS, passes, strict=True))
        ]

    @torch.no_grad()
    def _prefill(self, module: Any) -> Tensor:
        logits: Tensor = module(self.prompt, use_cache=True, logits_to_keep=1).logits
        return logits

    @torch.no_grad()
    def _decode(self, module: Any) -> Tensor:
        """The logits behind the last token; self.cache holds the prompt before, and all after."""
        for token in self.new.split(1, 1):
            found = module(token, past_key_values=self.cache, use_cache=True)
        logits: Tensor = found.logits
        return logits

    @torch.no_grad()
    def _prompt_cache(self, module: Any) -> Any:
        return module(self.prompt, use_cache=True, logits_to_keep=1).past_key_values

    def _row(self, name: str, run: Callable[[Any], Tensor], progress: Progress) -> Row:
        progress(name, 0.0)
        exact_module = copy.deepcopy(self.module).double()
        self.cache = self._prompt_cache(exact_module)
        exact = run(exact_module)
        del exact_module
        kept = self._prompt_cache(self.module)

        def fresh(switch: Callable[[], None]) -> Callable[[], None]:
            def prepare() -> None:
                switch()
                self.cache = copy.deepcopy(kept)

            return prepare

        theirs, ours = (
            Side(lambda: run(self.module), fresh(switch)) for switch in (self.report.undo, self.report.redo)
        )
        results = []
        for side in (theirs, ours):
            side.prepare()
            results.append(side.run())
        ours.prepare()
        served = kernels(ours.run)
        timing = interleave(theirs, ours, self.seconds / 2, self.settings.rounds, lambda done: progress(name, done))
        self.report.undo()
        return Row(
            model=NAME,
            name=name,
            modules=[],
            kind=type(self.module).__name__,
            shape=[1, PROMPT if run == self._prefill else 1],
            direction="forward",
            error_torch=relative_error([results[0]], [exact]),
            error_handtuned=relative_error([results[1]], [exact]),
            seconds_torch=timing.theirs,
            seconds_handtuned=timing.ours,
            ratio=timing.ratio,
            ratios=timing.ratios,
            kernels=served,
            tokens=ROWS[name],
        )
