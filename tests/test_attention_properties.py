"""What holds of attention exactly, or for whatever is drawn: the same bits on any thread count, dropout's mask, options
that say the same in two ways, derivatives, torch's own samples, memory that is linear in the rows."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import attention_cases as ac
import attention_numerics as an
import hypothesis
import hypothesis.strategies as st
import numerics
import pytest
import torch
import torch.nn.functional as F
from attention_cases import ALL, ALL_PACKED, BASE, BF16, CAUSAL, F16, F32, F64, PACKED, Case
from test_norm_properties import assert_same_bits, same_bits
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db

from handtuned import reference
from handtuned.nn import functional as H

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.no_triton]


def drawn(examples: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )


def everything(case: Case, t: ac.Tensors) -> dict[str, Tensor]:
    """Output, lse and gradients of the kernels in force; dropout always with the same seed."""
    torch.manual_seed(7)
    return ac.results(case, t)


# ---- determinism -----------------------------------------------------------------------------------------------------

# Enough for several pieces of every kind: tiles, chunks of keys, batch entries, kv heads, rows of a mask's gradient.
LARGE = [
    Case((1, 2, 200, 900, 32), causal=True, alignment="bottom_right", mask="add", mask_dims="1q1"),
    Case((1, 4, 130, 700, 24), kv_heads=1, dtype=BF16, dropout=0.1, sinks=F32, mask="add_inf", mask_dims="qk"),
    Case((1, 2, 1, 5000, 64), kv_heads=1),
    Case((2, 8, 3, 1500, 40), kv_heads=2, dtype=F16, lengths=(1500, 700), grad_lse=True),
    Case((3, 4, 0, 0, 16), packed=((150, 3, 200), (90, 400, 210)), mask="add", mask_dims="h1k", kv_heads=2),
    Case((5, 3, 70, 70, 16), mask="add", mask_dims="1", softcap=5.0, alibi="h"),
    Case((70, 3, 49, 49, 16), mask="add", mask_dims="hqk", softcap=5.0, dropout=0.1),
    Case((3, 4, 90, 300, 24), kv_heads=2, mask="add_inf", lengths=(300, 0, 170), dtype=BF16),
    ALL,
    ALL_PACKED,
]


@pytest.mark.cases(LARGE)
def test_same_bits_for_any_number_of_threads(isa: str, case: Case) -> None:
    t = ac.tensors(case)
    torch.set_num_threads(1)
    expected = everything(case, t)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert_same_bits(everything(case, t), expected)


@pytest.mark.cases(LARGE)
def test_large_cases_meet_the_bound(isa: str, case: Case) -> None:
    t = ac.tensors(case)
    torch.manual_seed(7)
    factor = an.dropout_factor(case, t, torch.randint(2**63 - 1, (1,), dtype=torch.int64))
    an.check_every_element(case, everything(case, t), an.exact(case, t, factor))


def test_calls_from_several_python_threads(isa: str) -> None:
    case = Case((2, 2, 70, 90, 24), kv_heads=1, causal=True, mask="add", mask_dims="qk")
    inputs = [ac.tensors(case, draw) for draw in range(6)]
    expected = [ac.results(case, t) for t in inputs]
    with ThreadPoolExecutor(3) as threads:
        for actual, wanted in zip(threads.map(lambda t: ac.results(case, t), inputs * 3), expected * 3, strict=True):
            assert_same_bits(actual, wanted)


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Case((2, 3, 70, 150, 8)), PACKED], ids=lambda c: c.name)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_is_the_references(kernels: str, form: Case, p: float) -> None:
    """Every weight is kept or dropped as reference.dropout_factor says, by row of the lse and column of the key."""
    case = form.with_(dropout=p, dtype=F64)
    t = ac.tensors(case)
    for b in range(len(case.query_lengths)):  # values that are the rows of the identity, of one entry at a time
        keys = case.stored_key_lengths[b]
        value = t.value.new_zeros(*t.value.shape[:-1], max(keys, 1))
        an.keys_of(case, value, b)[..., :keys] = torch.eye(keys, dtype=F64)
        seed = numerics.draw_seed(b)
        kept = an.queries_of(case, ac.run(case, replace(t, value=value))[0], b)[..., :keys]
        whole = an.queries_of(case, ac.run(case.with_(dropout=0.0), replace(t, value=value))[0], b)[..., :keys]
        factor = reference.dropout_factor(torch.Size((*t.grad_lse.shape, case.sizes["k"])), 1, p, seed, F64)
        torch.testing.assert_close(kept, whole * an.lse_of(case, factor, b)[..., :keys], rtol=1e-12, atol=0)


def test_seeds_follow_torchs_generator(kernels: str) -> None:
    q, k, v = (torch.randn(2, 2, 30, 8) for _ in range(3))

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return H.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    assert same_bits(draw(1), draw(1))
    assert not draw(1).equal(draw(2))
    state = torch.get_rng_state()
    H.scaled_dot_product_attention(q, k, v)
    assert torch.get_rng_state().equal(state)


# ---- the same thing said in two ways ---------------------------------------------------------------------------------


@pytest.mark.cases([BASE, CAUSAL.with_(dtype=BF16), CAUSAL.with_(shape=(3, 4, 40, 40, 16), kv_heads=2)])
def test_packed_is_dense(kernels: str, case: Case) -> None:
    """Sequences of one length packed, and the same as a batch: the same but for the order of sums."""
    t, batch = ac.tensors(case), case.shape[0]
    dense = ac.run(case, t)

    def pack(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    starts = [torch.arange(batch + 1, dtype=torch.int32) * n for n in case.shape[2:4]]
    qkv = (pack(x) for x in (t.query, t.key, t.value))
    output, lse = H.attention_varlen(*qkv, *starts, is_causal=case.causal, causal_alignment="top_left", return_lse=True)
    tolerance = dict(rtol=2 * torch.finfo(case.dtype).eps, atol=4 * torch.finfo(case.dtype).eps)
    torch.testing.assert_close(output, pack(dense[0]), **tolerance)
    torch.testing.assert_close(lse.unflatten(1, (batch, -1)).transpose(0, 1), dense[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_jagged_tensors(kernels: str, is_causal: bool) -> None:
    """Nested in, nested out, values and gradients of each sequence alone."""
    starts, flat = torch.tensor([0, 5, 6, 39]), [torch.randn(39, 2, 8, dtype=F64, requires_grad=True) for _ in range(3)]
    nested = [torch.nested.nested_tensor_from_jagged(x, starts).transpose(1, 2) for x in flat]
    parts = [x.tensor_split(starts[1:-1]) for x in flat]
    output = H.scaled_dot_product_attention(*nested, is_causal=is_causal)
    assert output.is_nested
    assert output.layout == torch.jagged
    assert output.shape[1] == 2
    found = list(output.transpose(1, 2).unbind())
    heads_first = [[x.transpose(0, 1) for x in qkv] for qkv in zip(*parts, strict=True)]
    alone = [F.scaled_dot_product_attention(*qkv, is_causal=is_causal).transpose(0, 1) for qkv in heads_first]
    torch.testing.assert_close(found, alone)
    ours, torchs = (torch.autograd.grad(sum(o.sin().sum() for o in outputs), flat) for outputs in (found, alone))
    torch.testing.assert_close(ours, torchs)


def test_lengths_are_a_mask(kernels: str) -> None:
    case = BASE.with_(lengths=(20, 51), dtype=F64)
    t = ac.tensors(case)
    t = replace(t, key=t.key.nan_to_num(0), value=t.value.nan_to_num(0))
    mask = torch.arange(51) < t.key_lengths[:, None, None, None]
    for lengths in (t.key_lengths, t.key_lengths.int()):
        expected = ac.results(case, replace(t, key_lengths=lengths))
        found = ac.results(BASE, replace(t, key_lengths=None, mask=mask))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13)


# ---- hypothesis: the cross product -----------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(0, 12), st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 130]))


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 5]))
    batch, packed = draw(st.integers(0, 3)), draw(st.booleans())
    shape = (batch, kv_heads * groups, draw(SIZES), draw(SIZES), draw(st.integers(1, 70)))
    dtype = draw(st.sampled_from(list(ac.SHORT)))
    lengths = tuple(tuple(draw(SIZES) for _ in range(batch)) for _ in range(2))
    stored = lengths[1] if packed else (shape[3],) * batch
    masked = draw(st.booleans())
    dims = "".join(draw(st.sampled_from(d + "1")) for d in "bhqk")
    layout = draw(st.sampled_from([name for name in ac.LAYOUTS if name != "expanded" or batch]))
    seen = tuple(draw(st.integers(0, n)) for n in stored) if draw(st.booleans()) and layout != "expanded" else ()
    side = st.one_of(st.just(-1), st.integers(0, 40))
    return Case(
        shape,
        kv_heads=kv_heads,
        value_width=draw(st.one_of(st.none(), st.integers(1, 70))),
        dtype=dtype,
        causal=draw(st.booleans()),
        alignment=draw(st.sampled_from(["top_left", "bottom_right"])),
        window=draw(st.one_of(st.none(), st.integers(0, 20), st.tuples(side, side))),
        mask=draw(st.sampled_from(list(ac.MASKS))) if masked else "",
        mask_dims=dims[draw(st.integers(0, 3)) :],
        mask_dtype=draw(st.sampled_from([None, F32])) if masked and dtype != F64 else None,
        lengths=seen,
        packed=lengths if packed else None,
        alibi=draw(st.sampled_from(["", "", "h", "bh"])),
        sinks=draw(st.sampled_from([None, None, dtype, F32])),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
        scale=draw(st.sampled_from([None, None, 0.5, -0.2])),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3])),
        grad_lse=draw(st.booleans()),
        layout=layout,
    )


@drawn(60)
@hypothesis.given(case=any_case())
def test_no_element_is_off_by_more_than_a_few_roundings(kernels: str, case: Case) -> None:
    t = ac.tensors(case)
    torch.manual_seed(7)
    factor = an.dropout_factor(case, t, torch.randint(2**63 - 1, (1,), dtype=torch.int64))
    an.check_every_element(case, everything(case, t), an.exact(case, t, factor))


@drawn(25)
@hypothesis.given(case=any_case())
def test_threads_and_strides_change_no_bit(isa: str, case: Case) -> None:
    hypothesis.assume(case.layout != "expanded")
    expected = everything(case, ac.tensors(case.with_(layout="contiguous")))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert_same_bits(everything(case, ac.tensors(case)), expected)


# ---- derivatives -----------------------------------------------------------------------------------------------------

SMALL = Case((2, 2, 3, 4, 3), dtype=F64, grad_lse=True)
SMALL_CASES = [
    SMALL,
    SMALL.with_(causal=True, alignment="bottom_right", shape=(1, 4, 4, 3, 2), kv_heads=2),
    SMALL.with_(mask="add", mask_dims="h1k", softcap=1.5, sinks=F64, lengths=(4, 0)),
    SMALL.with_(mask="bool_empty_row", alibi="bh", window=2, sinks=F64, value_width=2),
    SMALL.with_(dropout=0.4, mask="add", mask_dims="q1", kv_heads=1),
    SMALL.with_(packed=((2, 0, 3), (3, 1, 0)), sinks=F64, mask="add", mask_dims="b1qk", kv_heads=1, softcap=2.0),
]


@pytest.mark.cases(SMALL_CASES)
def test_first_and_second_derivatives(kernels: str, case: Case) -> None:
    """Every argument's derivative, of output and lse, and that derivative's own, against finite differences."""
    t = ac.tensors(case)
    t = replace(t, **{name: leaf.nan_to_num(0) for name, leaf in t.leaves().items()})  # differences of NaN are NaN
    leaves = t.leaves()

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        output, lse = ac.run(case, replace(t, **dict(zip(leaves, values, strict=True))))
        return output, torch.where(lse.isfinite(), lse, 0.0)

    assert gradcheck(function, tuple(leaves.values()))
    assert gradgradcheck(function, tuple(leaves.values()), fast_mode=kernels != "generic")


@pytest.mark.cases([SMALL, SMALL_CASES[2].with_(lengths=())])
def test_third_derivative(isa: str, case: Case) -> None:
    t = ac.tensors(case)
    leaves = t.leaves()

    def first(*values: Tensor) -> tuple[Tensor, ...]:
        output, lse = ac.run(case, replace(t, **dict(zip(leaves, values, strict=True))))
        return torch.autograd.grad(output.pow(3).sum() + lse.sin().sum(), values, create_graph=True)

    assert gradgradcheck(first, tuple(leaves.values()), fast_mode=True, atol=1e-3, rtol=1e-3)


# ---- torch's own samples ---------------------------------------------------------------------------------------------

OP_INFO = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


@pytest.mark.parametrize("dtype", ac.SHORT, ids=ac.SHORT.get)
def test_torchs_samples(kernels: str, dtype: torch.dtype) -> None:
    """Every sample that torch tests its own function with, values and gradients; dropout by shape and fraction."""
    # The samples' values reach 9, so that gradients of 1 are differences of hundreds: bounds are taken from those.
    compared, roundings = 0, 0.25 if torch.finfo(dtype).bits == 16 else 32
    for sample in OP_INFO.sample_inputs("cpu", dtype, requires_grad=True):
        arguments = (sample.input, *sample.args)
        output = H.scaled_dot_product_attention(*arguments, **sample.kwargs)
        expected = F.scaled_dot_product_attention(*arguments, **sample.kwargs)
        assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
        if sample.kwargs["dropout_p"]:
            continue
        compared += 1
        leaves = [a for a in arguments if a.requires_grad]
        wide = [a.detach().double().requires_grad_(a.requires_grad) for a in arguments]
        options = {name: o.double() if name == "attn_mask" else o for name, o in sample.kwargs.items()}
        truth = F.scaled_dot_product_attention(*wide, **options)
        ours, torchs, exact = (
            (o, *torch.autograd.grad(o, x, torch.ones_like(o)))
            for o, x in ((output, leaves), (expected, leaves), (truth, [w for w in wide if w.requires_grad]))
        )
        size = max(a.abs().max().item() for a in arguments) ** 2 * sample.input.shape[-1] ** 0.5
        for a, b, x in zip(ours, torchs, exact, strict=True):
            error, torch_error = ((y.double() - x).abs().max() for y in (a, b))
            assert error <= 1.5 * torch_error + roundings * torch.finfo(dtype).eps * size
    assert compared >= 10


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_linear_in_the_rows() -> None:
    """Forward and backward of 16384 rows in a fresh process: the scores alone would be 8.6 GB."""
    program = """
import torch
from handtuned.nn import functional as H
def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))
def call(rows):
    q, k, v, g = (torch.randn(1, 8, rows, 64, requires_grad=i < 3) for i in range(4))
    H.scaled_dot_product_attention(q, k, v, is_causal=True).backward(g)
call(64)
for rows in (4096, 16384):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = status("VmRSS")
    call(rows)
    print(status("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    quarter, whole = map(int, done.stdout.split())
    tensors = 8 * (8 * 16384 * 64 * 4)  # query, key, value, output and a gradient of each
    assert whole < 2.5 * tensors, f"{whole} bytes, {tensors} of them in tensors"
    assert whole < 5 * quarter, f"{quarter} bytes for 4096 rows, {whole} for 16384"


def test_scratch_does_not_stay() -> None:
    """500 forward and backward passes over changing shapes in a fresh process."""
    program = """
import gc, torch
from handtuned.nn import functional as H
def rss():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def call(i):
    q, k, v = (torch.randn(1 + i % 2, 2, 1 + i * 37 % 97, 24, requires_grad=True) for _ in range(3))
    m = torch.randn(q.shape[2], k.shape[2], requires_grad=True)
    H.scaled_dot_product_attention(q, k, v, m, 0.1).sum().backward()
for i in range(200): call(i)
before = rss()
for i in range(500): call(i)
print(rss() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 << 20, f"{int(done.stdout)} bytes more after 500 calls"
