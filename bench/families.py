"""The families that are benchmarked: what their tables are called, and which peers they show beside torch eager."""

from __future__ import annotations

from dataclasses import dataclass

_COMMON = (
    "A ratio is the peer's time over handtuned's: above 1 handtuned is faster. All peers run in one process in turns; "
    "the figure is the median over rounds of the ratio within a round, in brackets the 10–90 % spread. Every result "
    "was checked against float64 on the tensors that were timed. "
)


@dataclass(frozen=True)
class Family:
    """peers: the columns after "vs eager", as (heading, name of the peer). share: heading of the share of a limit."""

    name: str
    title: str
    peers: tuple[tuple[str, str], ...]
    share: str
    notes: str

    @property
    def numbers(self) -> range:
        """The columns that hold numbers."""
        return range(3, len(self.columns) - 1)

    @property
    def columns(self) -> tuple[str, ...]:
        measured = ("torch µs", "handtuned µs", "vs eager", *(heading for heading, _ in self.peers))
        shown = (f"{self.share}: torch → ours", "faults: torch → ours", "target", "")
        return ("op", "dtype", "shape", *measured, *shown)


NORM = Family(
    "norm",
    "Norm benchmarks",
    (("vs compile", "torch.compile"), ("vs onnxruntime", "onnxruntime")),
    "copy %",
    _COMMON + "% of copy is the least traffic that the op needs, by the time it took, against the copy bandwidth "
    "measured in the same run; small shapes stay in the caches and may exceed 100. onnxruntime writes into buffers "
    "allocated once, so it never pays for fresh memory, which the others do under the default allocator. Faults are "
    "page faults per call.",
)
ATTENTION = Family(
    "attention",
    "Attention benchmarks",
    (("vs math", "torch math"), ("vs flex", "flex, compiled")),
    "% of limit",
    _COMMON + "torch eager is F.scaled_dot_product_attention, left to choose its kernel; where it lacks the feature, "
    "what a torch user writes instead. math is its unfused kernel, flex is flex_attention under torch.compile, which "
    "on CPU has no backward. Shapes are batch x heads x tokens x head dim; heads/kv heads where they differ, "
    "queries/keys likewise. The limit of decode rows is the read bandwidth, of the bytes of keys and values; of "
    "all others the multiply-add peak of all threads, of float32 or, for bf16 rows, of what the processor multiplies "
    "bf16 with, all measured in the same run. Operations are useful ones: "
    "4·heads·queries·keys·dim forward, pairs that are masked out not counted, 3.5 times that with the backward. "
    "Faults are page faults per call.",
)
TRANSFORMER = Family(
    "transformer",
    "Transformer benchmarks",
    (
        ("vs fast path", "torch fast path"),
        ("vs compile", "torch.compile"),
        ("vs onnxruntime", "onnxruntime"),
        ("vs OpenVINO", "OpenVINO"),
    ),
    "% of limit",
    _COMMON
    + "Shapes are batch x tokens x width; heads are 64 wide, 32 at width 384, feed-forwards four times the width. "
    "torch eager is torch.nn's module with its fast path switched off, the fast path the same module as it comes. "
    "torch.compile takes the parameters for constants in forward rows. onnxruntime's graph is made of its own fused "
    "nodes; OpenVINO converts the module and is no requirement: pip install openvino for its column. MiniLM is a whole "
    "model on real sentences, from ids to hidden states. The limit is the multiply-add peak of all threads, of float32 "
    "or, for bf16 rows, of what the processor multiplies bf16 with, measured in the same run; operations are useful "
    "ones, those of padding not counted. Faults are page faults per call.",
)
LINEAR = Family(
    "linear",
    "Linear benchmarks",
    (("vs compile", "torch.compile"), ("vs torch int8", "torch int8")),
    "% of limit",
    _COMMON
    + "Shapes are rows x in x out. Forward rows have their weight packed once, as the module keeps it; rows with "
    "the backward pack in every call. The limit of one row is the read bandwidth, of the bytes of the weight; of all "
    "others the multiply-add peak of all threads, of float32 or, for bf16 rows, of what the processor multiplies bf16 "
    "with. Cross-entropy rows are rows x in x classes; torch keeps the logits for the backward, handtuned makes them "
    "again, which is not counted as work. torch eager has the dequantised weight in int8 rows, torch int8 the same "
    "int8 weight: _weight_int8pack_mm, or quantized.linear_dynamic where the input is quantised too. Faults are page "
    "faults per call.",
)
RNN = Family(
    "rnn",
    "Recurrent benchmarks",
    (("vs cells", "torch cells"), ("vs onnxruntime", "onnxruntime"), ("vs plain", "plain layer")),
    "% of FMA peak",
    _COMMON
    + "torch eager is the operator below torch.nn.LSTM, GRU or RNN (oneDNN where torch has it), rows of several "
    "lengths as a PackedSequence; cells are torch's LSTMCell, GRUCell or RNNCell in a loop. Of variants, which torch "
    "does not have, torch eager is the formula in its operators, step by step, and plain is handtuned's layer without "
    "the option. Shapes are steps x batch "
    "x input x hidden. Weights are packed before the timing starts in inference, as a module does, and in each round "
    "trip of forward and backward. Operations are 2·(input + state)·gates·hidden a valid step forward, three times "
    "that with the backward. With one row the limit is in truth how fast weights come from the cache. onnxruntime has "
    "its weights as constants and writes into buffers allocated once. Faults are page faults per call.",
)
FAMILIES = {family.name: family for family in (NORM, ATTENTION, LINEAR, RNN, TRANSFORMER)}
