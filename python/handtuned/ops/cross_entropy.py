"""The op linear_cross_entropy: handles, checks in the same words as csrc/cross_entropy.cpp, and fake kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .common import Arguments, by_name, namespace, register, wide_dtype

linear_cross_entropy = namespace.linear_cross_entropy.default
linear_cross_entropy_backward = namespace.linear_cross_entropy_backward.default

CROSS_ENTROPY_OPS = by_name(linear_cross_entropy, linear_cross_entropy_backward)
REDUCTIONS = ("none", "mean", "sum")  # by number


class CrossEntropyArguments(Arguments):
    main_name = "input"

    def __init__(self, op: Any, args: tuple[Any, ...]) -> None:
        super().__init__(op, args)
        self.main: Tensor = self["input"]

    @property
    def loss_shape(self) -> list[int]:
        return list(self.main.shape[:-1]) if REDUCTIONS[self["reduction"]] == "none" else []

    @property
    def keep(self) -> int:
        """Of how many classes probabilities are kept."""
        kept = self["kept"]
        keep: int = self["keep"] if kept is None else kept.shape[1]
        return keep

    def check(self) -> None:
        kept = self["kept"]
        self.require(
            kept is None or kept.dim() == 2,
            f"kept has shape {[] if kept is None else list(kept.shape)}, expected [rows, classes kept]; pass what the "
            "forward returned",
        )
        self.check_dtype()
        w = self["linear_weight"]
        self.check_type("linear_weight", w)
        self.require(
            w.dim() == 2 and w.shape[0] > 0,
            f"linear_weight has shape {list(w.shape)}, expected [classes, in_features] with a class at least; "
            "reshape it",
        )
        x = self.main
        self.require(
            x.dim() >= 1 and x.shape[-1] == w.shape[1],
            f"input has shape {list(x.shape)}, expected [*, {w.shape[1]}] beside linear_weight of shape "
            f"{list(w.shape)}; its last dim is in_features",
        )
        for name in ("linear_bias", "weight"):
            if self[name] is not None:
                self.check_type(name, self[name])
                self.check_shape(name, self[name], [w.shape[0]])
        target = self["target"]
        self.check_device("target", target)
        self.require(
            target.dtype == torch.int64,
            f"target is {target.dtype}, expected int64, the number of each row's class; convert it with .to()",
        )
        self.check_shape("target", target, list(x.shape[:-1]))
        self._check_numbers()
        wide = wide_dtype(x.dtype)
        if self["kept"] is not None:
            self.check_type("kept", self["kept"])
            self.check_shape("kept", self["kept"], [target.numel(), self.keep])
        for name in ("grad_loss", "stats"):
            given = self[name]
            if given is not None:
                self.check_device(name, given)
                self.require(
                    given.dtype == wide,
                    f"{name} is {given.dtype}, expected {wide} beside {x.dtype} input; convert it with .to()",
                )
                self.check_shape(name, given, self.loss_shape if name == "grad_loss" else [2, target.numel()])

    def _check_numbers(self) -> None:
        reduction, smoothing = self["reduction"], self["label_smoothing"]
        self.require(
            0 <= reduction < len(REDUCTIONS),
            f"reduction is {reduction}, the limits are 0 and {len(REDUCTIONS) - 1}; pass the number of a reduction",
        )
        self.require(
            0 <= smoothing <= 1,
            f"label_smoothing is {smoothing:g}, the limits are 0 and 1; pass a share of the target",
        )
        for name in ("softcap", "z_loss"):
            value = self[name]
            self.require(
                value >= 0 and math.isfinite(value),
                f"{name} is {value:g}, it must be finite and at least 0; 0 switches it off",
            )
        classes = self["linear_weight"].shape[0]
        limit, cap = (0, " with softcap") if self["softcap"] > 0 else (classes, "")
        self.require(
            0 <= self.keep <= limit,
            f"keep is {self.keep}, the limits are 0 and {limit} for {classes} classes{cap}; pass 0 to keep no "
            "probabilities",
        )

    def copies(self) -> list[str]:
        scattered = [name for name in ("input", "linear_weight") if self[name].numel() and self[name].stride(-1) != 1]
        notes = [
            f"{name} is copied once: its rows are not contiguous" for name in scattered if self[name].shape[-1] > 1
        ]
        classes = self["linear_weight"].shape[0]
        if self["kept"] is not None and self.keep < classes:
            notes.append(f"the logits of {classes - self.keep} of {classes} classes are made again")
        return notes

    def fake(self) -> tuple[Tensor, ...]:
        x, w, wide = self.main, self["linear_weight"], wide_dtype(self.main.dtype)
        if self.op == "linear_cross_entropy":
            rows = self["target"].numel()
            stats, kept = x.new_empty([2, rows], dtype=wide), x.new_empty([rows, self.keep])
            return x.new_empty(self.loss_shape, dtype=wide), stats, kept
        wanted = [("input", list(x.shape)), ("linear_weight", list(w.shape)), ("linear_bias", [w.shape[0]])]
        return tuple(x.new_empty(shape if self[f"need_{name}"] else [0]) for name, shape in wanted)


for _op in CROSS_ENTROPY_OPS.values():
    register(_op, CrossEntropyArguments, gpu=("triton",))
