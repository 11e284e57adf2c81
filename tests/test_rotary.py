"""The rotary ops on every set of kernels: rotation and its gradient, and what goes into a cache."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from test_norm_properties import same_bits
from test_ops import error_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import handtuned
from handtuned import ops, reference
from handtuned.nn import functional as H

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.no_triton]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def draw(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64).to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """In float64, as products of complex numbers."""
    n = cos.shape[-1]
    x, cos, sin = x.double(), cos.double(), sin.double()
    a, b = (x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2]) if interleaved else (x[..., :n], x[..., n : 2 * n])
    spun = torch.view_as_real(torch.complex(a, b) * torch.complex(cos, sin))
    spun = spun.flatten(-2) if interleaved else spun.transpose(-1, -2).flatten(-2)
    return torch.cat([spun, x[..., 2 * n :]], -1)


# ---- rotation --------------------------------------------------------------------------------------------------------

# input, tables: heads and widths at odd sizes, broadcast along every kind of dim.
SHAPES = (
    ((2, 3, 5, 8), (5, 4)),
    ((2, 3, 5, 70), (2, 1, 5, 33)),
    ((1, 2), (1, 1)),
    ((3, 4, 129), (3, 4, 64)),
    ((2, 9, 64), (1, 16)),
    ((300, 2, 40), (300, 1, 20)),
)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("dtype", "table"), [(F32, F32), (F64, F64), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
)
def test_rotation_is_rounded_once(kernels: str, dtype: torch.dtype, table: torch.dtype, interleaved: bool) -> None:
    for shape, angles in SHAPES:
        x, phase = draw(*shape, dtype=dtype), draw(*angles)
        cos, sin = phase.cos().to(table), phase.sin().to(table)
        expected = turned(x, cos, sin, interleaved)
        found = H.rotary_embedding(x, cos, sin, interleaved=interleaved)
        assert found.dtype == dtype
        error = (found.double() - expected).abs()
        eps = torch.finfo(dtype).eps
        assert (error <= eps / 2 * expected.abs() + 2 * torch.finfo(F64 if dtype == F64 else F32).eps * 4).all()
        back = ops.rotary(found, cos, sin, interleaved, True) if kernels != "reference" else None
        assert back is None or (back.double() - x.double()).abs().max() <= 16 * max(eps, torch.finfo(table).eps)


def test_any_layout_and_its_output(kernels: str) -> None:
    x, (cos, sin) = draw(2, 5, 3, 3, 8, dtype=F32), H.rotary_tables(5, 6)
    plain = H.rotary_embedding(x[:, :, 1].transpose(1, 2).contiguous(), cos, sin)
    for given in (x[:, :, 1].transpose(1, 2), x.flip(-1)[:, :, 1].contiguous().flip(-1).transpose(1, 2)):
        assert same_bits(H.rotary_embedding(given, cos, sin), plain)
    heads_inside = H.rotary_embedding(x[:, :, 1].transpose(1, 2), cos, sin)
    if kernels != "reference":
        assert heads_inside.transpose(1, 2).is_contiguous()
    strided = (torch.stack([t, t], -1)[..., 0] for t in (cos, sin))
    assert same_bits(H.rotary_embedding(x[:, :, 1].transpose(1, 2), *strided), plain)
    scattered = torch.stack([x[:, :, 1].transpose(1, 2)] * 2, -1)[..., 0]
    assert same_bits(H.rotary_embedding(scattered, cos, sin), plain)
    assert H.rotary_embedding(x[:0, :, 1].transpose(1, 2), cos, sin).shape == (0, 3, 5, 8)


@pytest.mark.parametrize("interleaved", [False, True])
def test_derivatives(kernels: str, interleaved: bool) -> None:
    x, (cos, sin) = draw(2, 3, 6).requires_grad_(), H.rotary_tables(3, 4, dtype=F64)

    def call(x: Tensor) -> Tensor:
        return H.rotary_embedding(x, cos, sin, interleaved=interleaved).tanh()

    assert gradcheck(call, x)
    assert gradgradcheck(call, x)


def test_tables_that_require_a_gradient_run_the_formula() -> None:
    x, phase = draw(3, 6), draw(3, 2).requires_grad_()
    with pytest.warns(handtuned.FallbackWarning, match="cos or sin requires a gradient"):
        assert gradcheck(lambda p: H.rotary_embedding(x, p.cos(), p.sin()), phase)


def test_tables_of_other_dtypes_are_converted() -> None:
    x, (cos, sin) = draw(3, 8, dtype=F32), H.rotary_tables(3, 8, dtype=F64)
    assert same_bits(H.rotary_embedding(x, cos, sin), H.rotary_embedding(x, cos.float(), sin.float()))


def test_rotation_under_compile() -> None:
    torch.compiler.reset()
    x, (cos, sin) = draw(2, 3, 5, 8, dtype=F32).transpose(1, 2), H.rotary_tables(3, 8)
    x = x.requires_grad_()
    compiled = torch.compile(H.rotary_embedding, fullgraph=True, backend="aot_eager")
    for run in (compiled, H.rotary_embedding):
        (grad,) = torch.autograd.grad(run(x, cos, sin).square().sum(), x)
        torch.testing.assert_close(grad, 2 * x)  # lengths stay


# ---- into the cache --------------------------------------------------------------------------------------------------


def arguments(dtype: torch.dtype = F32, paged: bool = False, rotary: bool = True, new: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    entries, rows = (6, 3) if paged else (2, 9)
    cos, sin = H.rotary_tables(9, 6, dtype=F64 if dtype == F64 else F32) if rotary else (None, None)
    return {
        "query": draw(2, new, 4, 8, dtype=dtype).transpose(1, 2),
        "key": draw(2, 2, new, 8, dtype=dtype),
        "value": draw(2, new, 2, 5, dtype=dtype).transpose(1, 2),
        "key_cache": torch.full((entries, rows, 2, 8), torch.nan, dtype=dtype).transpose(1, 2),
        "value_cache": torch.full((entries, 2, rows, 5), torch.nan, dtype=dtype),
        "cache_lengths": torch.tensor([4, 0], dtype=torch.int32),
        "block_table": torch.tensor([[5, 2, 1], [0, 3, -1]], dtype=torch.int32) if paged else None,
        "cos": cos,
        "sin": sin,
        "interleaved": False,
        "in_order": True,
    }


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_what_is_written(isa: str, dtype: torch.dtype, rotary: bool, paged: bool) -> None:
    ours, theirs = (arguments(dtype, paged, rotary) for _ in range(2))
    rotated, lengths = ops.append_kv(**ours)
    expected, _ = reference.append_kv(**theirs)
    assert lengths.tolist() == [6, 2]
    close: dict[str, Any] = {"rtol": 1e-6 if dtype == F32 else None, "atol": 1e-6 if dtype == F32 else None}
    close = close if dtype == F32 else {}
    torch.testing.assert_close(rotated, expected, **close)
    for name in ("key_cache", "value_cache"):
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True, **close)
        assert ours[name].isnan().any(), "nothing but the new places is written"
    if rotary:
        assert rotated.transpose(1, 2).is_contiguous()


def test_queries_that_all_stand_at_the_first_position(isa: str) -> None:
    given = arguments() | {"in_order": False}
    rotated, _ = ops.append_kv(**given)
    for b, length in enumerate([4, 0]):
        expected = turned(given["query"][b], given["cos"][length], given["sin"][length], False)
        torch.testing.assert_close(rotated[b].double(), expected, rtol=1e-5, atol=1e-6)


def test_same_bits_on_any_number_of_threads(isa: str) -> None:
    found = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        q, k, v = (draw(3, heads, 90, 64, dtype=BF16) for heads in (8, 2, 2))
        caches = [torch.zeros(3, 2, 100, 64, dtype=BF16) for _ in range(2)]
        tables = H.rotary_tables(100, 64)
        rotated, _ = ops.append_kv(q, k, v, *caches, torch.tensor([0, 7, 10]), None, *tables, True, True)
        found.append([rotated, *caches, H.rotary_embedding(q, *(t[:90] for t in tables))])
    for others in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("paged", [False, True])
def test_decoding_step_by_step_is_attention_over_the_whole(kernels: str, paged: bool) -> None:
    length, (q, k, v) = 9, (draw(2, heads, 9, 8, dtype=F32) for heads in (4, 2, 2))
    tables = H.rotary_tables(9, 8)
    whole = H.scaled_dot_product_attention(
        H.rotary_embedding(q, *tables), H.rotary_embedding(k, *tables), v, is_causal=True, enable_gqa=True
    )
    entries, rows = (6, 3) if paged else (2, 9)
    caches = [torch.full((entries, 2, rows, 8), torch.nan) for _ in range(2)]
    table = torch.tensor([[5, 2, 1], [0, 3, 4]], dtype=torch.int32) if paged else None
    at = 0
    for new in (4, 1, 3, 1):
        part = slice(at, at + new)
        found = H.attention_with_kv_cache(
            *(q[:, :, part], *caches, k[:, :, part], v[:, :, part]),
            cache_lengths=at,
            block_table=table,
            rotary_cos=tables[0],
            rotary_sin=tables[1],
        )
        torch.testing.assert_close(found, whole[:, :, part], rtol=1e-4, atol=1e-5)
        at += new
    assert at == length


def test_a_step_under_compile() -> None:
    torch.compiler.reset()

    def step(given: dict[str, Any]) -> Any:
        return H.attention_with_kv_cache(
            *(given[name] for name in ("query", "key_cache", "value_cache", "key", "value")),
            cache_lengths=given["cache_lengths"],
            rotary_cos=given["cos"],
            rotary_sin=given["sin"],
        )

    eager, traced = arguments(), arguments()
    expected = step(eager)
    assert same_bits(torch.compile(step, fullgraph=True, backend="aot_eager")(traced), expected)
    for name in ("key_cache", "value_cache"):
        assert same_bits(traced[name].nan_to_num(), eager[name].nan_to_num())


# ---- wrong arguments -------------------------------------------------------------------------------------------------

ROTARY: dict[str, Any] = {
    "input": torch.ones(3, 4, 6),
    "cos": torch.ones(4, 3),
    "sin": torch.ones(4, 3),
    "interleaved": False,
    "inverse": False,
}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("rotary", {"input": torch.ones(4, 6).int()}, r"input is (torch\.)?int32, supported are float32"),
    (
        "rotary",
        {"cos": torch.ones(4, 3).double()},
        r"cos is (torch\.)?float64, allowed beside a (torch\.)?float32 input",
    ),
    ("rotary", {"sin": torch.ones(4, 2)}, r"cos is (torch\.)?float32 \[4, 3\], sin is .* \[4, 2\]; pass a pair"),
    ("rotary", {"cos": torch.ones(4, 4), "sin": torch.ones(4, 4)}, r"cos has shape \[4, 4\], expected at most half"),
    (
        "rotary",
        {"cos": torch.ones(5, 3), "sin": torch.ones(5, 3)},
        r"\[5, 3\], expected one that broadcasts to the rows",
    ),
    ("append_kv", {"query": torch.ones(2, 4, 8)}, r"query has shape \[2, 4, 8\], expected 4 dims"),
    ("append_kv", {"key": torch.ones(2, 2, 2, 7)}, r"key has shape \[2, 2, 2, 7\], expected \[2, 2, 2, 8\]"),
    ("append_kv", {"value": torch.ones(2, 2, 2, 5).half()}, r"value is (torch\.)?float16, query is (torch\.)?float32"),
    ("append_kv", {"value_cache": torch.ones(2, 2, 8, 5)}, r"the caches differ in their widths alone"),
    ("append_kv", {"key_cache": torch.ones(2, 2, 8, 9).mT}, r"key_cache has the last stride 9, expected 1"),
    ("append_kv", {"key_cache": torch.ones(3, 2, 9, 8)}, r"key_cache has batch size 3, query has 2"),
    ("append_kv", {"cache_lengths": torch.ones(2)}, r"cache_lengths is (torch\.)?float32, expected int32 or int64"),
    ("append_kv", {"cache_lengths": torch.ones(3).int()}, r"cache_lengths has shape \[3\], expected \[2\]"),
    ("append_kv", {"block_table": torch.ones(2).int()}, r"block_table has shape \[2\], expected \[batch, pages\]"),
    ("append_kv", {"sin": None}, r"of cos and sin one is None"),
    ("append_kv", {"cos": torch.ones(9, 1, 3)}, r"cos has shape \[9, 1, 3\], expected \[positions, angles\]"),
]
IN_NUMBERS: list[tuple[dict[str, Any], bool, str]] = [
    ({"cache_lengths": torch.tensor([8, 0])}, False, r"cache_lengths\[0\] is 8, the limits are 0 and 7"),
    ({"cache_lengths": torch.tensor([0, -1])}, False, r"cache_lengths\[1\] is -1, the limits are 0 and 7"),
    ({"cache_lengths": torch.tensor([2**62, 0])}, True, r"cache_lengths\[0\] is \d+, the limits are 0 and 7"),
    ({"cache_lengths": torch.tensor([0, 5])}, True, r"block_table\[1\]\[2\] is -1, the limits are 0 and 5"),
    ({"cos": torch.ones(5, 3), "sin": torch.ones(5, 3)}, False, r"cos has 5 positions, sequence 0 needs 6"),
]


@pytest.mark.parametrize(("op", "changed", "says"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_arguments(op: str, changed: dict[str, Any], says: str) -> None:
    """An error naming op, argument, value, limit and remedy: from the kernel, and the same words from its fake."""
    given = {**(ROTARY if op == "rotary" else arguments()), **changed}
    real = error_of(lambda: ops.ROTARY_OPS[op](**given))
    assert real.startswith(f"handtuned.{op}: ")
    assert re.search(says, real), real
    assert "; " in real, f"no remedy: {real}"
    with FakeTensorMode() as mode:
        tensors = {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in given.items()}
        fake = error_of(lambda: ops.ROTARY_OPS[op](**tensors))
    assert fake.replace("torch.", "") == real.replace("torch.", "")


@pytest.mark.parametrize(("changed", "paged", "says"), IN_NUMBERS, ids=[says for *_, says in IN_NUMBERS])
def test_numbers_that_point_outside(changed: dict[str, Any], paged: bool, says: str) -> None:
    given = {**arguments(paged=paged), **changed}
    assert re.search(says, error_of(lambda: ops.append_kv(**given)))
    assert given["key_cache"].isnan().all(), "nothing is written"
