"""Tile sizes of the Triton kernels: the committed tables and the user's own. tune_tiles.py measures and writes those.

`lookup` never measures anything: it reads tuned/norm.json, which ships with the package and was chosen by a model, not
measured (the file says how), or the file that an explicit tune() left in the user's cache directory, which wins.

A table maps architecture -> kernel -> bytes per element -> bucket -> [tile, rows, warps, stages]. The bucket is the row
length rounded up to a power of two, or "long" for rows of more columns than the largest bucket.
"""

import contextlib
import functools
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

Table = dict[str, dict[str, dict[str, dict[str, list[int]]]]]

SMALLEST_TILE = 128  # one block of the dropout generator
COMMITTED = Path(__file__).parent / "tuned" / "norm.json"
KERNELS = ("forward", "backward", "row_sums", "partials")


class Config(NamedTuple):
    tile: int  # columns of a tile, a power of two of at least 128
    rows: int  # rows of a tile, a power of two
    warps: int
    stages: int  # depth of software pipelining of the kernel's loops, 1: none


_notes: list[str] | None = None


@contextlib.contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """Inside, what launchers choose is written there, for explain()."""
    global _notes
    before, _notes = _notes, notes
    try:
        yield
    finally:
        _notes = before


def note(text: str) -> None:
    if _notes is not None and text not in _notes:
        _notes.append(text)


def _note_tile(kernel: str, config: Any, arch: str, tuned: bool = False) -> None:
    if _notes is not None:
        tile = ", ".join(f"{name} {value}" for name, value in config._asdict().items())
        note(f"{kernel} kernel: {tile} ({'your tuned' if tuned else 'the committed'} table of {_table_name(arch)})")


def lookup(kernel: str, cols: int, itemsize: int, device: torch.device) -> Config:
    """The tile for rows of `cols` elements of `itemsize` bytes: the user's measured one, else the committed one."""
    arch = architecture(device)
    config = _lookup(kernel, cols, itemsize, arch)
    _note_tile(kernel, config, arch)
    return config


@functools.lru_cache(maxsize=4096)
def _lookup(kernel: str, cols: int, itemsize: int, arch: str) -> Config:
    user = _user_table().get(arch, {}).get(kernel, {}).get(str(itemsize), {})
    committed = _committed_table()[_table_name(arch)][kernel][str(itemsize)]
    name = bucket(cols, committed)
    return Config(*user.get(name, committed[name]))


def bucket(cols: int, buckets: Iterable[str]) -> str:
    tile = str(max(SMALLEST_TILE, triton.next_power_of_2(cols)))
    return tile if tile in buckets else "long"


@functools.lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """sm80, sm90, gfx942 ...; "default" for the CPU, where only the interpreter runs."""
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


# ---- attention -------------------------------------------------------------------------------------------------------


class AttentionConfig(NamedTuple):
    rows: int  # of a tile
    keys: int
    warps: int
    stages: int
    widest: int  # block of a row; wider rows go block by block
    descriptors: int = 0  # 1: what a kernel walks over comes through tensor descriptors, where they can be had


def attention(kernel: str, width: int, value_width: int, query: torch.Tensor) -> AttentionConfig:
    """The committed tile of an attention kernel for rows of this many elements."""
    arch = architecture(query.device)
    keys = (arch, kernel, str(query.element_size()), str(attention_bucket(max(width, value_width))))
    config, tuned = _tile("attention", keys)
    _note_tile(kernel, AttentionConfig(*config), arch, tuned)
    return AttentionConfig(*config)


def attention_bucket(width: int) -> int:
    return max(32, int(triton.next_power_of_2(width)))


def careful(config: AttentionConfig) -> AttentionConfig:
    """For the rare second try of tiles that met a NaN: the same rows, few keys, nothing in flight."""
    return config._replace(keys=16, stages=1)


def careful_rows(config: AttentionConfig) -> AttentionConfig:
    """The same where a program keeps its keys."""
    return config._replace(rows=16, stages=1)


# ---- recurrent layers ------------------------------------------------------------------------------------------------


class RnnConfig(NamedTuple):
    rows: int  # of the batch, in a tile
    units: int
    depth: int  # of a product's blocks
    warps: int
    stages: int


ONE_PROGRAM = 256 * 1024  # bytes of W_hh that one program reads at each step, from its caches


def one_program(gates: int, hidden: int, width: int, itemsize: int) -> bool:
    """Whether a program takes all units of its rows, and with them all steps, in one launch."""
    size = gates * hidden * width * itemsize
    fits = width == hidden and size <= ONE_PROGRAM
    why = f"W_hh of a direction has {size} bytes, the limit is {ONE_PROGRAM}" if width == hidden else "a projection"
    note(f"{'one launch for all steps' if fits else 'a launch for each step'}: {why}")
    return fits


def rnn(kernel: str, input: torch.Tensor) -> RnnConfig:
    """The committed tile of a recurrent kernel: "forward" or "backward", or with _options where something is drawn."""
    arch = architecture(input.device)
    config, tuned = _tile("rnn", (arch, kernel, str(input.element_size())))
    _note_tile(kernel, RnnConfig(*config), arch, tuned)
    return RnnConfig(*config)


# ---- tables of attention and recurrent layers ------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _tile(family: str, keys: tuple[str, ...]) -> tuple[list[int], bool]:
    """(an entry of a family's table, whether it is the user's); keys: the architecture, then those of the table."""
    found = _entry(_user_tiles(family), keys)
    if found is not None:
        return found, True
    committed = _entry(_committed_tiles(family), (_table_name(keys[0]), *keys[1:]))
    assert committed is not None, keys
    return committed, False


def _entry(table: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        table = None if table is None else table.get(key)
    return table


@functools.cache
def _committed_tiles(family: str) -> Any:
    return json.loads((COMMITTED.parent / f"{family}.json").read_text())["tables"]


@functools.cache
def _user_tiles(family: str) -> Any:
    path = user_file(family)
    try:
        return json.loads(path.read_text())["tables"] if path.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path} is not a tuning table ({error}); the committed one is used. Delete it or tune again.", stacklevel=2
        )
        return {}


def try_tile(family: str, keys: tuple[str, ...], tile: tuple[int, ...]) -> None:
    """Until forget(), lookups find this tile."""
    forget()
    table = _user_tiles(family)
    for key in keys[:-1]:
        table = table.setdefault(key, {})
    table[keys[-1]] = list(tile)


def save_tile(family: str, keys: tuple[str, ...], tile: tuple[int, ...]) -> None:
    try_tile(family, keys, tile)
    write(user_file(family), _user_tiles(family))


def _table_name(arch: str) -> str:
    """The committed table that serves an architecture: its own, its generation's data centre part's, or default."""
    if arch in _committed_table():
        return arch
    generation = {"sm8": "sm80", "sm9": "sm90", "sm10": "sm100", "sm11": "sm100", "sm12": "sm100", "gfx9": "gfx942"}
    return next((table for prefix, table in generation.items() if arch.startswith(prefix)), "default")


@functools.cache
def _committed_table() -> Table:
    tables: Table = json.loads(COMMITTED.read_text())["tables"]
    return tables


# ---- the user's table ------------------------------------------------------------------------------------------------


def user_file(family: str = "norm") -> Path:
    """Where tune() writes: $HANDTUNED_CACHE_DIR, or handtuned/ in the platform's cache directory."""
    name = f"triton_{family}.json"
    if root := os.environ.get("HANDTUNED_CACHE_DIR"):
        return Path(root) / name
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "handtuned" / name


@functools.cache
def _user_table() -> Table:
    path = user_file()
    if not path.exists():
        return {}
    try:
        table: Table = json.loads(path.read_text())["tables"]
        for config in _configs(table):
            _check(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is not a tuning table ({error}); the committed one is used. Delete it or tune again.",
            stacklevel=2,
        )
        return {}
    return table


def _configs(table: Table) -> Iterator[list[int]]:
    for kernels in table.values():
        for widths in kernels.values():
            for buckets in widths.values():
                yield from buckets.values()


def _check(config: list[int]) -> None:
    tile, rows, warps, stages = config
    for name, value, least in (("tile", tile, SMALLEST_TILE), ("rows", rows, 1), ("warps", warps, 1)):
        if not isinstance(value, int) or value < least or value & (value - 1):
            raise ValueError(f"{name} is {value}, expected a power of two of at least {least}")
    if not isinstance(stages, int) or stages < 1:
        raise ValueError(f"stages is {stages}, expected at least 1")


def forget() -> None:
    """Drop what was read, so that the next lookup reads the files again."""
    _lookup.cache_clear()
    _user_table.cache_clear()
    _tile.cache_clear()
    _user_tiles.cache_clear()


def write(path: Path, tables: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"torch": torch.__version__, "triton": triton.__version__, "tables": tables}, indent=1))
    part.replace(path)  # whole or not at all, whoever reads meanwhile
    forget()
