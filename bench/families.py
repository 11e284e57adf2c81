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
    peers: tuple[tuple[str, str], tuple[str, str]]
    share: str
    notes: str

    @property
    def columns(self) -> tuple[str, ...]:
        (first, _), (second, _) = self.peers
        measured = ("torch µs", "handtuned µs", "vs eager", first, second)
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
RNN = Family(
    "rnn",
    "Recurrent benchmarks",
    (("vs cells", "torch cells"), ("vs onnxruntime", "onnxruntime")),
    "% of FMA peak",
    _COMMON + "torch eager is the operator below torch.nn.LSTM, GRU or RNN (oneDNN where torch has it), rows of "
    "several lengths as a PackedSequence; cells are torch's LSTMCell, GRUCell or RNNCell in a loop. Shapes are steps x "
    "batch x input x hidden. In inference weights are packed before the timing, as by a module; training packs in "
    "each call. Operations are 2·(input + state)·gates·hidden a valid step forward, three times that with backward. "
    "With one row the limit is in truth how fast weights come from the cache. onnxruntime has its weights as constants "
    "and writes into buffers allocated once. Faults are page faults per call.",
)
FAMILIES = {family.name: family for family in (NORM, ATTENTION, RNN)}
