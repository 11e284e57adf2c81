"""What handtuned is compared with: torch eager, torch.compile, onnxruntime, other kernels of torch; all behind `Peer`.

A peer turns a `Case` into a callable without arguments, or says why it cannot (`Unavailable`). The callable returns the
outputs, and behind them the gradients where the case has a backward, so that they can be checked before they are timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]


class Unavailable(Exception):
    """A peer does not have this case; the message says why."""


@dataclass(frozen=True)
class OnnxNode:
    """One node of a graph: names of what goes in ("" is left out) and comes out ("" is not computed)."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    domain: str = ""


@dataclass(frozen=True)
class OnnxGraph:
    """Nodes that compute a case from its inputs, "input0" and so on, and from constants that the graph holds."""

    nodes: tuple[OnnxNode, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Tensor] = field(default_factory=dict)
    inputs: Tensors | None = None  # where they are not the case's
    # Of every output: the graph's shape, and that of `result` in memory. None: the first input's.
    shape: tuple[int, ...] | None = None
    result: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Case:
    """One op on one set of tensors. `grad_outputs` None: forward only, without autograd."""

    op: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    eager: Function
    ours: Function
    inputs: Tensors
    grad_outputs: Tensors | None = None
    onnx: OnnxGraph | None = None
    module: torch.nn.Module | None = None  # a function of `module_inputs`, for tools that take whole modules
    module_inputs: Tensors = ()
    no_compile: str = ""  # why torch.compile is left out, if it is
    random: bool = False  # no two runs give the same result
    math: Function | str = "has no such op"  # torch's unfused attention, or why not
    flex: Function | str = "has no such op"  # flex_attention, not yet compiled, or why not
    fast_path: bool = False  # torch's modules have one for it
    freeze: bool = False  # torch.compile may take the parameters for constants
    cells: Function | str = "has no such op"  # torch's cell called step by step, or why not
    int8: Function | str = "has no such op"  # torch's product with an int8 weight, or why not
    plain: Case | None = None  # of a variant: the same without it

    def mode(self) -> contextlib.AbstractContextManager[object]:
        return torch.no_grad() if self.grad_outputs is None else contextlib.nullcontext()

    def bind(self, function: Function) -> Callable[[], Tensors]:
        """function on the inputs, forward or forward and backward."""
        inputs, grad_outputs = self.inputs, self.grad_outputs
        if grad_outputs is None:
            return lambda: function(*inputs)

        def forward_backward() -> Tensors:
            outputs = function(*inputs)
            return outputs + torch.autograd.grad(outputs, inputs, grad_outputs)

        return forward_backward


class Peer(Protocol):
    name: str
    pool: str

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        """The callable to time, compiled and bound; raises Unavailable."""


class Handtuned:
    name = "handtuned"
    pool = "openmp"

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        return case.bind(case.ours)


class Eager:
    name = "torch eager"
    pool = "openmp"

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        return case.bind(case.eager)


class WithoutFastPath(Eager):
    """torch's modules as they train, without the fused inference of whole layers."""

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        call = case.bind(case.eager)

        def without() -> Tensors:
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                return call()
            finally:
                torch.backends.mha.set_fastpath_enabled(True)

        return without


class FastPath:
    """torch's modules as they are called for inference: whole layers fused, padding left out as nested tensors."""

    name = "torch fast path"
    pool = "openmp"

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        if not case.fast_path:
            raise Unavailable("forward only")
        return case.bind(case.eager)


class Compiled:
    """torch.compile with static shapes, one graph."""

    name = "torch.compile"
    pool = "openmp"

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        return _compiled(case, case.eager)


class Math:
    """torch's unfused attention kernel, which it takes itself where its fused one lacks something."""

    name = "torch math"
    pool = "openmp"

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        if isinstance(case.math, str):
            raise Unavailable(case.math)
        return case.bind(case.math)


class Flex:
    """flex_attention under torch.compile: without it, it is not fused."""

    name = "flex, compiled"
    pool = "openmp"

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        if isinstance(case.flex, str):
            raise Unavailable(case.flex)
        return _compiled(case, case.flex)


class Cells:
    """torch's LSTMCell, GRUCell or RNNCell in a loop over the steps."""

    name = "torch cells"
    pool = "openmp"

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        if isinstance(case.cells, str):
            raise Unavailable(case.cells)
        return case.bind(case.cells)


class Int8:
    """torch's operators with the same int8 weight, the input as it is or quantised as well."""

    name = "torch int8"
    pool = "openmp"

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        if isinstance(case.int8, str):
            raise Unavailable(case.int8)
        return case.bind(case.int8)


class PlainLayer:
    """handtuned's own layer without the variant that is measured; other results, as much of the work."""

    name = "plain layer"
    pool = "openmp"

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        if case.plain is None:
            raise Unavailable("is one")
        return case.plain.bind(case.plain.ours)


def _compiled(case: Case, function: Function) -> Callable[[], Tensors]:
    if case.no_compile:
        raise Unavailable(case.no_compile)
    import torch._inductor.config

    # Worker processes would sit on the cores that are being measured.
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()
    call = case.bind(torch.compile(function, dynamic=False, fullgraph=True))
    try:
        with case.mode(), torch._inductor.config.patch(freezing=case.freeze):
            call()
    except Exception as error:
        raise Unavailable(f"torch.compile failed: {_first_line(error)}") from error
    return call


class OnnxRuntime:
    """onnxruntime's CPU provider on a graph: inputs bound in place, outputs into buffers allocated once (IOBinding).

    That is the best it can do: it never pays for fresh memory, which under the default allocator all others do.
    """

    name = "onnxruntime"
    pool = "onnxruntime"

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        if case.onnx is None:
            raise Unavailable("forward only" if case.grad_outputs else "has no such op")
        try:
            import onnx  # noqa: F401 (the graph is made with it)
            import onnxruntime  # type: ignore[import-untyped,unused-ignore]
        except ImportError as error:
            raise Unavailable(f"not installed: {error}") from error

        tensors = [tensor.detach() for tensor in case.onnx.inputs or case.inputs]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Its idle threads would spin on the cores that the other peers are timed on.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(
                _model(case.onnx, tensors, case.dtype), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise Unavailable(f"no CPU kernel: {_first_line(error)}") from error
        binding = session.io_binding()
        like = tensors[0]
        names = [name for name in case.onnx.outputs if name]
        results = tuple(like.new_empty(case.onnx.result or like.shape, dtype=case.dtype) for _ in names)
        for name, tensor in zip((value.name for value in session.get_inputs()), tensors, strict=True):
            binding.bind_input(name, "cpu", 0, _onnx_type(tensor.dtype), list(tensor.shape), tensor.data_ptr())
        shape = list(case.onnx.shape or like.shape)
        for name, tensor in zip(names, results, strict=True):
            binding.bind_output(name, "cpu", 0, _onnx_type(case.dtype), shape, tensor.data_ptr())
        run = session.run_with_iobinding

        def call() -> Tensors:
            run(binding)
            return results

        # The binding holds addresses only; the tensors must live as long as it does.
        call.keep_alive = tensors  # type: ignore[attr-defined]
        return call


def _onnx_type(dtype: torch.dtype) -> int:
    from onnx import TensorProto

    kinds = {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16, torch.int32: TensorProto.INT32}
    return int(kinds[dtype])


def _model(graph: OnnxGraph, tensors: list[Tensor], dtype: torch.dtype) -> bytes:
    from onnx import helper, numpy_helper

    def declared(name: str, of: torch.dtype, shape: Sequence[int]) -> Any:
        return helper.make_tensor_value_info(name, _onnx_type(of), shape)

    made = helper.make_graph(
        [helper.make_node(n.op_type, n.inputs, n.outputs, domain=n.domain, **n.attributes) for n in graph.nodes],
        "case",
        [declared(f"input{i}", t.dtype, t.shape) for i, t in enumerate(tensors)],
        [declared(name, dtype, graph.shape or tensors[0].shape) for name in graph.outputs if name],
        [numpy_helper.from_array(t.detach().numpy(), name) for name, t in graph.constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


class OpenVino:
    """OpenVINO's CPU plugin on the whole module, converted with its weights as constants, in float32 throughout."""

    name = "OpenVINO"
    pool = "openvino"

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        if case.module is None:
            raise Unavailable("float32 modules, forward only")
        try:
            import openvino  # type: ignore[import-not-found,import-untyped,unused-ignore]
        except ImportError as error:
            raise Unavailable(f"not installed: {error}; pip install openvino") from error
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        torch.backends.mha.set_fastpath_enabled(False)  # it would be traced
        try:
            model = openvino.convert_model(case.module, example_input=case.module_inputs)
            request = openvino.compile_model(model, "CPU", settings).create_infer_request()
        except Exception as error:
            raise Unavailable(f"cannot be converted: {_first_line(error)}") from error
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        tensors = [openvino.Tensor(tensor.detach().numpy(), shared_memory=True) for tensor in case.module_inputs]
        for i, tensor in enumerate(tensors):
            request.set_input_tensor(i, tensor)
        request.infer()
        result = torch.from_numpy(request.get_output_tensor(0).data)

        def call() -> Tensors:
            request.infer()
            return (result,)

        # The request holds addresses only; the tensors must live as long as it does.
        call.keep_alive = tensors  # type: ignore[attr-defined]
        return call


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


OURS = Handtuned.name
EAGER = Eager.name
PEERS: tuple[Peer, ...] = (Eager(), Handtuned(), Compiled(), OnnxRuntime())
LINEAR_PEERS: tuple[Peer, ...] = (Eager(), Handtuned(), Compiled(), Int8())
ATTENTION_PEERS: tuple[Peer, ...] = (Eager(), Handtuned(), Math(), Flex())
TRANSFORMER_PEERS: tuple[Peer, ...] = (
    WithoutFastPath(),
    Handtuned(),
    FastPath(),
    Compiled(),
    OnnxRuntime(),
    OpenVino(),
)
RNN_PEERS: tuple[Peer, ...] = (Eager(), Handtuned(), Cells(), OnnxRuntime(), PlainLayer())
