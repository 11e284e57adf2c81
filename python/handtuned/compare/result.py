"""What compare() found, as data. as_json() and from_json() are inverse; the schema is stable within a version.

Its keys, and what they hold:

    schema        1
    machine       cpu, isa, torch, handtuned, platform: strings; threads, cpus: integers; load: the load average of the
                  minute before
    settings      dtype, batch, module (null: all), seconds, rounds (null: as many as fit into seconds)
    rows          one per pass of a group of modules or of a whole model:
        model             the pretrained model's name
        name              module name, with * for the numbers in which the modules of a group differ; "attention,
                          batch <n>"; "whole model, batch <n>", "speaker encoder, batch <n>": all of one; "generation,
                          prefill": a prompt, "generation, decode": tokens one by one behind it
        modules           the names of the modules measured; empty for a whole model
        kind              the replaced class; of attention, the class that calls it
        shape             of the first input: (batch, tokens, width); of attention: (batch, heads, tokens, width of a
                          head); of a whole model: (batch, tokens), of the speaker encoder (batch, frames, mel
                          channels)
        direction         "forward" or "forward+backward"
        error_torch, error_handtuned
                          max |result - float64 result| / max |float64 result|; the worst over modules and tensors. The
                          float64 result comes from the same weights and inputs. forward: outputs; forward+backward:
                          gradients of inputs and parameters
        seconds_torch, seconds_handtuned
                          median time of one call; in a group, the mean over its modules
        ratio             median, p10, p90 of the rounds' ratios torch / handtuned; above 1: handtuned is faster
        ratios            the ratio of every round
        kernels           list of op, backend, kernel, calls: what served each call in one pass over the row's modules
        cosine            whole model: largest 1 - cosine between results of torch and handtuned (between_sides), and
                          of each and the float64 run (torch, handtuned); null for modules
        tokens            generation: tokens of one call, a prompt's or those decoded; null for all others
    left          list of name, type, why: modules that stayed torch's or were not called
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Settings:
    """How to compare. dtype is a name in DTYPES; module is a part of the names of the modules wanted."""

    dtype: str = "float32"
    batch: int = 32
    module: str | None = None
    seconds: float = 30.0
    rounds: int | None = None


@dataclass(frozen=True)
class Machine:
    cpu: str
    isa: str
    threads: int
    torch: str
    handtuned: str
    platform: str
    cpus: int
    load: float


@dataclass(frozen=True)
class Kernel:
    op: str
    backend: str
    kernel: str
    calls: int


@dataclass(frozen=True)
class Ratio:
    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Cosine:
    between_sides: float
    torch: float
    handtuned: float


def title(name: str, modules: int) -> str:
    return f"{name} ×{modules}" if modules > 1 else name


@dataclass(frozen=True)
class Row:
    model: str
    name: str
    modules: list[str]
    kind: str
    shape: list[int]
    direction: str
    error_torch: float
    error_handtuned: float
    seconds_torch: float
    seconds_handtuned: float
    ratio: Ratio
    ratios: list[float]
    kernels: list[Kernel]
    cosine: Cosine | None = None
    tokens: int | None = None

    @property
    def title(self) -> str:
        return title(self.name, len(self.modules))


@dataclass(frozen=True)
class Left:
    name: str
    type: str
    why: str


@dataclass(frozen=True)
class Comparison:
    machine: Machine
    settings: Settings
    rows: list[Row]
    left: list[Left] = field(default_factory=list)

    def as_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Raises ValueError for another schema."""
        data = json.loads(text)
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema is {data['schema']}, this handtuned reads {SCHEMA}")
        return cls(
            Machine(**data["machine"]),
            Settings(**data["settings"]),
            [_row(row) for row in data["rows"]],
            [Left(**left) for left in data["left"]],
        )


def _row(data: dict[str, Any]) -> Row:
    cosine = Cosine(**data["cosine"]) if data["cosine"] else None
    kernels = [Kernel(**kernel) for kernel in data["kernels"]]
    return Row(**{**data, "ratio": Ratio(**data["ratio"]), "kernels": kernels, "cosine": cosine})
