"""Compilers and exporters: every module and function in one graph of inductor for all sizes, and out of torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compile_subjects as cs
import pytest
import torch
from torch import Tensor

import handtuned
from handtuned import nn, ops

# Batches and lengths: no two alike, none equal to another size of the models, which torch would take for the same.
SIZES = [(4 + i % 5, 9 + (5 * i) % 21) for i in range(20)]
PACKING = {"linear_pack", "linear_int8_pack"}  # of weights that stay: beside inference, not in a graph


@pytest.fixture(autouse=True)
def rnn_allowed() -> Iterator[None]:
    """torch's tracer refuses LSTM, GRU, RNN and all subclasses unless told otherwise; it asks when it traces."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch.compiler.reset()


def result_and_grads(module: torch.nn.Module, run: Any, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    first = inputs[0].clone().requires_grad_()
    output = run(first, *inputs[1:])
    weights = dict(module.named_parameters())
    incoming = torch.linspace(-1, 1, output.numel()).view(output.shape)
    grads = torch.autograd.grad(output, [first, *weights.values()], incoming)
    return dict(zip(["output", "grad of input", *weights], [output.detach(), *grads], strict=True))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """The ops that compiled models were seen to run."""
    return set()


@pytest.mark.parametrize("name", cs.SUBJECTS)
def test_one_graph_for_all_sizes(name: str, seen: set[str]) -> None:
    """Values and gradients, by inductor, and no second compilation."""
    make, draw = cs.SUBJECTS[name]
    module = make()
    # Tools are torch's own ops, and many; what is in the transformer, inductor gets with the encoder.
    backend = "aot_eager" if name in ("tools", "transformer") else "inductor"
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for number, size in enumerate(SIZES):
        inputs = draw(*size)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            found = result_and_grads(module, compiled, inputs)
        if number in (0, 7, 19):
            assert_close(found, result_and_grads(module, module, inputs))
    with torch.profiler.profile() as profile:
        result_and_grads(module, compiled, inputs)
    seen.add(name)
    seen.update(e.key.removeprefix("handtuned::") for e in profile.key_averages() if e.key.startswith("handtuned::"))


def test_inference_in_one_graph(seen: set[str]) -> None:
    """The other form that most ops have without gradients, and a step with a cache."""
    names = ("norms", "linears", "recurrent")
    modules = [cs.Step().eval(), *(cs.SUBJECTS[name][0]().eval() for name in names)]
    drawn = [cs.step_inputs, *(cs.SUBJECTS[name][1] for name in names)]
    with torch.no_grad():
        for module, draw in zip(modules, drawn, strict=True):
            compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
            for number, size in enumerate(SIZES[:5]):
                inputs = draw(*size)
                expected = module(*(x.clone() for x in inputs))
                with torch._dynamo.config.patch(error_on_recompile=number > 0):
                    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-5)
            with torch.profiler.profile() as profile:
                compiled(*inputs)
            seen.update(e.key.removeprefix("handtuned::") for e in profile.key_averages())


def test_every_op_was_compiled(seen: set[str]) -> None:
    if set(cs.SUBJECTS) <= seen:  # where all of the tests above were chosen
        assert set(ops.OPS) - PACKING - seen == {"rnn_cell"}  # that is the straight way of a call that is not traced


def test_recurrent_modules_need_no_switch_outside_one_graph(rnn_allowed: None) -> None:
    """Without it torch runs the module between two graphs; functions, cells and exported modules are not refused."""
    with torch._dynamo.config.patch(allow_rnn=False):
        model = torch.nn.Sequential(nn.Linear(3, 4), nn.GRU(4, 5))
        x = torch.randn(6, 2, 3)
        assert torch.equal(torch.compile(model, backend="aot_eager")(x)[0], model(x)[0])
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="allow_rnn"):
            torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        exported = torch.export.export(model.eval(), (x,)).module()
        assert torch.equal(torch.compile(exported, fullgraph=True, backend="aot_eager")(x)[0], model(x)[0])


# ---- out of Python ---------------------------------------------------------------------------------------------------


class Tagger(torch.nn.Module):
    """An attention encoder and an LSTM behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.lstm = cs.Encoder(), nn.LSTM(cs.WIDTH, 8, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.lstm(self.encoder(x, padding))[0]


@pytest.fixture(scope="module")
def exported() -> tuple[torch.nn.Module, torch.export.ExportedProgram]:
    torch.manual_seed(0)
    model = Tagger().eval()
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=64)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    with torch.no_grad():
        return model, torch.export.export(model, cs.encoder_inputs(*SIZES[0]), dynamic_shapes=shapes)


FRESH = """
import sys
import torch, handtuned
inputs, expected = torch.load(sys.argv[2])
if sys.argv[1].endswith(".pt2") and "aoti" in sys.argv[1]:
    run = torch._inductor.aoti_load_package(sys.argv[1])
elif sys.argv[1].endswith(".pt2"):
    run = torch.export.load(sys.argv[1]).module()
else:
    run = torch.jit.load(sys.argv[1])
with torch.no_grad():
    for x, y in zip(inputs, expected):
        torch.testing.assert_close(run(*x), y, rtol=1e-4, atol=1e-5)
print("same")
"""


def runs_in_a_fresh_process(model: torch.nn.Module, saved: Path) -> None:
    inputs = [cs.encoder_inputs(*size) for size in SIZES[:4]]
    with torch.no_grad():
        torch.save((inputs, [model(*x) for x in inputs]), saved.parent / "expected")
    command = [sys.executable, "-c", FRESH, str(saved), str(saved.parent / "expected")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.stdout == "same\n", done.stderr


def test_exported_and_loaded(exported: Any, tmp_path: Path) -> None:
    model, program = exported
    torch.export.save(program, tmp_path / "model.pt2")
    runs_in_a_fresh_process(model, tmp_path / "model.pt2")


def test_compiled_ahead_of_time_and_loaded(exported: Any, tmp_path: Path) -> None:
    model, program = exported
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "aoti.pt2"))
    runs_in_a_fresh_process(model, tmp_path / "aoti.pt2")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_and_loaded(tmp_path: Path) -> None:
    """torch.jit.trace keeps sizes that are Python numbers, as of any model; those of the ops stay free."""
    model = torch.nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GRU(8, 6)).eval()
    x = torch.randn(7, 3, 5)
    with torch.no_grad():
        model(x)  # keeps packed weights, of which a trace must know nothing
        traced = torch.jit.trace(model, x)
        torch.jit.save(traced, tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
        for size in ((7, 3, 5), (4, 9, 5)):
            x = torch.randn(size)
            torch.testing.assert_close(loaded(x)[0], model(x)[0])


@pytest.mark.filterwarnings("ignore")  # of torch's older exporter, which needs no further package
def test_onnx_through_the_twins(tmp_path: Path) -> None:
    """undo() gives torch's classes back, which exporters know; parameters are the same objects all the while."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.LayerNorm(8), torch.nn.LSTM(8, 6, bidirectional=True))
    report = handtuned.replace(model.eval())
    state = {name: id(p) for name, p in model.named_parameters()}
    x, path = torch.randn(7, 3, 5), str(tmp_path / "model.onnx")
    report.undo()
    axes = {"x": {0: "steps", 1: "batch"}}
    torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    report.redo()
    assert {name: id(p) for name, p in model.named_parameters()} == state
    session = onnxruntime.InferenceSession(path)
    with torch.no_grad():
        for size in ((7, 3, 5), (4, 9, 5)):
            x = torch.randn(size)
            found = session.run(None, {"x": x.numpy()})[0]
            torch.testing.assert_close(torch.from_numpy(found), model(x)[0], rtol=1e-4, atol=1e-5)
