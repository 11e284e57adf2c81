"""Values of the norm family on every set of kernels: the numerics contract, values that overflow, non-finite values,
memory that is poisoned, offsets beyond 2^31, and memory that stays flat."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cases
import numerics
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import handtuned
from handtuned.nn import functional as H

pytestmark = pytest.mark.usefixtures("poison")
EVERY_FORM = [form.with_(shape=(6, 37)) for form in cases.FORMS + cases.DROPOUTS]
FORMS_IN_BOTH_WIDTHS = [c.with_(dtype=dtype) for c in EVERY_FORM for dtype in (torch.float32, torch.bfloat16)]
NON_FINITE = [float("nan"), float("inf"), float("-inf")]


# ---- the tests' own tools --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [5, 3_000_000], ids=["small", "huge_pages"])
def test_poison_is_visible(elements: int) -> None:
    """What ops allocate with (aoti_torch_empty_strided) comes back as NaN, and so does torch.empty."""
    assert torch.empty(elements).isnan().all()
    assert torch.empty(elements, dtype=torch.bfloat16)[1::2].isnan().all()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    size, stride, handle, data = (
        (ctypes.c_int64 * 1)(elements),
        (ctypes.c_int64 * 1)(1),
        ctypes.c_void_p(),
        ctypes.c_void_p(),
    )
    float32, cpu = ctypes.c_int32(6), ctypes.c_int32(0)
    status = library.aoti_torch_empty_strided(
        ctypes.c_int64(1), size, stride, float32, cpu, ctypes.c_int32(0), ctypes.byref(handle)
    )
    assert status == 0
    try:
        library.aoti_torch_get_data_ptr(handle, ctypes.byref(data))
        values = np.ctypeslib.as_array((ctypes.c_float * elements).from_address(data.value))
        assert np.isnan(values).all()
    finally:
        library.aoti_torch_delete_tensor_object(handle)


@pytest.mark.parametrize("case", EVERY_FORM, ids=lambda c: c.name)
def test_the_bounds_formula_is_torchs(case: cases.Case) -> None:
    """numerics.exact agrees with torch's autograd in float64, far below any float32 rounding."""
    case = case.with_(dtype=torch.float64)
    d = numerics.drawn(case, 0)
    for name, truth in d.truth.items():
        np.testing.assert_allclose(
            d.torchs[name].numpy(), truth.astype(np.float64), rtol=1e-11, atol=1e-12, err_msg=name
        )


@pytest.mark.parametrize("dtype", cases.SHORT, ids=cases.SHORT.get)
@pytest.mark.parametrize(
    "spoil",
    [lambda t: t * (1 + 4 * torch.finfo(t.dtype).eps), lambda t: t.index_fill(-1, torch.tensor([0]), 0.0)],
    ids=["scaled_by_4_eps", "one_column_lost"],
)
def test_the_bound_catches(
    dtype: torch.dtype, spoil: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound must be able to fail: by four roundings, or by a column."""
    case = cases.FORMS[0].with_(shape=(37, 100), dtype=dtype)
    numerics.check_contract(case)
    results = cases.results
    numerics.drawn(case, 0)
    spoiled = lambda *args: {name: spoil(t) for name, t in results(*args).items()}  # noqa: E731
    for draw in range(numerics.draws(case)):
        numerics.drawn(case, draw)  # torch's results, unspoiled
    monkeypatch.setattr(cases, "results", spoiled)
    with pytest.raises(AssertionError, match=r"grad_weight.*allowed") as caught:
        numerics.check_contract(case)
    for name in ("output", "grad_input", "grad_bias"):
        assert name in str(caught.value)


@contextmanager
def _unpoisoned() -> Iterator[None]:
    """For an output too large to be filled twice."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    switch = ctypes.c_bool.in_dll(library, "FLAGS_caffe2_cpu_allocator_do_junk_fill")
    switch.value = False
    try:
        yield
    finally:
        switch.value = True


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.cases(cases.CASES)
def test_numerics_contract(kernels: str, case: cases.Case) -> None:
    numerics.check_contract(case, kernels)


@pytest.mark.parametrize("dtype", cases.SHORT, ids=cases.SHORT.get)
def test_rms_norm_default_eps_is_torchs(kernels: str, dtype: torch.dtype) -> None:
    """The epsilon of float32 (float64 for float64), on values so small that eps rules the result."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(4, 15).mul(eps**0.5 / 4).to(dtype)
    wide = numerics.wide(x).astype(np.longdouble)
    expected = torch.from_numpy((wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps)).astype(np.float64))
    for actual in (H.rms_norm(x, (15,)), F.rms_norm(x, (15,)), H.add_rms_norm(x, torch.zeros_like(x), (15,))[0]):
        error = (actual.double() - expected).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.cases([c for c in cases.CASES if not c.dropout and c.elements < 20_000], triton=EVERY_FORM)
def test_same_bits_without_gradient(kernels: str, case: cases.Case) -> None:
    """Another op may serve where no gradient is wanted, with the same results."""
    leaves = cases.tensors(case).leaves()
    recorded = cases.run(case, leaves)
    with torch.no_grad():
        plain = cases.run(case, leaves)
    for a, b in zip(recorded, plain, strict=True):
        assert not b.requires_grad
        torch.testing.assert_close(b, a.detach(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.cases(EVERY_FORM)
def test_results_are_contiguous_and_own_their_memory(kernels: str, case: cases.Case) -> None:
    t = cases.tensors(case.with_(layout="sliced"))
    arguments = {name: leaf.detach() for name, leaf in t.leaves().items()}
    before = {name: a.clone() for name, a in arguments.items()}
    outputs = cases.run(case, arguments)
    pointers = {a.untyped_storage().data_ptr() for a in arguments.values()}
    for output in outputs:
        assert output.is_contiguous()
        assert output.untyped_storage().data_ptr() not in pointers
    for name, a in arguments.items():
        assert a.equal(before[name]), f"{name} was written to"


def _with_value(t: cases.Tensors, where: str, value: float) -> cases.Tensors:
    """A copy with `value` in the first row (or element 5 of a parameter)."""
    tensor = getattr(t, where).clone()
    tensor.view(-1)[5] = value
    return cases.Tensors(**{**vars(t), where: tensor})


PLACES = ["input", "residual", "weight", "bias", "grad_output", "grad_new_residual"]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.cases(FORMS_IN_BOTH_WIDTHS, triton=FORMS_IN_BOTH_WIDTHS[::3])
def test_non_finite_values_give_what_torch_gives(kernels: str, case: cases.Case, where: str) -> None:
    """NaN and infinities come out where torch's do, and every other value is torch's.

    An infinite gradient makes all of its row non-finite. Which of its elements are NaN and which infinite depends, in
    torch too, on the order in which the terms are added, so there only the places are compared.
    """
    if getattr(cases.tensors(case), where) is None:
        return  # this form has no such tensor
    keep = numerics.keep_mask(case, numerics.draw_seed(0))
    for value in NON_FINITE:
        t = _with_value(cases.tensors(case), where, value)
        leaves = t.leaves()
        torchs = cases.results(cases.run_torch(case, leaves, numerics.torch_factor(case, keep)), leaves, t)
        numerics.draw_seed(0)
        ours = cases.results(cases.run(case, leaves), leaves, t)
        for name, expected in torchs.items():
            summed = name in ("grad_input", "grad_residual") and where in ("weight", "grad_output")
            numerics.check_same_non_finite(f"{name}, {where} {value}", ours[name], expected, kinds=not summed)
            a, b = ours[name].nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0)
            tolerance = 16 * torch.finfo(expected.dtype).eps * max(b.abs().max().item(), 1)
            torch.testing.assert_close(
                a, b, rtol=0, atol=tolerance, msg=lambda m, n=name, v=value: f"{n}, {where} {v}: {m}"
            )


@pytest.mark.cases(
    [form.with_(shape=(4, 65), dtype=dtype) for form in cases.FORMS for dtype in (torch.float16, torch.float32)]
)
def test_a_non_finite_row_stays_alone(kernels: str, case: cases.Case) -> None:
    """Rows share nothing but the parameters: a NaN in one changes no bit of the others' outputs and input gradients."""
    clean, dirty = cases.tensors(case), _with_value(cases.tensors(case), "input", float("nan"))
    found = []
    for t in (clean, dirty):
        leaves = t.leaves()
        found.append(cases.results(cases.run(case, leaves), leaves, t))
    for name in ("output", "grad_input"):
        assert found[1][name][0].isnan().all()
        assert found[1][name][1:].equal(found[0][name][1:])


# ---- sizes -----------------------------------------------------------------------------------------------------------


FAR = 2**31 + 8


@pytest.mark.parametrize(
    ("shape", "strides"), [((2, 100), (FAR, 1)), ((2, 3, 100), (FAR, 1000, 1)), ((3, 2, 100), (1000, FAR, 1))], ids=str
)
def test_offsets_beyond_2_to_the_31(isa: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Rows more than 2^31 elements apart, in memory that is only reserved but for those rows."""
    reserved = torch.from_numpy(np.empty(FAR + 20000, dtype=np.uint16)).view(torch.bfloat16)
    far = [reserved.as_strided(shape, strides, 4000 * i) for i in range(4)]
    for t in far:
        t.copy_(torch.randn(shape))
    weight = torch.linspace(0.5, 2, shape[-1], dtype=torch.bfloat16)
    results = []
    for x, r, dy, dh in (far, [t.clone(memory_format=torch.contiguous_format) for t in far]):
        y, h, _ = handtuned.ops.add_layer_norm(x, r, 1, weight, weight, 1e-5, 0.0, None)
        y2, stats = handtuned.ops.layer_norm(x, 1, weight, weight, 1e-5)
        grads = handtuned.ops.add_layer_norm_backward(dy, dh, x, 1, stats, weight, 0.0, None, True, True, True, True)
        results.append((y, h, y2, stats, *grads))
    for strided, dense in zip(*results, strict=True):
        assert strided.equal(dense)
        assert dense.isfinite().all()


def test_more_than_2_to_the_31_elements() -> None:
    """One run over 2^31 elements and more: an expanded input (4 KB) and an output of 4 GiB."""
    rows, cols = 2**20 + 3, 2048
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0])
    if free < 6 * 2**20:
        pytest.skip(f"needs 6 GiB of free memory, {free / 2**20:.1f} GiB are free")
    x = torch.randn(cols).to(torch.bfloat16)
    with _unpoisoned():
        output, rstd = handtuned.ops.rms_norm(x.expand(rows, cols), 1, None, 1e-6)
    expected, expected_rstd = handtuned.ops.rms_norm(x, 1, None, 1e-6)
    assert (rstd == expected_rstd).all()
    for row in (0, 2**19, 2**20 - 1, 2**20, 2**20 + 2):
        assert output[row].equal(expected)


def test_memory_stays_flat() -> None:
    """1000 forward and backward passes over changing shapes in a fresh process."""
    program = """
import gc, torch
from handtuned.nn import functional as H
torch.manual_seed(0)
def rss():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def call(i):
    rows, cols = 1 + i * 37 % 97, 1 + i * 53 % 400
    x, r = (torch.randn(rows, cols, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(cols, requires_grad=True) for _ in range(2))
    y, h = H.add_layer_norm(x, r, (cols,), w, b, dropout_p=0.1)
    z = H.rms_norm(H.layer_norm(y, (cols,), w, b), (cols,), w)
    u, v = H.add_rms_norm(z, h, (cols,), w, dropout_p=0.1)
    (u.sum() + v.sum()).backward()
for i in range(300): call(i)
before = rss()
for i in range(1000): call(i)
print(rss() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    # One leaked 100 x 200 tensor in every call would be 80 MB.
    assert int(done.stdout) < 4 << 20, f"{int(done.stdout)} bytes more after 1000 calls"
