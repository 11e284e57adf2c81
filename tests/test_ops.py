"""The ops as torch sees them: schemas, fake kernels, opcheck, compile and export, and arguments that are wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import handtuned
from handtuned import ops
from handtuned.nn import functional as H

NORM_OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
SAMPLES = list(handtuned.testing.op_samples())


SHORT = cases.SHORT | {torch.int8: "int8"}
DTYPES = {"linear_int8_pack": {torch.int8}, "linear_int8": set(cases.SHORT) - {torch.float64}}  # of all others all


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    return [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]


def sample_name(sample: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> str:
    op, args, _ = sample
    tensor = tensors_of(args)[0]
    shape = "x".join(map(str, tensor.shape))
    dropout = "-dropout" if 0.3 in [a for a in args if isinstance(a, float)] else ""
    return f"{op._schema.name.split('::')[1]}-{SHORT[tensor.dtype]}-{shape}{dropout}"


def results_of(found: Any) -> tuple[Tensor, ...]:
    """An op's results as a tuple, also where there is one."""
    return (found,) if isinstance(found, Tensor) else tuple(found)


# ---- schemas and fakes -----------------------------------------------------------------------------------------------


def test_names_and_schemas() -> None:
    assert handtuned.OP_NAMESPACE == "handtuned"
    wanted = {f"{op}{suffix}" for op in NORM_OPS for suffix in ("", "_backward")}
    assert wanted <= set(ops.NORM_OPS) <= wanted | {"layer_norm_inference", "rms_norm_inference"}
    assert set(ops.ATTENTION_OPS) == {"attention", "attention_backward"}
    assert set(ops.RNN_OPS) == {"rnn_pack", "rnn", "rnn_inference", "rnn_cell", "rnn_backward"}
    assert set(ops.LINEAR_OPS) == {"linear_pack", "linear", "linear_inference", "linear_backward"}
    assert set(ops.ROTARY_OPS) == {"rotary", "append_kv"}
    assert set(ops.CROSS_ENTROPY_OPS) == {"linear_cross_entropy", "linear_cross_entropy_backward"}
    assert set(ops.LINEAR_INT8_OPS) == {"linear_int8_pack", "linear_int8"}
    linears = ops.LINEAR_OPS | ops.LINEAR_INT8_OPS | ops.CROSS_ENTROPY_OPS
    families = ops.NORM_OPS | ops.ATTENTION_OPS | linears | ops.ROTARY_OPS | ops.RNN_OPS
    assert families == ops.OPS
    for name, op in ops.OPS.items():
        schema = op._schema
        assert op is getattr(torch.ops.handtuned, name).default
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        assert written == (["key_cache", "value_cache"] if name == "append_kv" else [])
        assert all(a.alias_info is None for a in [*schema.arguments, *schema.returns] if a.name not in written)
        arguments, results = [a.name for a in schema.arguments], [r.name for r in schema.returns]
        if name.endswith("_backward"):
            assert [r.removeprefix("grad_") for r in results] == [
                a.removeprefix("need_") for a in arguments if a.startswith("need_")
            ]
        else:
            packed = {"rnn_pack": "packed", "linear_int8_pack": "packed"}
            first = packed | {"rnn_cell": "hn", "linear_cross_entropy": "loss"}
            assert results[0] == first.get(name, "output")


def test_samples_reach_every_op_and_dtype() -> None:
    assert {s[0] for s in SAMPLES} == set(ops.OPS.values())
    for name, op in ops.OPS.items():
        tensors = [t for s in SAMPLES if s[0] is op for t in tensors_of(s[1])[:2]]  # of a backward the gradient, too
        assert DTYPES.get(name, set(cases.SHORT)) <= {t.dtype for t in tensors}
        assert any(t.numel() == 0 for t in tensors)


@pytest.mark.parametrize("sample", SAMPLES, ids=sample_name)
def test_opcheck(sample: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> None:
    op, args, kwargs = sample
    # Autograd lives in nn.functional, so the ops are checked as what they are: plain kernels.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, args, kwargs, test_utils=tests)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if tensors_of(s[1])[0].numel()][::3], ids=sample_name)
def test_opcheck_aot_dispatch(sample: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> None:
    op, args, kwargs = sample
    torch.library.opcheck(op, args, kwargs, test_utils=("test_aot_dispatch_dynamic",))


def test_fake_results_are_like_real_ones() -> None:
    for op, args, kwargs in SAMPLES:
        real = results_of(op(*args, **kwargs))
        with FakeTensorMode() as mode:
            fake = results_of(op(*tree_map_only(Tensor, mode.from_tensor, args), **kwargs))
        for r, f in zip(real, fake, strict=True):
            same = (f.shape, f.stride(), f.dtype, f.device) == (r.shape, r.stride(), r.dtype, r.device)
            assert same, f"{sample_name((op, args, kwargs))}: fake {f}, real {r.shape} {r.stride()} {r.dtype}"


@pytest.mark.cases(
    [form.with_(shape=(6, 5, 8), layout=lay) for form in cases.FORMS for lay in ("permuted", "scattered")]
)
def test_fake_strides_do_not_follow_the_inputs(isa: str, case: cases.Case) -> None:
    arguments = {name: t.detach() for name, t in cases.tensors(case).leaves().items()}
    with FakeTensorMode() as mode:
        fake = cases.run(case, {name: mode.from_tensor(t) for name, t in arguments.items()})
    for f, r in zip(fake, cases.run(case, arguments), strict=True):
        assert f.stride() == r.stride()


# ---- compile and export ----------------------------------------------------------------------------------------------


def compiled_agrees(case: cases.Case, backend: str, dynamic: bool, rows: tuple[int, ...] = (6,)) -> None:
    """A compiled forward and backward has the eager one's values; dropout draws the same seed."""
    torch.compiler.reset()
    compiled = torch.compile(lambda t: cases.run(case, t), fullgraph=True, dynamic=dynamic, backend=backend)
    for n in rows:
        t = cases.tensors(case.with_(shape=(n, *case.shape[1:])))
        found = []
        for run in (compiled, lambda t: cases.run(case, t)):
            leaves = t.leaves()
            torch.manual_seed(3)
            found.append(cases.results(run(leaves), leaves, t))
        for name, want in found[1].items():
            torch.testing.assert_close(found[0][name], want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


COMPILED = [form.with_(shape=(6, 33)) for form in cases.FORMS]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "case", [*COMPILED, COMPILED[0].with_(dtype=torch.bfloat16, affine="none")], ids=lambda c: c.name
)
def test_compile(case: cases.Case, dynamic: bool) -> None:
    compiled_agrees(case, "aot_eager", dynamic)


@pytest.mark.parametrize("case", [form.with_(shape=(6, 33)) for form in cases.DROPOUTS], ids=lambda c: c.name)
def test_compile_with_dropout(case: cases.Case) -> None:
    compiled_agrees(case, "aot_eager", dynamic=False)


def test_compile_with_inductor() -> None:
    """Inductor draws its own random numbers, so without dropout."""
    compiled_agrees(COMPILED[2], "inductor", dynamic=True)


@pytest.mark.parametrize("case", COMPILED, ids=lambda c: c.name)
def test_one_graph_for_every_batch_size(case: cases.Case) -> None:
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled_agrees(case, "aot_eager", dynamic=True, rows=(6, 9, 2, 31))


MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "LayerNorm": lambda: handtuned.nn.LayerNorm(33),
    "RMSNorm": lambda: handtuned.nn.RMSNorm(33),
    "AddLayerNorm": lambda: handtuned.nn.AddLayerNorm(33, dropout=0.2).eval(),
    "AddRMSNorm": lambda: handtuned.nn.AddRMSNorm(33, dropout=0.2).eval(),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiled_and_exported_modules(name: str) -> None:
    module = MODULES[name]()
    args = tuple(torch.randn(5, 33) for _ in range(2 if name.startswith("Add") else 1))
    expected = module(*args)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*args), expected)
    batch = torch.export.Dim("batch", min=1, max=1000)
    exported = torch.export.export(module, args, dynamic_shapes=tuple({0: batch} for _ in args))
    called = [str(node.target) for node in exported.graph.nodes if "handtuned" in str(node.target)]
    assert len(called) == 1
    for rows in (5, 1, 17):
        args = tuple(torch.randn(rows, 33) for _ in args)
        torch.testing.assert_close(exported.module()(*args), module(*args))


# ---- wrong arguments -------------------------------------------------------------------------------------------------

X = torch.ones(4, 6)
SEED = torch.tensor([1])


def change(op: str, **changes: Any) -> dict[str, Any]:
    """An op's arguments by name, right but for `changes`."""
    stats = torch.ones(2, 4) if "layer_norm" in op else torch.ones(4)
    right = {"normalized_ndim": 1, "eps": 1e-5, "dropout_p": 0.0, "seed": None, "weight": torch.ones(6)}
    right |= {"bias": torch.ones(6), "stats": stats, "rstd": stats, "grad_new_residual": None}
    names = [a.name for a in ops.NORM_OPS[op]._schema.arguments]
    return {n: changes.get(n, right.get(n, True if n.startswith("need_") else X)) for n in names}


# argument, its wrong value, what the message must say: the value and the limit
WRONG: list[tuple[str, Any, str]] = [
    (
        "input",
        torch.ones(4, 6, dtype=torch.int64),
        r"input is (torch\.)?int64.*float32, float64, bfloat16 (and|or) float16",
    ),
    ("input", torch.ones(4, 6, dtype=torch.complex64), r"input is (torch\.)?complex64.*float32"),
    ("input", torch.ones(4, 6).to(torch.float8_e4m3fn), r"input is (torch\.)?float8_e4m3fn.*float32"),
    ("input", torch.ones(4, 6, dtype=torch.bool), r"input is (torch\.)?bool.*float32"),
    ("input", torch.tensor(1.0), r"normalized_ndim is 1, the limits are 1 and the 0 dims"),
    ("normalized_ndim", 0, r"normalized_ndim is 0, the limits are 1 and the 2 dims"),
    ("normalized_ndim", -1, r"normalized_ndim is -1, the limits are 1 and the 2 dims"),
    ("normalized_ndim", 3, r"normalized_ndim is 3, the limits are 1 and the 2 dims"),
    ("normalized_ndim", 2**40, r"normalized_ndim is 1099511627776, the limits"),
    ("weight", torch.ones(5), r"weight has shape \[5\], expected normalized_shape \[6\]"),
    ("weight", torch.ones(4, 6), r"weight has shape \[4, 6\], expected normalized_shape \[6\]"),
    ("weight", torch.tensor(1.0), r"weight has shape \[\], expected normalized_shape \[6\]"),
    ("weight", torch.ones(6, dtype=torch.float64), r"weight is (torch\.)?float64, allowed beside a (torch\.)?float32"),
    (
        "weight",
        torch.ones(6, dtype=torch.bfloat16),
        r"weight is (torch\.)?bfloat16, allowed beside a (torch\.)?float32",
    ),
    ("weight", torch.ones(6, device="meta"), r"weight is .*(meta|not on the CPU).*move it with \.to\("),
    ("bias", torch.ones(7), r"bias has shape \[7\], expected normalized_shape \[6\]"),
    ("bias", torch.ones(6, dtype=torch.float16), r"bias is (torch\.)?float16, allowed beside a (torch\.)?float32"),
    ("residual", torch.ones(6), r"residual has shape \[6\], expected the shape of input, \[4, 6\]"),
    ("residual", torch.ones(4, 6).half(), r"residual is (torch\.)?float16, input is (torch\.)?float32"),
    ("residual", torch.ones(4, 6, device="meta"), r"residual is .*(meta|not on the CPU).*move it with \.to\("),
    ("grad_output", torch.ones(6, 4), r"grad_output has shape \[6, 4\], expected the shape of input, \[4, 6\]"),
    ("grad_output", torch.ones(4, 6).double(), r"grad_output is (torch\.)?float64, input is (torch\.)?float32"),
    ("grad_new_residual", torch.ones(4), r"grad_new_residual has shape \[4\], expected the shape of input"),
    ("eps", 0.0, r"eps is 0(\.0)?, the limit is eps > 0"),
    ("eps", -1.0, r"eps is -1(\.0)?, the limit is eps > 0"),
    ("eps", float("nan"), r"eps is -?nan, the limit is eps > 0"),
    ("dropout_p", 1.5, r"dropout_p is 1\.5, the limits are 0 and 1"),
    ("dropout_p", -0.1, r"dropout_p is -0\.1, the limits are 0 and 1"),
    ("dropout_p", float("nan"), r"dropout_p is -?nan, the limits are 0 and 1"),
    ("dropout_p", 0.5, r"dropout_p is 0\.5 but seed is (None|not)"),
    ("stats", torch.ones(2, 5), r"statistics are (torch\.)?float32 of shape \[2, 5\], expected"),
    ("stats", torch.ones(4), r"statistics are (torch\.)?float32 of shape \[4\], expected"),
    ("stats", torch.ones(2, 4).double(), r"statistics are (torch\.)?float64 of shape \[2, 4\], expected"),
    ("stats", torch.ones(2, 4, device="meta"), r"stat\w+ (is|are) .*(meta|float32)"),
    ("rstd", torch.ones(5), r"statistics are (torch\.)?float32 of shape \[5\], expected"),
    ("rstd", torch.ones(4).bfloat16(), r"statistics are (torch\.)?bfloat16 of shape \[4\], expected"),
]
WRONG_SEEDS = [torch.tensor([1, 2]), torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32), torch.empty(0).long()]


def wrong_calls() -> list[Any]:
    found = []
    for op, packet in ops.NORM_OPS.items():
        names = {a.name for a in packet._schema.arguments}
        for argument, value, says in WRONG:
            if argument in names:
                what = f"{value.dtype}{list(value.shape)}@{value.device}" if isinstance(value, Tensor) else value
                found.append(pytest.param(op, {argument: value}, says, id=f"{op}-{argument}={what}"))
        for value in WRONG_SEEDS if "seed" in names else ():
            changes = {"dropout_p": 0.5, "seed": value}
            found.append(pytest.param(op, changes, r"seed is .*one int64 element", id=f"{op}-seed={value}"))
    return found


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value).splitlines()[0]


@pytest.mark.parametrize(("op", "changes", "says"), wrong_calls())
def test_wrong_arguments(op: str, changes: dict[str, Any], says: str) -> None:
    """An error naming op, argument, value, limit and remedy: from the kernel, and the same words from its fake."""
    arguments = change(op, **changes)
    real = error_of(lambda: ops.NORM_OPS[op](**arguments))
    assert real.startswith(f"handtuned.{op.removesuffix('_inference')}")
    assert re.search(says, real), real
    assert "; " in real or "expected" in real, f"no remedy: {real}"
    with FakeTensorMode() as mode:
        tensors = {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in arguments.items()}
        fake = error_of(lambda: ops.NORM_OPS[op](**tensors))
    assert re.search(says, fake), fake
    if "meta" not in fake:  # dispatched to the fake kernel in both
        assert fake.replace("torch.", "").replace(".0,", ",") == real.replace("torch.", "").replace(".0,", ",")


FUNCTIONAL = {"normalized_ndim", "stats", "rstd", "grad_output", "grad_new_residual", "seed"}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    ("op", "changes", "says"),
    [c for c in wrong_calls() if c.values[0] in NORM_OPS and not FUNCTIONAL & set(c.values[1])],
)
def test_wrong_arguments_of_functions(op: str, changes: dict[str, Any], says: str, requires_grad: bool) -> None:
    arguments = change(op, **changes)
    for name in ("normalized_ndim", "seed"):
        arguments.pop(name, None)
    if changes.get("dropout_p") == 0.5:
        return  # right for a function, which draws the seed itself
    shape = [] if arguments["input"].dim() == 0 else [6]
    if requires_grad and "weight" not in changes:
        arguments["weight"] = torch.ones(6, requires_grad=True)
    message = error_of(lambda: getattr(H, op)(normalized_shape=shape, **arguments))
    assert re.match(rf"handtuned\.{op}(_inference)?: ", message)  # without gradient the other form of the op checks
    assert re.search(r"normalized_shape is \[\]" if not shape else says, message), message


@pytest.mark.parametrize("shape", [[], [5], [4], [1, 6], [3, 4, 6], [6, 4], [-1]], ids=str)
@pytest.mark.parametrize("op", NORM_OPS)
def test_wrong_normalized_shape(op: str, shape: list[int]) -> None:
    tensors = (X, X) if op.startswith("add_") else (X,)
    message = error_of(lambda: getattr(H, op)(*tensors, shape))
    assert message.startswith(f"handtuned.{op}: normalized_shape is {shape}, expected the last dims of input")
    assert "[4, 6]" in message
    assert "pass input.shape[-k:]" in message


@pytest.mark.parametrize("op", ops.NORM_OPS)
def test_seed_on_meta_is_refused(op: str) -> None:
    if not op.startswith("add_"):
        return
    arguments = change(op, dropout_p=0.5, seed=torch.ones(1, dtype=torch.int64, device="meta"))
    assert "seed" in error_of(lambda: ops.NORM_OPS[op](**arguments))


@pytest.mark.parametrize("op", [op for op in ops.NORM_OPS if op.endswith("_backward")])
def test_statistics_that_are_not_contiguous(op: str) -> None:
    """Refused or read rightly, never misread."""
    name = "stats" if "layer_norm" in op else "rstd"
    dense = torch.linspace(0.5, 2, 8).reshape(2, 4) if name == "stats" else torch.linspace(0.5, 2, 4)
    strided = torch.stack([dense, dense + 100], -1)[..., 0]
    assert not strided.is_contiguous()
    expected = ops.NORM_OPS[op](**change(op, **{name: dense}))
    try:
        actual = ops.NORM_OPS[op](**change(op, **{name: strided}))
    except RuntimeError as error:
        if "statistics" not in str(error):
            raise
        return
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("op", ops.NORM_OPS)
def test_wrong_kinds_of_argument_never_reach_a_kernel(op: str) -> None:
    for changes in ({"normalized_ndim": 1.5}, {"weight": "ones"}, {"input": None, "new_residual": None}):
        with pytest.raises((RuntimeError, TypeError)):
            ops.NORM_OPS[op](**change(op, **changes))


@pytest.mark.parametrize("op", ops.NORM_OPS)
def test_zero_columns(op: str) -> None:
    """No element and no statistics to speak of, but no crash and the right shapes."""
    empty = torch.ones(4, 0)
    names = ("input", "residual", "grad_output", "new_residual", "weight", "bias")
    tensors = {n: torch.ones(0) if n in ("weight", "bias") else empty for n in names}
    for result in results_of(ops.NORM_OPS[op](**change(op, **tensors))):
        assert result.numel() == 0 or result.shape[-1] == 4
