"""Which kernel runs and who says so: backend(), strict(), explain(), info() and the choice of an instruction set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import handtuned
from handtuned import _C, FallbackError, FallbackWarning
from handtuned.nn import functional as H

X = torch.linspace(-2, 3, 40).reshape(5, 8)
BACKENDS = ("auto", "cpu", "triton", "cuda", "reference")


def called(explanation: handtuned.Explanation) -> list[str]:
    """The ops in order; the form of an op that saves nothing for a gradient counts as the op."""
    return [call.op.removesuffix("_inference") for call in explanation.calls]


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HANDTUNED_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ---- backend -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "cpu", "triton", "reference"])
def test_backend_runs_what_it_names(name: str) -> None:
    with handtuned.backend(name):
        explanation = handtuned.explain(H.layer_norm, X, (8,))
    (call,) = explanation.calls
    assert called(explanation) == ["layer_norm"]
    assert call.served_by.backend == ("cpu" if name == "auto" else name)
    torch.testing.assert_close(explanation.result, torch.nn.functional.layer_norm(X, (8,)))


def test_backend_that_cannot_serve_says_why() -> None:
    with (
        handtuned.backend("cuda"),
        pytest.raises(RuntimeError, match=r"backend\('cuda'\).*on cpu.*backend\('auto'\)"),
    ):
        H.layer_norm(X, (8,))
    names = "'cudnn', allowed are auto, cpu, triton, cuda, reference"
    with pytest.raises(ValueError, match=names), handtuned.backend("cudnn"):
        pass


def test_triton_without_interpreter_and_device_is_refused() -> None:
    done = python(
        "import torch, handtuned\n"
        "with handtuned.backend('triton'): handtuned.nn.functional.rms_norm(torch.ones(2, 3), (3,))"
    )
    assert done.returncode != 0
    assert "handtuned.backend('triton') cannot serve this call: input is on cpu" in done.stderr


def test_backends_nest_and_end_with_an_error() -> None:
    state = handtuned.backends._state
    with handtuned.backend("reference"):
        with handtuned.backend("cpu"):
            assert state.backend == "cpu"
        assert state.backend == "reference"
        with pytest.raises(ZeroDivisionError), handtuned.backend("triton"):
            raise ZeroDivisionError
        assert state.backend == "reference"
    assert state.backend == "auto"


@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
def test_a_backward_runs_on_the_backend_of_its_forward(name: str) -> None:
    x = X.clone().requires_grad_()
    with handtuned.backend(name):
        y = H.rms_norm(x, (8,))

    def refuse(*args: object) -> None:
        raise AssertionError("another backend's backward was called")

    with pytest.MonkeyPatch.context() as patch:
        for other in {"cpu": handtuned.ops, "reference": handtuned.reference}.items():
            if other[0] != name:
                patch.setattr(other[1], "rms_norm_backward", refuse)
        y.sum().backward()
    want = X.clone().requires_grad_()
    torch.nn.functional.rms_norm(want, (8,)).sum().backward()
    torch.testing.assert_close(x.grad, want.grad)


# ---- strict and fall-backs -----------------------------------------------------------------------------------------


def test_strict_is_content_where_a_kernel_serves() -> None:
    with handtuned.strict(), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = H.layer_norm(X.clone().requires_grad_(), (8,))
        y.sum().backward()


def test_a_fall_back_is_said_once_and_strict_forbids_it() -> None:
    transform = torch.func.grad(lambda x: H.layer_norm(x, (8,)).pow(2).sum())
    with pytest.warns(FallbackWarning, match=r"handtuned\.layer_norm: no kernel serves this call, .*torch\.func"):
        transform(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform(X)  # the second time in silence
    with handtuned.strict():
        with pytest.raises(FallbackError, match="no kernel serves this call"):
            transform(X)
        with handtuned.strict(False):
            transform(X)
    assert issubclass(FallbackError, RuntimeError)


# ---- explain -------------------------------------------------------------------------------------------------------


def test_explain_names_the_kernel_and_every_refusal() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8))
    handtuned.replace(model)
    explanation = handtuned.explain(model, X)
    assert called(explanation) == ["layer_norm", "linear", "rms_norm"]
    for call in explanation.calls:
        assert (call.served_by.backend, call.served_by.kernel) == ("cpu", _C.isa())
        assert {c.backend for c in call.candidates} == set(BACKENDS) - {"auto"}
        refused = {c.backend: c.refused for c in call.candidates}
        assert refused["cpu"] is None
        assert "cpu" in refused["cuda"]
        assert refused["triton"]
    lines = str(explanation).splitlines()
    assert lines[0] == f"{explanation.calls[0].op}: cpu ({_C.isa()})"
    for backend in ("cuda", "triton", "reference"):
        assert any(line.startswith(f"  not {backend}: ") and len(line) > 20 for line in lines)
    assert explanation.result.equal(model(X))


def test_explain_shows_the_backward_too() -> None:
    x = X.clone().requires_grad_()

    def step(x: torch.Tensor) -> None:
        H.add_layer_norm(x, x, (8,), dropout_p=0.1)[0].sum().backward()

    assert called(handtuned.explain(step, x)) == ["add_layer_norm", "add_layer_norm_backward"]


def test_explain_mentions_copies_and_emptiness() -> None:
    copied = handtuned.explain(H.layer_norm, torch.ones(8, 5).t(), (8,)).calls[0].notes
    assert len(copied) == 1
    assert "copied" in copied[0]
    assert not handtuned.explain(H.layer_norm, torch.ones(5, 16)[:, :8], (8,)).calls[0].notes
    assert str(handtuned.explain(torch.relu, X)) == "no handtuned op was called"


def test_explain_attention() -> None:
    q = torch.randn(1, 2, 3, 4)
    (call,) = handtuned.explain(H.scaled_dot_product_attention, q, q.mT.contiguous().mT, q).calls
    assert (call.op, call.served_by.backend) == ("attention", "cpu")
    assert {c.backend: c.refused for c in call.candidates}["triton"] == "input is on cpu"
    assert call.notes == ["key is copied once: its last stride is 3, not 1"]
    with handtuned.backend("triton"), pytest.raises(RuntimeError, match="input is on meta"):
        handtuned.backends.choose("append_kv", torch.device("meta"), q.dtype)


def test_explain_passes_keywords_and_errors_on() -> None:
    assert handtuned.explain(H.rms_norm, X, normalized_shape=(8,), eps=0.5).result.equal(H.rms_norm(X, (8,), eps=0.5))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        handtuned.explain(H.rms_norm, X, (9,))
    assert handtuned.backends._state.record is None


def test_explain_a_compiled_module() -> None:
    module = torch.compile(handtuned.nn.LayerNorm(8), backend="eager")
    assert called(handtuned.explain(module, X)) == ["layer_norm"]


def test_explain_of_a_refused_dtype_still_names_the_argument() -> None:
    with pytest.raises(RuntimeError, match=r"input is (torch\.)?int64"):
        handtuned.explain(H.layer_norm, torch.ones(2, 8, dtype=torch.int64), (8,))


def test_cuda_comes_before_triton_where_it_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The policy for CUDA tensors, as it is on a machine that has such a device."""
    library = tmp_path / "libhandtuned_cuda.so"
    device = torch.device("cuda", 0)
    monkeypatch.setattr(handtuned.backends, "build_facts", {"cuda": "built: nvcc 13.0, sm_80 sm_90 sm_100"})
    monkeypatch.setattr(handtuned.backends, "cuda_library", library)
    monkeypatch.setattr(handtuned.backends, "triton_status", lambda: None)

    def refused(op: str, dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
        return {c.backend: c.refused for c in handtuned.backends.candidates(op, device, dtype)}

    assert refused("layer_norm")["cuda"] == "libhandtuned_cuda.so is missing beside the extension"
    library.touch()
    for op in handtuned.ops.NORM_OPS | handtuned.ops.ATTENTION_OPS | handtuned.ops.RNN_OPS:
        assert handtuned.backends.choose(op, device, torch.bfloat16)[0].backend == "cuda"
        assert refused(op)["triton"] is None
    assert "int64" in str(refused("layer_norm", torch.int64)["cuda"])
    assert refused("linear_cross_entropy")["cuda"] == "no CUDA C++ kernel for this op"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert refused("layer_norm")["cuda"] == "the device is sm_75, the CUDA kernels need sm_80"
    monkeypatch.setattr(handtuned.backends, "build_facts", {"cuda": "not built: nvcc was not found"})
    assert handtuned.backends.choose("layer_norm", device, torch.float32)[0].backend == "triton"
    assert refused("layer_norm")["cuda"] == "not built: nvcc was not found"


# ---- info ----------------------------------------------------------------------------------------------------------


def test_info_lists_every_op_on_every_backend() -> None:
    info = handtuned.info()
    found = json.loads(json.dumps(info.as_dict()))
    rows = {(row["op"], row["backend"]) for row in found["kernels"]}
    assert rows == {(op, b) for op in handtuned.ops.OPS for b in BACKENDS if b != "auto"}
    assert all(row["why"] for row in found["kernels"])
    without = {"triton": handtuned.backends.why_no_triton_kernel, "cuda": handtuned.backends.why_no_cuda_kernel}
    lacking = {(op, backend) for backend, why in without.items() for op in handtuned.ops.OPS if why(op)}
    assert not {op for op, backend in lacking if backend == "triton"}
    assert {(row["op"], row["backend"]) for row in found["kernels"] if not row["built"]} == lacking
    assert not any(row["usable"] and not row["built"] for row in found["kernels"])
    assert found["version"] == handtuned.__version__
    assert found["torch_found"] == torch.__version__
    assert found["isa"] == _C.isa()
    assert found["threads"] == torch.get_num_threads()
    text = str(info)
    for word in (found["cpu"][:20], found["isa"] + " (chosen)", "add_rms_norm_backward", found["torch_built"]):
        assert word in text


def test_info_lists_the_instruction_sets() -> None:
    rows = {row["name"]: row for row in handtuned.info().isas}
    assert {"avx512bf16", "avx512", "avx2", "generic"} <= set(rows)
    assert rows["generic"]["built"]
    assert rows["generic"]["supported"]
    usable = [name for name, row in rows.items() if row["built"] and row["supported"]]
    assert usable == handtuned.testing.available_isas()
    for row in rows.values():
        assert row["needs"]
        assert row["vector_bits"] in ((128, 256, 512) if row["built"] else (0,))


# ---- instruction sets ----------------------------------------------------------------------------------------------


def test_isa_is_forced_and_put_back(isa: str) -> None:
    assert _C.isa() == isa
    assert handtuned.explain(H.layer_norm, X, (8,)).calls[0].served_by.kernel == isa
    with handtuned.testing.isa("generic"):
        assert _C.isa() == "generic"
    with pytest.raises(ZeroDivisionError), handtuned.testing.isa("generic"):
        raise ZeroDivisionError
    assert _C.isa() == isa


def test_isa_that_does_not_exist_or_fit() -> None:
    lacking = [row["name"] for row in _C.isa_table() if not (row["built"] and row["supported"])]
    for name in ("sse9", "", *lacking):
        before = _C.isa()
        remedy = r"is not usable on this machine; use one of: .*generic"
        with pytest.raises(ValueError, match=remedy), handtuned.testing.isa(name):
            pass
        assert _C.isa() == before


@pytest.mark.parametrize("name", ["generic", "avx512", "sse9"])
def test_environment_forces_an_instruction_set(name: str) -> None:
    done = python("import handtuned._C as c; print(c.isa())", HANDTUNED_ISA=name)
    if name in handtuned.testing.available_isas():
        assert done.stdout.strip() == name, done.stderr
    else:
        assert done.returncode != 0
        assert f"HANDTUNED_ISA={name} is not usable on this machine; use one of: " in done.stderr


def test_the_default_is_the_best_available() -> None:
    done = python("import handtuned; print(handtuned.info().isa)")
    assert done.stdout.strip() == handtuned.testing.available_isas()[0], done.stderr


def test_limits_of_the_machine_are_plausible() -> None:
    assert 0.1 < _C.copy_bandwidth(64) < 10_000
    assert 0.1 < _C.multiply_add_rate() < 10_000
    with pytest.raises(ValueError, match="megabytes must be at least 1"):
        _C.copy_bandwidth(0)
