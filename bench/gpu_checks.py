"""What the GPU check holds the kernels to: the tests' cases on the device against float64, how far they are from the
emulator's result for the same tensors, and what a device alone can show: the same bits twice, and from a CUDA graph."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import attention_cases as ac
import attention_numerics as an
import cases
import numerics
import rnn_cases as rc
import simt_tools
import torch
from torch import Tensor

from .gpu_device import Device
from .gpu_rows import Job, Row

MOST_ELEMENTS = 20_000  # what the emulator needs a tenth of a second for
# Layers whose barrier is of several blocks on a large device too, and whose weights are in registers and beside them.
WIDE_LAYERS = (rc.Case("LSTM", (3, 3, 5, 520)), rc.Case("LSTM", (2, 1, 1, 1800), proj=8, bias=False))
RUNS = 20  # that must have the same bits
BF16 = torch.bfloat16

# ---- results of the device -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fixed_seed(seed: Tensor) -> Iterator[None]:
    """Dropout draws this Philox key, on whatever device."""
    from handtuned.nn.functional import attention, norm, recurrent

    modules = (attention, norm, recurrent)
    before = norm._draw_seed
    for module in modules:
        module._draw_seed = lambda input: seed.to(input.device)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module._draw_seed = before  # type: ignore[attr-defined]


def moved(value: Any, device: torch.device) -> Any:
    """A tensor on the device, with its strides; anything else as it is."""
    if not isinstance(value, Tensor) or device.type == "cpu":
        return value
    if 0 in value.stride():
        return value.to(device)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


def all_moved(tensors: Any, device: torch.device) -> Any:
    """A dataclass of tensors."""
    return replace(tensors, **{f.name: moved(getattr(tensors, f.name), device) for f in fields(tensors)})


def layer_moved(t: rc.Tensors, device: torch.device) -> rc.Tensors:
    """Lengths stay on the CPU."""
    there: rc.Tensors = all_moved(t, device)
    return replace(there, weights=tuple(moved(weight, device) for weight in t.weights), lengths=t.lengths)


def norm_results(case: cases.Case, t: cases.Tensors, device: torch.device) -> dict[str, Tensor]:
    """Outputs and gradients, on the CPU."""
    there = all_moved(t, device)
    leaves = there.leaves()
    return {name: v.cpu() for name, v in cases.results(cases.run(case, leaves), leaves, there).items()}


def attention_results(case: ac.Case, t: ac.Tensors, device: torch.device) -> dict[str, Tensor]:
    """Likewise."""
    return {name: v.cpu() for name, v in ac.results(case, all_moved(t, device)).items()}


def rnn_results(case: rc.Case, t: rc.Tensors, device: torch.device) -> dict[str, Tensor]:
    """Likewise."""
    return {name: v.cpu() for name, v in rc.results(case, layer_moved(t, device)).items()}


Results = Callable[[torch.device], dict[str, Tensor]]


def compared(row: Row, results: Results, backend: str, device: Device) -> dict[str, Tensor]:
    """Results of the device; the row says how far they are from the emulator's."""
    with fixed_seed(numerics.draw_seed(0)):
        with device.kernels(backend):
            found = results(device.torch_device)
        if not simt_tools.LIBRARY.exists():
            row.figures[FROM_EMULATOR] = None
            return found
        with simt_tools.emulated():
            emulated = results(torch.device("cpu"))
    most = 0.0
    for name, tensor in found.items():
        wanted, actual = emulated[name].double(), tensor.double()
        finite = wanted.isfinite()
        if finite.any():
            unit = torch.finfo(tensor.dtype).eps * (float(wanted[finite].abs().max()) or 1.0)
            distance = float((actual - wanted)[finite].abs().max()) / unit
            most = distance if not distance <= most else most
    row.figures[FROM_EMULATOR] = round(most, 2) if math.isfinite(most) else str(most)
    return found


FROM_EMULATOR = "from the emulator, eps of the largest value"


# ---- against float64 -------------------------------------------------------------------------------------------------


def check_norm(case: cases.Case, backend: str, device: Device, row: Row) -> None:
    drawn = numerics.drawn(case, 0)
    wrong = []
    for name, tensor in compared(row, partial(norm_results, case, drawn.tensors), backend, device).items():
        torchs, eps = drawn.torchs[name], torch.finfo(tensor.dtype).eps
        numerics.check_same_non_finite(name, tensor, torchs)
        if not torchs.isfinite().all():
            continue
        errors = numerics.Errors(eps, slack=4 * eps)  # one draw says little
        errors.add(tensor, torchs, drawn.truth[name])
        if excess := errors.excess():
            wrong.append(f"{name}: {excess}")
    assert not wrong, "; ".join(wrong)


def check_attention(case: ac.Case, backend: str, device: Device, row: Row) -> None:
    drawn = an.drawn(case, 0)
    found = compared(row, partial(attention_results, case, drawn.tensors), backend, device)
    an.check_every_element(case, found, drawn.truth, pairs=an.on_gpu(case.dtype))


def check_rnn(case: rc.Case, backend: str, device: Device, row: Row) -> None:
    """Errors against float64 in units of the type, of a whole tensor's largest value: gates round on every step."""
    t = rc.tensors(case)
    with fixed_seed(numerics.draw_seed(0)):
        truth = rc.exact(case, t)
    wrong = []
    for name, tensor in compared(row, partial(rnn_results, case, t), backend, device).items():
        unit = torch.finfo(tensor.dtype).eps * max(1.0, float(truth[name].abs().max()))
        error = float((tensor.double() - truth[name]).abs().max()) / unit
        if not error <= 32:
            wrong.append(f"{name}: {error:.0f} eps of the largest value")
    assert not wrong, "; ".join(wrong)


# ---- what a device alone can show ------------------------------------------------------------------------------------


def subjects(device: Device) -> tuple[cases.Case, ac.Case, rc.Case]:
    """One of each family, small in a dry run."""
    norm = cases.DROPOUTS[0].with_(shape=(300, 1000), dtype=BF16)
    attention = ac.Case((2, 4, 130, 300, 64), kv_heads=2, dtype=BF16, causal=True, dropout=0.1)
    layer = rc.Case("LSTM", (7, 20, 30, 200), states=True, dtype=BF16)
    if device.measures:
        return norm, attention, layer
    return norm.with_(shape=(5, 136)), attention.with_(shape=(1, 2, 20, 30, 16)), layer.with_(shape=(3, 4, 5, 21))


def same_bits(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, wanted, strict=True))


def check_twice(family: str, backend: str, device: Device, row: Row) -> None:
    """No atomics, no order that is not fixed: every run has the bits of the first."""
    norm, attention, layer = subjects(device)
    results: dict[str, Results] = {
        "norm": partial(norm_results, norm, cases.tensors(norm)),
        "attention": partial(attention_results, attention, ac.tensors(attention)),
        "rnn": partial(rnn_results, layer, rc.tensors(layer)),
    }
    runs = RUNS if device.measures else 1
    with fixed_seed(numerics.draw_seed(0)), device.kernels(backend):
        bits = [results[family](device.torch_device).values() for _ in range(1 + runs)]
    different = sum(not same_bits(found, bits[0]) for found in bits)
    assert not different, f"{different} of {runs} runs have other bits"


def check_graph(family: str, backend: str, device: Device, row: Row) -> None:
    """The forward, captured on a stream that is not the default one: nothing may wait for the device there."""
    if device.torch_device.type != "cuda":
        raise LookupError("CUDA graphs need a CUDA device")
    norm, attention, layer = subjects(device)
    there = {
        "norm": all_moved(cases.tensors(norm), device.torch_device),
        "attention": all_moved(ac.tensors(attention), device.torch_device),
        "rnn": layer_moved(rc.tensors(layer), device.torch_device),
    }
    forward: Callable[[], tuple[Tensor, ...]] = {
        "norm": lambda: cases.run(norm, there["norm"].leaves()),
        "attention": lambda: ac.run(attention, there["attention"]),
        "rnn": lambda: rc.run(layer, there["rnn"]),
    }[family]
    with fixed_seed(numerics.draw_seed(0).to(device.torch_device)), device.kernels(backend), torch.no_grad():
        wanted = [tensor.clone() for tensor in forward()]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            given = forward()
        graph.replay()
        found = [tensor.clone() for tensor in given]
    assert same_bits(found, wanted), "a replayed graph gives something else"


def jobs(device: Device, quick: bool) -> list[Job]:
    norms = [case for case in cases.CASES if case.elements <= MOST_ELEMENTS]
    attentions = [case for case in ac.CASES if case.elements <= MOST_ELEMENTS]
    layers = [*(case for case in rc.CASES if case.elements <= MOST_ELEMENTS), *WIDE_LAYERS]
    found: list[Job] = []

    def add(family: str, name: str, backend: str, work: Callable[..., None], subject: Any) -> None:
        found.append(Job(Row("check", family, name, backend), partial(work, subject, backend, device)))

    for backend in ("cuda", "triton"):
        for case in norms[:: 8 if quick else 1]:
            add("norm", case.name, backend, check_norm, case)
        for one in attentions[:: 31 if quick else 1]:
            add("attention", one.name, backend, check_attention, one)
        for layer in layers[:: 10 if quick else 1]:
            add("rnn", layer.name, backend, check_rnn, layer)
        for family in ("norm", "attention", "rnn"):
            add(family, "the same bits in every run", backend, check_twice, family)
            add(family, "replayed from a CUDA graph", backend, check_graph, family)
    return found
