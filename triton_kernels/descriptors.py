"""Tensor descriptors (TMA) of what attention's kernels walk over: made on the host, where the table of tiles asks for
them (`descriptors` of tuning.AttentionConfig, on sm_90 and newer) and the tensors allow it; else None, and the kernels
take pointers. `explain` says which it was.

The hardware copies a block [1, 1, rows, width] of [batch, heads, rows, width] at once, wants addresses and strides
that are multiples of 16 bytes, and gives zeros outside. Made on the host they need no memory of Triton's allocator,
which belongs to the user, and their sizes are no part of what is compiled. A descriptor knows the tensor alone: behind
the end of a sequence that shares it with others (packed, cached, by length) the kernel reads whatever is there, gives
it the weight 0, and makes a tile in which that was NaN once more (attention_tile.py).
"""

from typing import Any

from torch import Tensor

from . import tuning


def _strides(tensor: Tensor) -> list[int]:
    """Those of dims of size 1 do not matter, but are checked."""
    pitch = -(-tensor.shape[-1] // 16) * 16
    return [pitch if size == 1 else step for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]


def _why_not(name: str, tensor: Tensor) -> str | None:
    size = tensor.element_size()
    if tensor.numel() == 0:
        return f"{name} is empty"
    if tensor.data_ptr() % 16:
        return f"{name} does not begin at a multiple of 16 bytes"
    strides = _strides(tensor)
    if any(step <= 0 or step * size % 16 or step * size >= 2**40 for step in strides):
        return f"{name} has the strides {list(tensor.stride())}, which are not all multiples of 16 bytes"
    return None


def of(
    kernel: str, tensors: dict[str, Tensor], block: tuple[int, int, int], widths: tuple[int, int], why: str | None
) -> list[Any]:
    """A descriptor of each, [.., .., .., width], whose blocks have these sizes; all None if one cannot be made, or if
    there is a reason already."""
    why = why or next((why for name, tensor in tensors.items() if (why := _why_not(name, tensor))), None)
    way = f"pointers: {why}" if why else "tensor descriptors"
    tuning.note(f"{kernel} kernel: {' and '.join(tensors)} through {way}")
    if why:
        return [None] * len(tensors)
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [
        TensorDescriptor(tensor, list(tensor.shape), [*_strides(tensor), 1], [*block, width])
        for tensor, width in zip(tensors.values(), widths, strict=True)
    ]


def of_keys(
    kernel: str, key: Tensor, value: Tensor, keys: int, widths: tuple[int, int], page_size: int | None
) -> list[Any]:
    """Of tiles of `keys` keys of a head."""
    why = None
    if page_size is not None and page_size % keys:
        why = f"pages of {page_size} keys are no multiple of a tile of {keys}"
    given = {"key": key, "value": value}
    four = {name: t if t.dim() == 4 else t.transpose(0, 1)[None] for name, t in given.items()}
    return of(kernel, four, (1, 1, keys), widths, why)


def of_queries(
    kernel: str, query: Tensor, grad_output: Tensor, rows: int, group: int, widths: tuple[int, int]
) -> list[Any]:
    """Of tiles of `rows` rows, each query's heads of a group together."""
    uneven = group & (group - 1) or rows % group
    why = f"groups of {group} heads do not divide a tile of {rows} rows" if uneven else None
    given = {"query": query, "grad_output": grad_output}
    four = {name: t.transpose(1, 2) if t.dim() == 4 else t[None] for name, t in given.items()}
    return of(kernel, four, (1, rows // group, group), widths, why)
