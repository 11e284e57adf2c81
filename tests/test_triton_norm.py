"""What is particular to the Triton norms: bounds against float64 in the interpreter with guard bands, the dropout mask
against a plain Philox, fixed bits of dgamma and dbeta. Budgets: test_triton_budgets.py."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton_tools
from handtuned.triton_kernels import common, norm, tuning
from handtuned.triton_kernels.common import keep_factor
from torch import Tensor

triton_tools.mend_bfloat16()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
SEED = -0x123456789ABCDEF0  # high bits set
EPS = 1e-5


# ---- float64 formulas ------------------------------------------------------------------------------------------------


def philox4x32(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox4x32-10 as in the paper, on uint64 arrays that hold 32-bit words."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & mask,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def expected_mask(rows: np.ndarray, cols: np.ndarray, p: float, seed: int) -> Tensor:
    """True where kept, [rows, cols]."""
    row, col = np.meshgrid(rows.astype(np.uint64), cols.astype(np.uint64), indexing="ij")
    counter = [col // 128 * 16 + col % 16, row & np.uint64(0xFFFFFFFF), row >> np.uint64(32), np.zeros_like(row)]
    words = np.stack(philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)))
    numbers = np.stack([half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))])
    number = np.take_along_axis(numbers, (col // 16 % 8)[None].astype(np.int64), 0)[0]
    return torch.from_numpy(number >= math.floor(p * 65536 + 0.5)).to(DEVICE)


class Formula:
    """y and all gradients of rows h in float64; each value has a twin: the sum of the magnitudes it is made of."""

    def __init__(self, h: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool) -> None:
        self.h, self.centred = h.double(), centred
        self.w = torch.ones(h.shape[1], dtype=torch.float64) if weight is None else weight.double().flatten()
        b = torch.zeros(h.shape[1], dtype=torch.float64) if bias is None else bias.double().flatten()
        self.mean = self.h.mean(1, keepdim=True) if centred else torch.zeros(h.shape[0], 1, dtype=torch.float64)
        self.rstd = 1 / torch.sqrt(((self.h - self.mean) ** 2).mean(1, keepdim=True) + EPS)
        self.xhat = (self.h - self.mean) * self.rstd
        self.size = (self.h.abs() + self.mean.abs()) * self.rstd
        self.y = (self.xhat * self.w + b, self.size * self.w.abs() + b.abs())

    def backward(self, dy: Tensor, extra: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        dy = dy.double()
        g, size = dy * self.w, (dy * self.w).abs()
        dh = g - self.xhat * (g * self.xhat).mean(1, keepdim=True)
        dh_size = size + self.size * (size * self.size).mean(1, keepdim=True)
        if self.centred:
            dh, dh_size = dh - g.mean(1, keepdim=True), dh_size + size.mean(1, keepdim=True)
        dh, dh_size = dh * self.rstd, dh_size * self.rstd
        if extra is not None:
            dh, dh_size = dh + extra.double(), dh_size + extra.double().abs()
        return {
            "h": (dh, dh_size),
            "weight": ((dy * self.xhat).sum(0), (dy.abs() * self.size).sum(0)),
            "bias": (dy.sum(0), dy.abs().sum(0)),
        }


def assert_within(name: str, actual: Tensor, exact: tuple[Tensor, Tensor], scale: float | Tensor = 1.0) -> None:
    """One rounding to the output's dtype, and the accumulation's: some of its ulps of the magnitudes summed."""
    value, size = exact[0] * scale, exact[1] * scale
    unit = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps
    dtype = torch.finfo(actual.dtype)
    bound = 0.501 * dtype.eps * value.abs() + 6 * unit * size + dtype.tiny
    excess = (actual.double().reshape(value.shape) - value).abs() / bound
    assert actual.isfinite().all(), f"{name} holds values that are not finite"
    assert actual.numel() == 0 or excess.max() <= 1.0, f"{name}: error is {excess.max():.2f} times the bound"


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Tensors are made where the kernels run: on the GPU if there is one, else on the CPU for the interpreter."""
    with torch.device(DEVICE):
        yield


# ---- running an op ---------------------------------------------------------------------------------------------------

# shape, normalized_ndim, weight, bias, layout of the activations
CASES = {
    "odd": ((5, 170), 1, True, True, "plain"),
    "one column": ((7, 1), 1, True, True, "plain"),
    "one row": ((129,), 1, True, False, "plain"),
    "two dims, padded rows": ((2, 3, 5, 33), 2, True, True, "padded"),
    "no parameters": ((4, 300), 1, False, False, "padded"),
    "no weight": ((3, 64), 1, False, True, "plain"),
    "elements apart": ((3, 40), 1, True, True, "apart"),
    "rows out of order": ((3, 4, 65), 1, True, True, "permuted"),
    "zero rows": ((2, 0, 16), 1, True, True, "plain"),
}


def laid_out(values: Tensor, normalized_ndim: int, layout: str) -> Tensor:
    """The values in another memory layout, all of it inside and between NaNs."""
    if values.numel() == 0 or layout == "plain":
        return triton_tools.fenced(values) if values.numel() else values
    cols = math.prod(values.shape[values.dim() - normalized_ndim :])
    strides = list(values.stride())
    if layout == "padded":
        strides = [s // cols * (cols + 8) if s >= cols else s for s in strides]
    elif layout == "apart":
        strides = [2 * s for s in strides]
    else:
        return triton_tools.fenced(values.transpose(0, 1).contiguous().transpose(0, 1))
    return triton_tools.fenced(torch.empty_strided(values.shape, strides, dtype=values.dtype).copy_(values))


def run(
    op: str,
    shape: tuple[int, ...],
    ndim: int,
    weight: bool,
    bias: bool,
    layout: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    p: float = 0.3,
    shift: float = 3.0,
) -> None:
    """Forward and backward of one op against the formulas, guard bands around every buffer."""
    torch.manual_seed(0)
    centred, add = "layer" in op, op.startswith("add")
    normalized = shape[len(shape) - ndim :]
    rows, cols = math.prod(shape[: len(shape) - ndim]), math.prod(normalized)

    def activation(offset: float = 0.0) -> Tensor:
        return laid_out((torch.randn(shape) + offset).to(dtype), ndim, layout)

    def flat(t: Tensor) -> Tensor:
        return t.reshape(rows, cols)

    x, residual, dy, extra = activation(shift), activation(), activation(), activation()
    w = triton_tools.fenced(torch.randn(normalized).to(weight_dtype or dtype)) if weight else None
    b = triton_tools.fenced(torch.randn(normalized).to(weight_dtype or dtype)) if bias and centred else None
    seed = torch.tensor([SEED])
    affine = (w, b) if centred else (w,)
    with triton_tools.guarded(common):
        if add:
            out, h, stats = getattr(norm, op)(x, residual, ndim, *affine, EPS, p, seed)
        else:
            (out, stats), h = getattr(norm, op)(x, ndim, *affine, EPS), x
    factor = expected_mask(np.arange(rows), np.arange(cols), p, SEED).double() / (1 - p)
    if add:
        total, size = flat(x).double() * factor + flat(residual).double(), flat(x).double().abs() * factor
        assert_within("new_residual", h, (total, size + flat(residual).double().abs()))
    formula = Formula(flat(h), w, b, centred)
    assert_within("output", out, formula.y)
    assert out.is_contiguous()
    assert out.shape == shape
    assert stats.shape == ((2, rows) if centred else (rows,))
    assert_within("rstd", stats[1] if centred else stats, (formula.rstd[:, 0], formula.rstd[:, 0] * 2))
    if centred:
        assert_within("mean", stats[0], (formula.mean[:, 0], formula.h.abs().mean(1)))
    needs = (True, True, *((True, True) if add else ()), True)[: (5 if add else 3) - (not centred)]
    with triton_tools.guarded(common):
        if add:
            grads = getattr(norm, op + "_backward")(dy, extra, h, ndim, stats, w, p, seed, *needs[: 3 + centred])
            dx, dh, *dwb = grads
        else:
            dh, *dwb = getattr(norm, op + "_backward")(dy, h, ndim, stats, w, *needs)
    exact = formula.backward(flat(dy), flat(extra) if add else None)
    assert_within("grad of h", dh, exact["h"])
    if add:
        assert_within("grad_input", dx, exact["h"], factor)
    for name, grad in zip(("weight", "bias"), dwb, strict=False):
        assert_within(f"grad_{name}", grad, exact[name])
        assert grad.shape == normalized
        assert grad.dtype == (dtype if w is None else w.dtype)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a row, several rows a program, several row blocks a partial sum."""
    monkeypatch.setattr(tuning, "lookup", lambda *_: tuning.Config(128, 2, 4, 1))
    monkeypatch.setattr(norm, "MAX_PARTIALS", 2)


@pytest.fixture(params=("committed tiles", "small tiles"))
def tiles(request: pytest.FixtureRequest) -> None:
    if request.param == "small tiles":
        request.getfixturevalue("small_tiles")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_against_float64(op: str, dtype: torch.dtype, case: str) -> None:
    run(op, *CASES[case], dtype=dtype)


@pytest.mark.parametrize("case", ["odd", "no parameters", "zero rows"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_other_dtypes_against_float64(op: str, dtype: torch.dtype, case: str) -> None:
    run(op, *CASES[case], dtype=dtype)


@pytest.mark.parametrize("case", ["odd", "no parameters"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("small_tiles")
def test_several_tiles_a_row(op: str, dtype: torch.dtype, case: str) -> None:
    run(op, *CASES[case], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_float32_weight_beside_16_bit_input(op: str, dtype: torch.dtype) -> None:
    run(op, *CASES["odd"], dtype=dtype, weight_dtype=torch.float32)


def test_rows_longer_than_the_tile() -> None:
    run("add_layer_norm", (2, 17001), 1, True, True, "plain", dtype=torch.float32)


def test_hundred_thousand_columns() -> None:
    x, dy = torch.randn(1, 100_000), torch.randn(1, 100_000)
    out, stats = norm.layer_norm(x, 1, None, None, EPS)
    formula = Formula(x, None, None, True)
    assert_within("output", out, formula.y)
    dx, _, _ = norm.layer_norm_backward(dy, x, 1, stats, None, True, False, False)
    assert_within("grad_input", dx, formula.backward(dy, None)["h"])


@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
def test_mean_far_from_zero_costs_no_variance(op: str) -> None:
    """E[x^2] - E[x]^2 in float32 would lose every digit of the variance here."""
    run(op, (3, 300), 1, True, True, "plain", dtype=torch.float32, shift=3000.0)


def test_several_rows_of_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than two programs' blocks, and a last program that owns fewer."""
    monkeypatch.setattr(norm, "MAX_PARTIALS", 3)
    run("layer_norm", (101, 66), 1, True, True, "plain", dtype=torch.float32)


@pytest.mark.skipif(DEVICE != "cpu", reason="the sparse file lies in host memory")
def test_row_offsets_are_64_bit(tmp_path: Path) -> None:
    """Two rows more than 2^31 elements apart, in a file that is all hole but for them."""
    apart, cols = 2**31 + 64, 48
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate((apart + cols) * 2)
    buffer = torch.from_file(str(path), shared=True, size=apart + cols, dtype=torch.float16)
    x = buffer.as_strided((2, cols), (apart, 1))
    x.copy_(torch.randn(2, cols))
    out, stats = norm.layer_norm(x, 1, None, None, EPS)
    formula = Formula(x, None, None, True)
    assert_within("output", out, formula.y)
    dx, _, _ = norm.layer_norm_backward(x, x, 1, stats, None, True, False, False)
    assert_within("grad_input", dx, formula.backward(x, None)["h"])


# ---- dropout ---------------------------------------------------------------------------------------------------------


@triton.jit
def keep_kernel(
    seed,
    out,
    first_row: tl.int64,
    start: tl.int64,
    threshold: tl.int64,
    scale: tl.float64,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.arange(0, ROWS).to(tl.int64) + first_row
    factor = keep_factor(seed, row, start, threshold, scale, ROWS, TILE, tl.float32)
    tl.store(out + tl.arange(0, ROWS)[:, None] * TILE + tl.arange(0, TILE)[None, :], factor)


def test_philox_of_this_file_gives_the_published_vectors() -> None:
    full = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((full,) * 4, (full, full), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, words in known:
        found = philox4x32([np.array([c]) for c in counter], key)
        assert " ".join(f"{int(word[0]):08x}" for word in found) == words


@pytest.mark.parametrize(("p", "seed"), [(0.1, 1), (0.5, SEED), (0.999999, -1), (0.3, 2**63 - 1), (0.7, -(2**63))])
@pytest.mark.parametrize(("first_row", "start"), [(0, 0), (2**32 - 2, 128), (5 * 2**32 + 7, 2**20)])
def test_mask_is_philox(p: float, seed: int, first_row: int, start: int) -> None:
    out = torch.empty(4, 256)
    keep_kernel[(1,)](torch.tensor([seed]), out, first_row, start, *common.dropout_constants(p), ROWS=4, TILE=256)
    mask = expected_mask(first_row + np.arange(4), start + np.arange(256), p, seed)
    assert torch.equal(out, mask * torch.tensor(1 / (1 - p), dtype=torch.float32))


@pytest.mark.usefixtures("tiles")
def test_backward_regenerates_the_mask_of_the_forward() -> None:
    shape, p, seed = (5, 200), 0.4, torch.tensor([SEED])
    ones, zeros = torch.ones(shape), torch.zeros(shape)
    _, h, rstd = norm.add_rms_norm(ones, zeros, 1, None, EPS, p, seed)
    dx, dh, _ = norm.add_rms_norm_backward(zeros, ones, h, 1, rstd, None, p, seed, True, True, False)
    assert torch.equal(dh, ones)
    assert torch.equal(dx, h)
    assert torch.equal(h != 0, expected_mask(np.arange(5), np.arange(200), p, SEED))


def test_dropout_one_and_none() -> None:
    x, residual, seed = torch.randn(3, 70), torch.randn(3, 70), torch.tensor([7])
    x[1, 3] = float("nan")
    _, h, _ = norm.add_rms_norm(x, residual, 1, None, EPS, 1.0, seed)
    assert h[1, 3].isnan()
    h[1, 3] = residual[1, 3]
    assert torch.equal(h, residual)
    _, h, rstd = norm.add_rms_norm(residual, residual, 1, None, EPS, 0.0, None)
    assert torch.equal(h, 2 * residual)
    dx, dh, _ = norm.add_rms_norm_backward(x, None, h, 1, rstd, None, 0.0, None, True, False, False)
    assert (dx.shape, dh.shape) == ((0,), (3, 70))


# ---- particulars -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiles")
def test_parameter_gradients_have_the_same_bits_at_every_run() -> None:
    x, dy, w = torch.randn(33, 130), torch.randn(33, 130), torch.randn(130)
    _, stats = norm.layer_norm(x, 1, w, w, EPS)
    first = norm.layer_norm_backward(dy, x, 1, stats, w, True, True, True)
    again = norm.layer_norm_backward(dy, x, 1, stats, w, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = norm.layer_norm_backward(dy, x, 1, stats, w, False, True, False)
    assert [g.shape for g in alone] == [(0,), (130,), (0,)]
    assert torch.equal(alone[1], first[1])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.usefixtures("tiles")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_not_finite_gives_what_torch_gives(name: str, bad: float) -> None:
    x = torch.randn(3, 150)
    x[1, 77] = bad
    torchs = getattr(torch.nn.functional, name)(x, (150,), eps=EPS)
    affine = (None, None) if name == "layer_norm" else (None,)
    ours = getattr(norm, name + "_inference")(x, 1, *affine, EPS)
    torch.testing.assert_close(ours, torchs, equal_nan=True)


def test_only_irregular_rows_are_copied() -> None:
    x = torch.randn(6, 10, 16)
    for regular, stride in ((x, 16), (x[:, :, :9], 16), (x[:, ::2], 32), (x[:1, 2:3], 16), (x[:, 3], 160)):
        rows, found = common.as_rows(regular, 1)
        assert rows.data_ptr() == regular.data_ptr()
        assert found == stride
    assert common.as_rows(torch.randn(1, 16).expand(6, 16), 1)[1] == 0
    for irregular, ndim in ((x[:, :, ::2], 1), (x.transpose(0, 1), 1), (x[:, :9], 1), (x[:, :, :9], 2)):
        rows, found = common.as_rows(irregular, ndim)
        assert rows.data_ptr() != irregular.data_ptr()
        assert found == math.prod(irregular.shape[3 - ndim :])


def test_guard_bands_and_mended_bfloat16_can_fail() -> None:
    def store_outside() -> None:
        with triton_tools.guarded(common):
            buffer = common.empty((8,), torch.zeros(1))
            buffer.as_strided((9,), (1,), buffer.storage_offset())[8] = 0.0

    with pytest.raises(AssertionError, match="after a buffer of 8"):
        store_outside()
    values = torch.cat([torch.randn(1000), torch.tensor([float("inf"), float("nan"), 1.00390625, -0.0, 3.4e38])])
    bits = torch.from_numpy(triton_tools.bfloat16_bits(values.cpu().numpy()).view(np.int16))
    torch.testing.assert_close(bits.view(torch.bfloat16), values.cpu().bfloat16(), rtol=0, atol=0, equal_nan=True)
