"""What handtuned is compared with: torch eager, torch.compile, onnxruntime, other kernels of torch; all behind `Peer`.

A peer turns a `Case` into a callable without arguments, or says why it cannot (`Unavailable`). The callable returns the
outputs, and behind them the gradients where the case has a backward, so that they can be checked before they are timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]


class Unavailable(Exception):
    """A peer does not have this case; the message says why."""


@dataclass(frozen=True)
class OnnxNode:
    """One ONNX node that computes a case: inputs in the case's order; outputs "" are not computed."""

    op_type: str
    domain: str
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    # Where they differ from the case's: inputs, tensors of the model itself, shape of the output in memory of `result`.
    inputs: Tensors | None = None
    constants: Tensors = ()
    shape: tuple[int, ...] | None = None
    result: tuple[int, ...] | None = None


@dataclass(frozen=True)
class OnnxModel:
    """A graph of nodes (type, domain, inputs, output, attributes) from "input0", the case's first input, to `last`.

    The case's other inputs are parameters, whose values the graph holds: `weights`.
    """

    nodes: tuple[tuple[str, str, tuple[str, ...], str, dict[str, Any]], ...]
    weights: dict[str, Tensor]
    last: str
    # The output is like the input.
    shape: None = None
    result: None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.last,)


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
    onnx: OnnxNode | OnnxModel | None = None
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
    """onnxruntime's CPU provider on one node: inputs bound in place, outputs into buffers allocated once (IOBinding).

    That is the best it can do: it never pays for fresh memory, which under the default allocator all others do.
    """

    name = "onnxruntime"
    pool = "onnxruntime"

    def prepare(self, case: Case) -> Callable[[], Tensors]:
        if case.onnx is None:
            raise Unavailable("forward only" if case.grad_outputs else "has no such op")
        try:
            import onnx
            import onnxruntime  # type: ignore[import-untyped,unused-ignore]
        except ImportError as error:
            raise Unavailable(f"not installed: {error}") from error

        given = case.inputs[:1] if isinstance(case.onnx, OnnxModel) else case.onnx.inputs or case.inputs
        tensors = [tensor.detach() for tensor in given]
        kind = {torch.float32: onnx.TensorProto.FLOAT, torch.bfloat16: onnx.TensorProto.BFLOAT16}[case.dtype]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Its idle threads would spin on the cores that the other peers are timed on.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(
                _model(case.onnx, kind, tensors), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise Unavailable(f"no CPU kernel: {_first_line(error)}") from error
        binding = session.io_binding()
        like = tensors[0]
        results = tuple(like.new_empty(case.onnx.result or like.shape) for name in case.onnx.outputs if name)
        shape = list(case.onnx.shape or like.shape)
        for value, tensor in zip(session.get_inputs(), tensors, strict=True):
            binding.bind_input(value.name, "cpu", 0, kind, list(tensor.shape), tensor.data_ptr())
        for value, tensor in zip(session.get_outputs(), results, strict=True):
            binding.bind_output(value.name, "cpu", 0, kind, shape, tensor.data_ptr())
        run = session.run_with_iobinding

        def call() -> Tensors:
            run(binding)
            return results

        # The binding holds addresses only; the tensors must live as long as it does.
        call.keep_alive = tensors  # type: ignore[attr-defined]
        return call


def _model(graph: OnnxNode | OnnxModel, kind: int, tensors: list[Tensor]) -> bytes:
    from onnx import helper, numpy_helper

    names = [f"input{i}" for i in range(len(tensors))]
    if isinstance(graph, OnnxNode):
        constants = {f"constant{i}": t.detach() for i, t in enumerate(graph.constants)}
        # A recurrent node takes its weights second, and its state behind sequence lengths that are not given.
        order = [names[0], *constants, "", *names[1:]] if constants else names
        nodes = [helper.make_node(graph.op_type, order, graph.outputs, domain=graph.domain, **graph.attributes)]
        shape = graph.shape or tensors[0].shape
    else:
        nodes = [
            helper.make_node(op_type, inputs, [output], domain=domain, **attributes)
            for op_type, domain, inputs, output, attributes in graph.nodes
        ]
        constants, shape = graph.weights, tensors[0].shape
    made = helper.make_graph(
        nodes,
        "case",
        [helper.make_tensor_value_info(name, kind, t.shape) for name, t in zip(names, tensors, strict=True)],
        [helper.make_tensor_value_info(name, kind, shape) for name in graph.outputs if name],
        [numpy_helper.from_array(t.numpy(), name) for name, t in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


OURS = Handtuned.name
EAGER = Eager.name
PEERS: tuple[Peer, ...] = (Eager(), Handtuned(), Compiled(), OnnxRuntime())
LINEAR_PEERS: tuple[Peer, ...] = (Eager(), Handtuned(), Compiled(), Int8())
ATTENTION_PEERS: tuple[Peer, ...] = (Eager(), Handtuned(), Math(), Flex())
TRANSFORMER_PEERS: tuple[Peer, ...] = (WithoutFastPath(), Handtuned(), FastPath(), Compiled(), OnnxRuntime())
RNN_PEERS: tuple[Peer, ...] = (Eager(), Handtuned(), Cells(), OnnxRuntime(), PlainLayer())
