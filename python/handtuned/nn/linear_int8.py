"""Int8Linear: a linear layer with an int8 weight, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from . import functional as F

if TYPE_CHECKING:
    from typing_extensions import Self


class Int8Linear(torch.nn.Module):
    """torch.nn.Linear with a weight of int8 and a float32 scale for each output feature. Input (*, in_features).

    The weight is kept once, in the order in which the kernels read it; state_dict has it as "weight" (out_features,
    in_features) int8 beside "scale" and "bias", for any instruction set. Conversions such as half() and to() leave
    weight and scale in their dtypes. The weight cannot be trained; gradients pass through it to the input.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear's; dtype is bias's. The weight is zeros:
            load a state_dict or use from_linear.
        quantize_input: also round each row of the input to 8 bits, as functional.linear_int8 does.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quantize_input: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.quantize_input = in_features, out_features, quantize_input
        zeros = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("packed", F.pack_int8_weight(zeros), persistent=False)
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.register_parameter(
            "bias", torch.nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, *, quantize_input: bool = False) -> Self:
        """The quantized form of a linear layer; the bias is the same parameter."""
        weight = linear.weight
        made = cls(linear.in_features, linear.out_features, False, weight.device, quantize_input=quantize_input)
        quantized, made.scale = F.quantize_linear_weight(weight)
        made.packed = F.pack_int8_weight(quantized)
        made.bias = linear.bias
        return made.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The int8 weight (out_features, in_features), a copy."""
        return reference.linear_int8_unpack(self.packed, self.out_features, self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the layer computes with (out_features, in_features), in dtype."""
        return reference.dequantize(self.packed, self.scale, self.in_features, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self.run(input)

    def run(self, input: Tensor, **options: Any) -> Tensor:
        """functional.linear_int8 with its options: activation, residual, dropout_p."""
        return F.linear_int8(input, self.packed, self.scale, self.bias, quantize_input=self.quantize_input, **options)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text + ", quantize_input=True" * self.quantize_input

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            *(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        )
        key, shape = prefix + "weight", (self.out_features, self.in_features)
        weight = state_dict.get(key)
        if weight is None:
            missing_keys += [key] * strict
            return
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        if weight.dtype != torch.int8 or weight.shape != shape:
            error_msgs.append(
                f"{key} is {weight.dtype} of shape {list(weight.shape)}, expected torch.int8 of shape {list(shape)}; "
                "load a float layer's into torch.nn.Linear and call handtuned.quantize"
            )
            return
        self.packed = F.pack_int8_weight(weight.to(self.packed.device))
