"""Runs a family's kernels in the library with sanitizers and mutation points, and says which planted bugs were caught.

    LD_PRELOAD='libasan.so libstdc++.so' python hunt.py LIBRARY FAMILY NUMBER...        -1: nothing is planted

Prints a line of JSON a mutant: its number, and what caught it (null if nothing did). Each mutant runs in a forked
child, so that a sanitizer's abort, a segmentation fault or an endless loop ends the child alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import attention_cases as ac
import attention_numerics as an
import cases
import numerics
import rnn_cases as rc
import simt_tools
import torch

import handtuned

SECONDS = 60  # of a mutant; whole runs take about two
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


def run_norm(emulator: simt_tools.Emulator, expected: Traffic | None) -> Traffic:
    """Raises at the first wrong result; with `expected`, also where memory was touched more or less often."""
    found: Traffic = {}
    for case in CASES:
        emulator.reset()
        d = numerics.drawn(case, 0)
        leaves = d.tensors.leaves()
        numerics.draw_seed(0)
        ours = cases.results(cases.run(case, leaves), leaves, d.tensors)
        for name, tensor in ours.items():
            eps = torch.finfo(tensor.dtype).eps
            entry = numerics.Errors(eps, slack=4 * eps)  # one draw says little: the bound itself is held elsewhere
            numerics.check_same_non_finite(name, tensor, d.torchs[name])
            if d.torchs[name].isfinite().all():
                entry.add(tensor, d.torchs[name], d.truth[name])
            excess = entry.excess()
            assert not excess, f"{case.name}: {name}: {excess}"
        compare_traffic(emulator, case.name, expected, found)
    partial_gradients()
    return found


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
    ac.Case((1, 2, 70, 130, 40), window=(30, 5), softcap=2.0, mask="add", mask_dims="h11", alibi="h"),
    ac.Case((1, 1, 66, 70, 130), value_width=140, dropout=0.3, dtype=BF16),
    ac.Case((1, 2, 5, 3, 6), value_width=131, mask="add_inf", mask_dims="qk", dtype=F64),
    ac.Case((1, 4, 1, 600, 33), kv_heads=2, sinks=F32, dtype=F16),
    ac.Case((1, 2, 3, 600, 16), value_width=140, mask="add", mask_dims="1k", dropout=0.2),
    ac.Case((2, 2, 70, 9, 16), mask="add", mask_dims="q1", mask_dtype=F32, dtype=F16, window=(-1, 2)),
)


def run_attention(emulator: simt_tools.Emulator, expected: Traffic | None) -> Traffic:
    found: Traffic = {}
    for case in ATTENTION_CASES:
        emulator.reset()
        d = an.drawn(case, 0)
        numerics.draw_seed(0)
        an.check_every_element(case, ac.results(case, d.tensors), d.truth)
        compare_traffic(emulator, case.name, expected, found)
    for case in HIDING:
        nobody_sees_nan(case)
    numbers_beyond_their_limits()
    return found


HIDING = tuple(
    ac.Case((1, 1, 20, keys, 16), causal=True, window=3, alignment="bottom_right", dtype=dtype)
    for keys, dtype in ((90, BF16), (90, F32), (600, F16))
)


def nobody_sees_nan(case: ac.Case) -> None:
    """Keys and values that no query sees, in tiles that some do see, may hold anything."""
    t = ac.tensors(case)
    clean = ac.results(case, t)
    hidden = ~an.visible(case, None, 0).any(1)[0]
    for tensor in (t.key, t.value):
        tensor[:, :, hidden] = torch.nan
    for name, tensor in ac.results(case, t).items():
        error = (tensor - clean[name]).abs().max()
        assert error <= 8 * torch.finfo(tensor.dtype).eps * clean[name].abs().max(), f"{case.name}: {name}: NaN"


def numbers_beyond_their_limits() -> None:
    """What they give is wrong; the sanitizers see that it is made of nothing but the tensors."""
    t = ac.tensors(ac.PACKED)
    assert t.query_starts is not None
    assert t.key_starts is not None
    for at, number in ((0, -9), (-1, 10**6)):
        starts = [t.query_starts.clone(), t.key_starts.clone()]
        for each in starts:
            each[at] = number
        ac.results(ac.PACKED, replace(t, query_starts=starts[0], key_starts=starts[1]))
    query, pages = torch.randn(1, 2, 1, 8), torch.randn(3, 2, 4, 8)
    for page in (-4, 99):
        table, lengths = torch.tensor([[page, 1]]), torch.tensor([7])
        options = (None, None, 1.0, False, -1, -1, 0.0, 0.0, None)
        handtuned.ops.attention(query, pages, pages, None, None, None, lengths, table, *options)


# ---- recurrent layers ------------------------------------------------------------------------------------------------

DRAWN = {"zoneout": 0.4, "recurrent_dropout": 0.3, "weight_dropout": 0.2}
LSTM = {"peepholes": True, "cell_zoneout": 0.3, "return_cell_states": True}
RAGGED = (3, 0, 2, 3)


def varied(case: rc.Case, **options: Any) -> rc.Case:
    return case.with_(options=tuple(options.items()))


# Each with the device that it runs on: one that holds weights in registers, in shared memory, or nowhere.
REGISTERS, SHARED, STEPS = (0, 0), (2, 0), (2, 18 << 10)
TWO_LAYERS = rc.Case("LSTM", (3, 4, 5, 11), layers=2, bidirectional=True, states=True, lengths=RAGGED, dropout=0.3)
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
)  # fmt: skip


def run_rnn(emulator: simt_tools.Emulator, expected: Traffic | None) -> Traffic:
    found: Traffic = {}
    for case, device in RNN_CASES:
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

RUN = {"norm": run_norm, "attention": run_attention, "rnn": run_rnn}


def child(family: str, emulator: simt_tools.Emulator, mutant: int, expected: Traffic, said: int) -> None:
    """Never returns: the exit status says whether something was caught, and `said` takes the words."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the sanitizers' reports
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time: others may be at work
    emulator.plant(mutant)
    try:
        RUN[family](emulator, expected)
    except Exception as error:
        os.write(said, " ".join(str(error).split())[:200].encode())
        os._exit(3)
    os._exit(0)


def hunt(family: str, emulator: simt_tools.Emulator, mutant: int, expected: Traffic) -> str | None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(family, emulator, mutant, expected, writing)
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
        family = sys.argv[2]
        expected = RUN[family](emulator, None)
        for mutant in map(int, sys.argv[3:]):
            print(json.dumps({"mutant": mutant, "caught": hunt(family, emulator, mutant, expected)}), flush=True)


if __name__ == "__main__":
    main()
