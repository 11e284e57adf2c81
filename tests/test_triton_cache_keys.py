"""Triton compiles no kernel anew because a batch or a length is another one: what is compiled in of launches over
twenty of them. (Its own rules compile for 1 and for multiples of 16, inside tuples even where told not to.)"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import triton_tools
from handtuned.triton_kernels import attention, cross_entropy, kv_cache, linear, linear_int8, norm, rnn, rotary, tuning

PAIRS = [(b, n) for b in (1, 2, 3, 16, 32) for n in (1, 15, 48, 1040)]
WIDTH = 24  # of a head; no multiple of 16
FAMILIES = ("dense", "packed", "pages", "recurrent", "others")
MOST_FORMS = 8  # of a kernel: few rows or many, keys shared by programs or not, a second try for NaNs


def launch(arch: str, family: str, batch: int, length: int) -> None:
    """Called in the process without interpreter, where launches are recorded."""
    tuning.architecture = lambda device: arch
    {"recurrent": _recurrent, "others": _others}.get(family, lambda *_: _attention(family, batch, length))(
        batch, length
    )


def _attention(family: str, batch: int, length: int) -> None:
    x = torch.zeros(batch, 4, length, WIDTH, dtype=torch.bfloat16)
    key = x[:, :2]
    nothing: list[Any] = [None] * 7
    options = (0.2, True, -1, 0, 0.0, 0.0, None)
    if family == "dense":
        given: list[Any] = [x, key, key, *nothing, *options]
        output, lse = attention.attention(*given)
        saved: list[Any] = [output, None, *given[:3], output, lse, *nothing[1:], *options]
        attention.attention_backward(*saved, True, True, True, False, False)
        return
    rows, starts = x.transpose(1, 2).flatten(0, 1), torch.arange(batch + 1, dtype=torch.int32) * length
    if family == "packed":
        given = [rows, rows[:, :2], rows[:, :2], None, starts, starts, *nothing[:4], *options]
        attention.attention(*given)
        return
    pages = torch.zeros(batch + 1, 2, 16, WIDTH, dtype=x.dtype)
    table, lengths = torch.zeros(batch, -(-length // 16), dtype=torch.int32), torch.full((batch,), length)
    attention.attention(x[:, :, :1], pages, pages, None, None, None, lengths, table, None, None, *options)


def _recurrent(batch: int, length: int) -> None:
    x, h = torch.zeros(min(length, 48), batch, 20), 20
    weights = [torch.zeros(4 * h, h)] * 2 + [torch.zeros(4 * h)] * 2
    packed = rnn.rnn_pack(weights * 2, "LSTM", False, True, 0.0, None)
    rates, seed, lengths = [0.1, 0.1, 0.1, 0.0], torch.zeros(1, dtype=torch.int64), torch.ones(batch, dtype=torch.int64)
    output, *_, saved = rnn.rnn(x, lengths, None, None, packed, "LSTM", h, 0, 2, False, 0.1, rates, seed, True, False)
    given = (output, None, None, None, x, lengths, None, None, weights * 2, saved)
    rnn.rnn_backward(*given, "LSTM", False, True, 0.1, rates, seed, True, True, True, True)


def _others(batch: int, length: int) -> None:
    x, w = torch.zeros(batch, length, WIDTH), torch.zeros(WIDTH)
    y, stats = norm.layer_norm(x, 1, w, w, 1e-5)
    norm.layer_norm_backward(y, x, 1, stats, w, True, True, True)
    linear.linear(x, torch.zeros(40, WIDTH), None, None, None, 2, 0.0, None)
    target = torch.zeros(batch, length, dtype=torch.int64)
    cross_entropy.linear_cross_entropy(x, torch.zeros(40, WIDTH), None, target, None, 1, -100, 0.0, 0.0, 0.0, 0)
    table = torch.zeros(length, 4)
    heads = x.view(batch, length, 2, 12).transpose(1, 2)
    rotary.rotary(heads, table, table, False, False)
    lengths, cache = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, 2, length + 5, 12)
    kv_cache.append_kv(heads, heads, heads, cache, cache, lengths, None, table, table, False, True)
    packed = linear_int8.linear_int8_pack(torch.zeros(40, WIDTH, dtype=torch.int8))
    linear_int8.linear_int8(x, packed, torch.zeros(40), None, None, 0, 0.0, None, True, False)


def test_batch_and_length_are_never_compiled_in() -> None:
    cases = [
        {"arch": "sm90", "family": family, "batch": batch, "length": length}
        for family in FAMILIES
        for batch, length in PAIRS
    ]
    found = triton_tools.cache_keys("test_triton_cache_keys:launch", cases)
    keys: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for case, launches in zip(cases, found, strict=True):
        for name, form, key in launches:
            keys[case["family"], name][form].add(key)
    assert len(keys) > 15
    assert not {name: found for name, forms in keys.items() for found in forms.values() if len(found) > 1}
    assert not {name: forms.keys() for name, forms in keys.items() if len(forms) > MOST_FORMS}
