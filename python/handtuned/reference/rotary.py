"""The rotary family in plain PyTorch, with the op schemas' arguments and results.

(a, b) -> (a cos - b sin, b cos + a sin) for pairs of features: Su et al. 2021 (arXiv:2104.09864).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    angles = cos.shape[-1]
    cos, sin = cos.to(wide), sin.to(wide)
    sin = -sin if inverse else sin
    x, rest = input[..., : 2 * angles].to(wide), input[..., 2 * angles :]
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    first, second = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((turned.to(input.dtype), rest), -1)


def _check_places(key_cache: Tensor, new: int, cache_lengths: Tensor, block_table: Tensor | None) -> None:
    """That the new keys have room; not on other devices, where the write itself fails and looking would wait for it."""
    if key_cache.device.type != "cpu":
        return
    size = key_cache.shape[2]
    capacity = size if block_table is None else size * block_table.shape[1]
    for b, length in enumerate(cache_lengths.tolist()):
        if not 0 <= length <= capacity - new:
            raise RuntimeError(
                f"handtuned.append_kv: cache_lengths[{b}] is {length}, the limits are 0 and {capacity - new} ({new} "
                f"new keys in a cache of {capacity}); allocate a longer cache"
            )
        if block_table is None:
            continue
        for place in range(length // size, -(-(length + new) // size)):
            page = int(block_table[b, place])
            if not 0 <= page < key_cache.shape[0]:
                raise RuntimeError(
                    f"handtuned.append_kv: block_table[{b}][{place}] is {page}, the limits are 0 and "
                    f"{key_cache.shape[0] - 1}; give each sequence pages for its new keys"
                )


def append_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    in_order: bool,
) -> tuple[Tensor, Tensor]:
    _check_places(key_cache, key.shape[2], cache_lengths, block_table)
    new, first = key.shape[2], cache_lengths.long()[:, None]
    position = first + torch.arange(new, device=key.device)
    output = query.new_empty(0)
    if cos is not None and sin is not None:
        asked = first + torch.arange(query.shape[2], device=key.device) * in_order
        output = rotary(query, cos[asked][:, None], sin[asked][:, None], interleaved, False)
        key = rotary(key, cos[position][:, None], sin[position][:, None], interleaved, False)
    if block_table is None:
        entry, slot = torch.arange(len(first), device=key.device)[:, None], position
    else:
        size = key_cache.shape[2]
        entry, slot = block_table.long().gather(1, position // size), position % size
    # Indices on either side of the heads put the dims that they make in front: [B, Lnew, Hk, D].
    key_cache[entry, :, slot] = key.transpose(1, 2)
    value_cache[entry, :, slot] = value.transpose(1, 2)
    return output, (first + new)[:, 0]
