"""Runs a family's kernels in the library with sanitizers and mutation points, and says which planted bugs were caught.

    LD_PRELOAD='libasan.so libstdc++.so' python hunt.py LIBRARY FAMILY NUMBER...

Fails where the kernels as they are do not pass, with sanitizers.

Prints a line of JSON a mutant: its number, and what caught it (null if nothing did). Each mutant runs in a forked
child, so that a sanitizer's abort, a segmentation fault or an endless loop ends the child alone; of the checks only
those that pass the planted point, the quickest first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import attention_cases as ac
import attention_numerics as an
import cases
import numerics
import numpy as np
import rnn_cases as rc
import simt_tools
import torch

import handtuned

PATIENCE = 8  # times what the checks take without a bug: a loop that never ends
Traffic = dict[str, list[int]]  # of each case, bytes loaded and stored
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LAYER, RMS, ADD_LAYER, ADD_RMS = cases.FORMS
DROP_LAYER, DROP_RMS = cases.DROPOUTS

# ---- norms -----------------------------------------------------------------------------------------------------------

# Few and small, but every branch of every kernel: packs and elements, short rows and rows of several warps, rows held
# in registers, in shared memory and nowhere, every option and its absence.
CASES = (
    DROP_LAYER.with_(shape=(35, 72)),
    DROP_LAYER.with_(shape=(3, 1337), dtype=BF16, weight_dtype=torch.float32),
    DROP_RMS.with_(shape=(5, 136), dtype=F16, layout="sliced"),
    LAYER.with_(shape=(37, 20)),
    LAYER.with_(shape=(9, 1, 1100), dtype=BF16),
    LAYER.with_(shape=(3, 2, 3, 2, 33), affine="none", layout="permuted"),
    RMS.with_(shape=(18, 70), dtype=F64),
    ADD_RMS.with_(shape=(6, 40), affine="none"),
    LAYER.with_(shape=(16, 250), values="huge"),
    LAYER.with_(shape=(3, 7000), dtype=F64),
    RMS.with_(shape=(2, 13000), dtype=F64),
    ADD_LAYER.with_(shape=(17, 16390), dtype=BF16),
)


def partial_gradients() -> None:
    """The gradients alone that a caller may leave out, and the op without statistics."""
    x, w = torch.randn(35, 72), torch.randn(72)
    ops, reference = handtuned.ops, handtuned.reference
    y, stats = ops.layer_norm(x, 1, w, w, 1e-5)
    assert torch.equal(ops.layer_norm_inference(x, 1, w, w, 1e-5), y)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        found = ops.layer_norm_backward(y, x, 1, stats, w, *needs)
        wanted = reference.layer_norm_backward(y, x, 1, stats, w, *needs)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def run_norm(emulator: simt_tools.Emulator, expected: Traffic | None, chosen: Sequence[cases.Case] = CASES) -> Traffic:
    """Raises at the first wrong result; with `expected`, also where memory was touched more or less often."""
    found: Traffic = {}
    for case in chosen:
        emulator.reset()
        d = numerics.drawn(case, 0)
        leaves = d.tensors.leaves()
        numerics.draw_seed(0)
        ours = cases.results(cases.run(case, leaves), leaves, d.tensors)
        for name, tensor in ours.items():
            numerics.check_same_non_finite(name, tensor, d.torchs[name])
            if d.torchs[name].isfinite().all():
                compare_errors(f"{case.name}: {name}", tensor.dtype, tensor, d.torchs[name], d.truth[name])
        compare_traffic(emulator, case.name, expected, found)
    return found


def compare_errors(
    what: str, dtype: torch.dtype, ours: torch.Tensor, torchs: torch.Tensor, truth: numerics.Array
) -> None:
    eps = torch.finfo(dtype).eps
    entry = numerics.Errors(eps, slack=4 * eps)  # one draw says little: the bound itself is held elsewhere
    entry.add(ours, torchs, truth)
    excess = entry.excess()
    assert not excess, f"{what}: {excess}"


def compare_traffic(emulator: simt_tools.Emulator, name: str, expected: Traffic | None, found: Traffic) -> None:
    traffic = [emulator.counts.bytes_loaded, emulator.counts.bytes_stored]
    assert expected is None or traffic == expected[name], f"{name}: other memory traffic"
    found[name] = traffic


# ---- attention -------------------------------------------------------------------------------------------------------

# Every option, on tensor cores and without them; tiles and chunks of keys more than one, and none; what nobody sees.
ATTENTION_CASES = (
    ac.ALL.with_(dtype=BF16),
    ac.ALL_PACKED,
    ac.PACKED.with_(dtype=F16, causal=True, layout="rows_of_heads"),
    ac.PACKED.with_(packed=((3,), (0,))),
    ac.PACKED.with_(packed=((1,) * 35 + (70,), (2,) * 35 + (66,)), shape=(36, 2, 0, 0, 8), kv_heads=1),
    ac.Case((1, 1, 150, 140, 72), dtype=BF16, causal=True, alignment="bottom_right"),
    ac.Case((1, 2, 70, 130, 40), window=(30, 5), alignment="bottom_right", softcap=2.0, mask="add", mask_dims="h11",
            alibi="h"),
    ac.Case((1, 1, 66, 70, 130), value_width=140, dropout=0.3, mask="bool", dtype=BF16),
    ac.Case((1, 2, 5, 3, 6), value_width=131, mask="add_inf", mask_dims="qk", dtype=F64),
    ac.Case((1, 4, 1, 520, 33), kv_heads=2, sinks=F32, dtype=F16),
    ac.Case((1, 2, 3, 520, 16), value_width=140, mask="add", mask_dims="1k", dropout=0.2),
    ac.Case((2, 2, 70, 9, 16), mask="add", mask_dims="q1", mask_dtype=F32, dtype=F16, window=(-1, 2), sinks=F32),
    ac.Case((1, 1, 66, 20, 136), mask="add", mask_dims="qk"),
    ac.Case((1, 1, 2, 520, 16), lengths=(300,), spread=90.0),
    ac.Case((2, 2, 100, 100, 8), kv_heads=1, window=(0, 3), alibi="h", dtype=BF16),
)  # fmt: skip


def run_attention(
    emulator: simt_tools.Emulator, expected: Traffic | None, chosen: Sequence[ac.Case] = ATTENTION_CASES
) -> Traffic:
    found: Traffic = {}
    for case in chosen:
        emulator.reset()
        d = an.drawn(case, 0)
        numerics.draw_seed(0)
        ours = ac.results(case, d.tensors)
        an.check_every_element(case, ours, d.truth)
        if case.dtype in (BF16, F16):  # whose weights' roundings leave room for more than roundings
            for name in [name for name in ours if an.has_peer(ours[name], d.truth, name)]:
                finite = np.isfinite(d.truth.values[name])
                kept, truth = torch.from_numpy(finite), d.truth.values[name][finite]
                compare_errors(f"{case.name}: {name}", case.dtype, ours[name][kept], d.torchs[name][kept], truth)
        compare_traffic(emulator, case.name, expected, found)
    return found


HIDING = (
    *(
        ac.Case((1, 1, 20, keys, 16), causal=True, window=3, alignment="bottom_right", dtype=dtype)
        for keys, dtype in ((90, BF16), (90, F32), (520, F16))
    ),
    *(ac.Case((1, 1, 2, 30, 16), mask="add_inf", softcap=2.0, dtype=dtype) for dtype in (BF16, F32)),
)


def nobody_sees_nan(case: ac.Case) -> None:
    """Keys and values that no query sees, in tiles that some do see, may hold anything."""
    t = ac.tensors(case)
    clean = ac.results(case, t)
    hidden = ~an.visible(case, t.mask, 0).any(1)[0]
    assert hidden.any()
    for tensor in (t.key, t.value):
        tensor[:, :, hidden] = torch.nan
    for name, tensor in ac.results(case, t).items():
        atol = 8 * torch.finfo(tensor.dtype).eps * clean[name].nan_to_num(0, 0, 0).abs().max().item()
        torch.testing.assert_close(tensor, clean[name], rtol=0, atol=atol)


def numbers_beyond_their_limits() -> None:
    """What they give is wrong; the sanitizers see that it is made of nothing but the tensors."""
    case = ac.PACKED.with_(mask="add", mask_dims="hqk")
    t = ac.tensors(case)
    assert t.query_starts is not None
    assert t.key_starts is not None
    for at, number in ((0, -9), (1, 60), (-1, 10**6)):  # 60: a sequence longer than the mask
        starts = [t.query_starts.clone(), t.key_starts.clone()]
        for each in starts:
            each[at] = number
        ac.results(case, replace(t, query_starts=starts[0], key_starts=starts[1]))
    query, pages = torch.randn(1, 2, 1, 8), torch.randn(3, 2, 4, 8)
    for page in (-4, 99):
        attend(query, pages, torch.tensor([[page, 1]]))


def attend(query: torch.Tensor, keys: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    options = (None, None, 1.0, False, -1, -1, 0.0, 0.0, None)
    return handtuned.ops.attention(query, keys, keys, None, None, None, torch.tensor([7]), table, *options)[0]


def pages_in_any_order(dtype: torch.dtype) -> None:
    query, dense = torch.randn(1, 2, 1, 8, dtype=dtype), torch.randn(1, 2, 12, 8, dtype=dtype)
    order = torch.tensor([2, 0, 1])
    pages = torch.empty(3, 2, 4, 8, dtype=dtype)
    pages[order] = dense[0].unflatten(1, (3, 4)).transpose(0, 1)
    assert attend(query, pages, order[None]).equal(attend(query, dense, None)), "pages"


# ---- recurrent layers ------------------------------------------------------------------------------------------------

DRAWN = {"zoneout": 0.4, "recurrent_dropout": 0.3, "weight_dropout": 0.2}
LSTM = {"peepholes": True, "cell_zoneout": 0.3, "return_cell_states": True}
RAGGED = (3, 0, 2, 3)


def varied(case: rc.Case, **options: Any) -> rc.Case:
    return case.with_(options=tuple(options.items()))


# Each with the device that it runs on: one that holds weights in registers, in shared memory, or nowhere.
REGISTERS, SHARED, STEPS = (0, 0), (2, 0), (2, 18 << 10)
TWO_LAYERS = rc.Case("LSTM", (3, 4, 5, 11), layers=2, bidirectional=True, states=True, lengths=RAGGED, dropout=0.3)
# In the backward a warp has more of W_hh than registers are for.
DEEP = rc.Case("LSTM", (2, 1, 1, 1800), proj=8, bias=False)
RNN_CASES = (
    (varied(TWO_LAYERS, **DRAWN, **LSTM), REGISTERS),
    (varied(TWO_LAYERS.with_(shape=(2, 4, 5, 35), proj=33, layers=1, batch_first=True, lengths=(2, 0, 1, 2),
                             states=False), **LSTM, coupled_gates=True, zoneout=0.2), REGISTERS),
    (varied(TWO_LAYERS.with_(proj=6, training=False), **DRAWN, **LSTM, activation="hardtanh"), STEPS),
    (varied(rc.Case("GRU", (3, 10, 70, 9), states=True), recurrent_activation="hardsigmoid"), STEPS),
    (rc.Case("GRU", (4, 4, 5, 21), lengths=(4, 1, 2, 4), packed=True, layers=2, bidirectional=True, dtype=BF16),
     REGISTERS),
    (varied(rc.Case("RNN_TANH", (3, 2, 3, 10), states=True, dtype=F64), zoneout=0.3), REGISTERS),
    (rc.Case("RNN_RELU", (131, 1, 2, 2), bias=False, states=True), REGISTERS),
    (rc.Case("GRU", (1, 1, 2, 173), states=True, dtype=F64), SHARED),
    (rc.Case("GRU", (1, 2, 2, 45)), REGISTERS),
    (rc.Case("LSTM", (2, 70, 2, 13), states=True), REGISTERS),
    (DEEP, REGISTERS),
)  # fmt: skip


def run_rnn(
    emulator: simt_tools.Emulator,
    expected: Traffic | None,
    chosen: Sequence[tuple[rc.Case, tuple[int, int]]] = RNN_CASES,
) -> Traffic:
    found: Traffic = {}
    for case, device in chosen:
        emulator.device(*device)
        emulator.reset()
        t = rc.tensors(case)
        torch.manual_seed(7)
        ours = rc.results(case, t)
        for name, truth in truths(case).items():
            tensor, eps = ours[name].double(), torch.finfo(case.dtype).eps
            assert tensor.isnan().equal(truth.isnan()), f"{case.name}: {name}: NaN"
            error = (tensor - truth).nan_to_num().abs().max() if truth.numel() else torch.zeros(())
            assert error <= 32 * eps * truth.nan_to_num().abs().max().clamp_min(1), f"{case.name}: {name}: {error}"
        compare_traffic(emulator, case.name, expected, found)
        gradient_of_hn_alone(case, t)
        with torch.no_grad():
            torch.manual_seed(7)
            output = rc.run(case, t)[0]
        assert output.nan_to_num().equal(ours["output"].nan_to_num()), f"{case.name}: inference"
    return found


def gradient_of_hn_alone(case: rc.Case, t: rc.Tensors) -> None:
    """Where no other output is used, and the weights alone want a gradient."""
    leaves = {name: leaf if name.startswith("w") else leaf.detach() for name, leaf in t.leaves().items()}
    hn = rc.run(case, t.with_leaves(leaves))[1]
    torch.autograd.grad(hn.sum(), [leaf for leaf in leaves.values() if leaf.requires_grad], materialize_grads=True)


@cache
def truths(case: rc.Case) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return rc.exact(case, rc.tensors(case))


# ---- the hunt --------------------------------------------------------------------------------------------------------

Check = Callable[[simt_tools.Emulator, Traffic | None], Traffic]


def beside(check: Callable[[], None]) -> Check:
    """One that does not count traffic."""

    def run(emulator: simt_tools.Emulator, expected: Traffic | None) -> Traffic:
        check()
        return {}

    return run


CHECKS: dict[str, list[Check]] = {
    "norm": [*(partial(run_norm, chosen=[c]) for c in CASES), beside(partial_gradients)],
    "attention": [
        *(partial(run_attention, chosen=[c]) for c in ATTENTION_CASES),
        *(beside(partial(nobody_sees_nan, c)) for c in HIDING),
        beside(numbers_beyond_their_limits),
        *(beside(partial(pages_in_any_order, dtype)) for dtype in (BF16, F32)),
    ],
    "rnn": [partial(run_rnn, chosen=[c]) for c in RNN_CASES],
}


@dataclass(frozen=True)
class Known:
    """A check, and what it did where nothing was planted."""

    check: Check
    traffic: Traffic
    passed: frozenset[int]  # mutation points
    seconds: float  # of processor time


def learn(emulator: simt_tools.Emulator, check: Check) -> Known:
    start = time.process_time()
    traffic = check(emulator, None)
    return Known(check, traffic, emulator.take_passed(), time.process_time() - start)


def child(checks: Sequence[Known], emulator: simt_tools.Emulator, mutant: int, said: int) -> None:
    """Never returns: the exit status says whether something was caught, and `said` takes the words."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the sanitizers' reports
    emulator.plant(mutant)
    try:
        for known in checks:
            # Of processor time: others may be at work.
            signal.setitimer(signal.ITIMER_PROF, 1 + PATIENCE * known.seconds)
            known.check(emulator, known.traffic)
    except Exception as error:
        os.write(said, " ".join(str(error).split())[:200].encode())
        os._exit(3)
    os._exit(0)


def hunt(checks: Sequence[Known], emulator: simt_tools.Emulator, mutant: int) -> str | None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(checks, emulator, mutant, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        words = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if status == 0:
        return None
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return words or "a sanitizer"


def main() -> None:
    torch.set_num_threads(1)
    with simt_tools.emulated("random", 1, Path(sys.argv[1])) as emulator:
        checks = sorted((learn(emulator, check) for check in CHECKS[sys.argv[2]]), key=lambda known: known.seconds)
        for mutant in map(int, sys.argv[3:]):
            passing = [known for known in checks if mutant in known.passed]
            print(json.dumps({"mutant": mutant, "caught": hunt(passing, emulator, mutant)}), flush=True)


if __name__ == "__main__":
    main()
