"""What holds exactly: dropout's mask, the same bits on any thread count, rows and strides that change nothing.

Hypothesis draws shapes, strides and dtypes; the comparisons are of bits, so no tolerance hides a mistake.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cases
import hypothesis
import hypothesis.strategies as st
import numerics
import pytest
import torch
from torch import Tensor

import handtuned
from handtuned import ops, reference
from handtuned.nn import functional as H
from handtuned.reference.norm import philox4x32

pytestmark = pytest.mark.usefixtures("poison")

drawn = hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bits, so that NaN equals itself and 0 differs from -0."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and a.contiguous().view(width).equal(b.contiguous().view(width))


def everything(case: cases.Case, t: cases.Tensors) -> dict[str, Tensor]:
    """Outputs and gradients of the kernels in force; dropout always with the same seed."""
    leaves = t.leaves()
    torch.manual_seed(7)
    return cases.results(cases.run(case, leaves), leaves, t)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not same_bits(actual[name], expected[name])]
    assert not different, f"other bits in {different}"


# ---- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
    ids=["zeros", "ones"],
)
def test_philox_known_answers(counter: int, key: int, expected: tuple[int, ...]) -> None:
    """The vectors published with Random123 (Salmon et al. 2011)."""
    words = philox4x32([torch.tensor([counter])] * 4, (key, key))
    assert tuple(int(word) for word in words) == expected


def observed_factor(kind: str, shape: tuple[int, ...], p: float, seed: int) -> Tensor:
    """What an op multiplies its input with: new_residual of ones on zeros."""
    extra = (None, None) if kind == "layer" else (None,)
    op = getattr(ops, f"add_{kind}_norm")
    ones, zeros = torch.ones(shape), torch.zeros(shape)
    factor: Tensor = op(ones, zeros, 1, *extra, 1e-5, p, torch.tensor([seed]))[1]
    return factor


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_mask_is_the_references_bit_for_bit(kernels: str, seed: int) -> None:
    for shape, p in (((7, 200), 0.5), ((300, 129), 0.1), ((1, 1), 0.9), ((2, 3, 65), 0.25)):
        if kernels == "triton" and shape[0] > 10:
            continue  # half a minute in its interpreter; test_triton_norm.py has the mask
        expected = reference.dropout_factor(torch.Size(shape), 1, p, torch.tensor([seed]), torch.float32)
        for threads in (1, 2, 4) if kernels not in ("simt", "triton", "reference") else (1,):
            torch.set_num_threads(threads)
            for kind in ("layer", "rms"):
                assert same_bits(observed_factor(kind, shape, p, seed), expected)


def test_mask_beyond_2_to_the_32_rows_differs() -> None:
    """The row's high word enters the counter, so rows 2^32 apart have masks of their own."""
    zero, one = torch.tensor([0]), torch.tensor([1])
    assert philox4x32([zero, zero, zero, zero], (5, 0)) != philox4x32([zero, zero, one, zero], (5, 0))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_fraction_kept(kernels: str, p: float) -> None:
    shape = (30, 130) if kernels in ("triton", "simt") else (500, 1000)
    x = torch.ones(shape)
    h = H.add_rms_norm(x, torch.zeros(shape), shape[1:], dropout_p=p)[1]
    kept = (h != 0).double()
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 5 * sigma
    for dim in (0, 1):  # and along every row and column
        n = kept.shape[dim]
        assert ((kept.mean(dim) - (1 - p)).abs() < 6 * (p * (1 - p) / n) ** 0.5).all()
    assert h[h != 0].unique().tolist() == [torch.tensor(1 / (1 - p)).item()]


def test_seeds_reproduce_and_differ(kernels: str) -> None:
    x, r = torch.randn(9, 70), torch.randn(9, 70)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return H.add_layer_norm(x, r, (70,), dropout_p=0.5)[1]

    first = draw(1)
    second = H.add_layer_norm(x, r, (70,), dropout_p=0.5)[1]
    assert same_bits(draw(1), first)
    assert same_bits(H.add_layer_norm(x, r, (70,), dropout_p=0.5)[1], second)
    for other in (second, draw(2)):
        assert 0.3 < (other != first).double().mean() < 0.7


def test_p_0_1_and_eval(kernels: str) -> None:
    x, r, w = torch.randn(5, 33), torch.randn(5, 33), torch.randn(33)
    state = torch.get_rng_state()
    plain = H.add_layer_norm(x, r, (33,), w)
    evaluated = H.add_layer_norm(x, r, (33,), w, dropout_p=0.7, training=False)
    assert torch.get_rng_state().equal(state)
    assert all(map(same_bits, plain, evaluated))
    assert same_bits(plain[1], x + r)
    x[0, 0], x.requires_grad = float("nan"), True
    output, h = H.add_layer_norm(x, r, (33,), w, dropout_p=1.0)
    assert h[0, 0].isnan()  # as in torch, nothing else is left of the input
    assert same_bits(h[1:], r[1:])
    (grad,) = torch.autograd.grad(output[1:].sum() + h.sum(), x)
    assert (grad[1:] == 0).all()


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_backward_uses_the_forwards_mask(kernels: str, kind: str) -> None:
    x = torch.randn(8, 129).add(3).requires_grad_()
    r = torch.zeros(8, 129, requires_grad=True)
    output, h = getattr(H, f"add_{kind}_norm")(x, r, (129,), dropout_p=0.4)
    torch.rand(5)  # what happens to the generator in between does not matter
    grad_x, grad_r = torch.autograd.grad(output.square().sum() + h.sum(), (x, r))
    keep = h != 0
    assert 0.4 < keep.double().mean() < 0.8
    assert ((grad_x != 0) == keep).all()
    torch.testing.assert_close(grad_x, grad_r * keep / 0.6)


# ---- determinism ---------------------------------------------------------------------------------------------------

LARGE = [form.with_(shape=(1501, 257)) for form in cases.FORMS + cases.DROPOUTS]
LARGE += [form.with_(shape=(2100, 1024), dtype=torch.bfloat16) for form in cases.DROPOUTS]
LARGE += [cases.FORMS[0].with_(shape=(70, 16384)), cases.FORMS[2].with_(shape=(30, 50, 257), layout="transposed")]


@pytest.mark.cases(LARGE)
def test_same_bits_for_any_number_of_threads(isa: str, case: cases.Case) -> None:
    t = cases.tensors(case)
    torch.set_num_threads(1)
    expected = everything(case, t)
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        assert_same_bits(everything(case, t), expected)


@pytest.mark.cases([form.with_(shape=(13, 65)) for form in cases.FORMS + cases.DROPOUTS])
def test_same_bits_twice(kernels: str, case: cases.Case) -> None:
    t = cases.tensors(case)
    assert_same_bits(everything(case, t), everything(case, t))


@pytest.mark.cases([f.with_(shape=(97, 250), dtype=d) for f in cases.FORMS + cases.DROPOUTS for d in cases.SHORT])
def test_instruction_sets_agree_within_rounding(isa: str, case: cases.Case) -> None:
    """Against the generic kernels: sums in another order, so a few roundings, never more."""
    t = cases.tensors(case)
    actual = everything(case, t)
    with handtuned.testing.isa("generic"):
        expected = everything(case, t)
    for name, want in expected.items():
        gap = (actual[name].double() - want.double()).abs().max().item()
        assert gap <= 4 * torch.finfo(want.dtype).eps * want.double().abs().max().item(), name


@pytest.mark.parametrize("pool", [1, 2], ids=["one_torch_thread", "two_torch_threads"])
def test_calls_from_several_python_threads(isa: str, pool: int) -> None:
    torch.set_num_threads(pool)
    case = cases.FORMS[2].with_(shape=(400, 257))
    inputs = [cases.tensors(case, draw) for draw in range(8)]

    def call(t: cases.Tensors) -> dict[str, Tensor]:
        leaves = t.leaves()
        return cases.results(cases.run(case, leaves), leaves, t)

    expected = [call(t) for t in inputs]
    with ThreadPoolExecutor(4) as threads:
        for actual, wanted in zip(threads.map(call, inputs * 3), expected * 3, strict=True):
            assert_same_bits(actual, wanted)


# ---- hypothesis: shapes, strides, dtypes ---------------------------------------------------------------------------


@st.composite
def any_case(draw: st.DrawFn) -> cases.Case:
    form = draw(st.sampled_from(cases.FORMS + cases.DROPOUTS))
    outer = draw(st.lists(st.integers(0, 6), min_size=2, max_size=4))
    cols = draw(st.one_of(st.integers(1, 300), st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 4095, 4097, 9000])))
    dtype = draw(st.sampled_from(list(cases.SHORT)))
    narrow = dtype in (torch.bfloat16, torch.float16)
    return form.with_(
        shape=(*outer, cols),
        dtype=dtype,
        weight_dtype=draw(st.sampled_from([None, torch.float32])) if narrow else None,
        affine=draw(st.sampled_from(["both", "weight", "bias", "none"])),
        normalized_ndim=draw(st.integers(1, 2)),
        layout=draw(st.sampled_from(list(cases.LAYOUTS))),
    )


def contiguous(t: cases.Tensors) -> cases.Tensors:
    return cases.Tensors(**{name: v if v is None else v.contiguous() for name, v in vars(t).items()})


@drawn
@hypothesis.given(case=any_case())
def test_strides_change_no_bit(isa: str, case: cases.Case) -> None:
    t = cases.tensors(case)
    assert_same_bits(everything(case, t), everything(case, contiguous(t)))


@drawn
@hypothesis.given(case=any_case())
def test_no_error_is_larger_than_a_few_roundings(isa: str, case: cases.Case) -> None:
    """Forward only, in units that no conditioning enlarges: rounding of the output, and of its parts."""
    t = cases.tensors(case)
    torch.manual_seed(7)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    truth = numerics.exact(case, t, numerics.keep_mask(case, seed)) if case.elements and case.cols else {}
    outputs = everything(case, t)
    for name in truth.keys() & {"output", "new_residual"} if case.cols > 8 else ():
        error = abs(numerics.wide(outputs[name]) - truth[name]).max()
        eps = torch.finfo(case.dtype).eps
        assert error <= 16 * eps * max(abs(truth[name]).max(), 1), name


@drawn
@hypothesis.given(case=any_case(), data=st.data())
def test_a_row_does_not_depend_on_the_others(isa: str, case: cases.Case, data: st.DataObject) -> None:
    """Row i of a batch has the bits of the same row computed alone (dropout counts rows, so without)."""
    case = case.with_(dropout=0.0, layout="contiguous", normalized_ndim=1)
    rows = case.elements // max(case.cols, 1)
    hypothesis.assume(rows > 0)
    t = cases.tensors(case)
    i = data.draw(st.integers(0, rows - 1))
    per_row = ("input", "residual", "grad_output", "grad_new_residual")

    def row(name: str, value: Tensor | None) -> Tensor | None:
        return value.reshape(rows, case.cols)[i : i + 1] if value is not None and name in per_row else value

    alone = cases.Tensors(**{name: row(name, value) for name, value in vars(t).items()})
    batch, single = everything(case, t), everything(case.with_(shape=(1, case.cols)), alone)
    for name in batch.keys() & {"output", "new_residual", "grad_input", "grad_residual"}:
        assert same_bits(batch[name].reshape(rows, case.cols)[i : i + 1], single[name]), name
