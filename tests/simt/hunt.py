"""Runs the norm kernels in the library with sanitizers and mutation points, and says which planted bugs were caught.

    LD_PRELOAD='libasan.so libstdc++.so' python hunt.py LIBRARY NUMBER...        -1: nothing is planted

Prints a line of JSON a mutant: its number, and what caught it (null if nothing did). Each mutant runs in a forked
child, so that a sanitizer's abort, a segmentation fault or an endless loop ends the child alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import numerics
import simt_tools
import torch

import handtuned

SECONDS = 60  # of a mutant; whole runs take about two
F64, BF16 = torch.float64, torch.bfloat16
LAYER, RMS, ADD_LAYER, ADD_RMS = cases.FORMS
DROP_LAYER, DROP_RMS = cases.DROPOUTS

# Few and small, but every branch of every kernel: packs and elements, short rows and rows of several warps, rows held
# in registers, in shared memory and nowhere, every option and its absence.
CASES = (
    DROP_LAYER.with_(shape=(35, 72)),
    DROP_LAYER.with_(shape=(3, 1337), dtype=BF16, weight_dtype=torch.float32),
    DROP_RMS.with_(shape=(5, 136), dtype=torch.float16, layout="sliced"),
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


def run(emulator: simt_tools.Emulator, expected: dict[str, Any] | None) -> dict[str, Any]:
    """Raises at the first wrong result; with `expected`, also where memory was touched more or less often."""
    found: dict[str, Any] = {}
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
        traffic = [emulator.counts.bytes_loaded, emulator.counts.bytes_stored]
        assert expected is None or traffic == expected[case.name], f"{case.name}: other memory traffic"
        found[case.name] = traffic
    partial_gradients()
    return found


def child(emulator: simt_tools.Emulator, mutant: int, expected: dict[str, Any], said: int) -> None:
    """Never returns: the exit status says whether something was caught, and `said` takes the words."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the sanitizers' reports
    signal.alarm(SECONDS)
    emulator.plant(mutant)
    try:
        run(emulator, expected)
    except Exception as error:
        os.write(said, " ".join(str(error).split())[:200].encode())
        os._exit(3)
    os._exit(0)


def hunt(emulator: simt_tools.Emulator, mutant: int, expected: dict[str, Any]) -> str | None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(emulator, mutant, expected, writing)
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
        expected = run(emulator, None)
        for mutant in map(int, sys.argv[2:]):
            print(json.dumps({"mutant": mutant, "caught": hunt(emulator, mutant, expected)}), flush=True)


if __name__ == "__main__":
    main()
