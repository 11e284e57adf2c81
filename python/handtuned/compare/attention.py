"""A transformers model's attention, caught call by call, to be run by torch's implementation and handtuned's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..integrations import transformers as integration
from .measure import Subject, map_floats

THEIRS = "sdpa"
CATCHING = "handtuned compare"  # the implementation of the model while its calls are caught


@dataclass
class Call:
    """One attention as the model asked for it. module: which one of the model it was."""

    module: torch.nn.Module
    inputs: tuple[Tensor, Tensor, Tensor]  # query, key, value
    mask: Tensor | None
    options: dict[str, Any]


class Served(torch.nn.Module):
    """A caught call as a module of query, key and value; the mask stays as the implementation wants it."""

    def __init__(self, function: Callable[..., Any], call: Call) -> None:
        super().__init__()
        self.function, self.mask, self.options = function, call.mask, call.options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = self.function(SimpleNamespace(), query, key, value, self.mask, **self.options)[0]
        return output


class Attention:
    """The attention of one transformers model, left with torch's implementation."""

    def __init__(self, module: torch.nn.Module) -> None:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        integration.register()
        self.module: Any = module
        self.functions: Any = AttentionInterface
        self.masks: Any = AttentionMaskInterface
        self.use_theirs()

    def use_theirs(self) -> None:
        self.module.set_attn_implementation(THEIRS)

    def catch(self, run: Callable[[], Any]) -> list[Subject]:
        """Every attention of run() with both implementations, each with the mask that it gets in the model."""
        sides = [self._calls(name, run) for name in (THEIRS, integration.NAME)]
        return [self._subject(*calls) for calls in zip(*sides, strict=True)]

    def _calls(self, name: str, run: Callable[[], Any]) -> list[Call]:
        """The calls of run() with the masks of one implementation."""
        calls: list[Call] = []
        torchs = self.functions()[THEIRS]

        def catching(
            module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
        ) -> Any:
            is_causal = options.get("is_causal", getattr(module, "is_causal", True))
            kept = {"scaling": options.get("scaling"), "dropout": options.get("dropout", 0.0), "is_causal": is_causal}
            query_copy, key_copy, value_copy = (tensor.detach().clone() for tensor in (query, key, value))
            calls.append(Call(module, (query_copy, key_copy, value_copy), mask, kept))
            return torchs(module, query, key, value, mask, **options)

        self.functions.register(CATCHING, catching)
        self.masks.register(CATCHING, self.masks()[name])
        self.module.set_attn_implementation(CATCHING)
        try:
            run()
        finally:
            self.use_theirs()
        return calls

    def _subject(self, theirs: Call, ours: Call) -> Subject:
        names = {module: name for name, module in self.module.named_modules()}
        functions = self.functions()
        sides = Served(functions[THEIRS], theirs), Served(functions[integration.NAME], ours)
        inputs: Any = map_floats(lambda t: t.requires_grad_(), theirs.inputs)
        generator = torch.Generator().manual_seed(0)
        output = sides[0](*inputs)
        grads = [torch.randn(output.shape, generator=generator).to(output.dtype)]
        kind = type(theirs.module).__name__
        return Subject(names[theirs.module], kind, *sides, inputs, {}, list(inputs), grads)
