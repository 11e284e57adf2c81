"""Wrong arguments end in the exceptions that are documented, never in a crash or a call that does not return.

Two runs of fuzz/run.py, each in a process of its own: what hypothesis draws, on the library as it is; and, with the
sanitizers in the C++ code, what a search for code that was not reached yet draws. For a longer hunt set
HANDTUNED_FUZZ_SEED and HANDTUNED_FUZZ_CALLS; a word that was found is replayed with --replay.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import handtuned
from handtuned import flash_attn, nn

ROOT = Path(__file__).resolve().parents[1]
RUN = Path(__file__).parent / "fuzz" / "run.py"
CALLS = int(os.environ.get("HANDTUNED_FUZZ_CALLS", 2000))
SEED = int(os.environ.get("HANDTUNED_FUZZ_SEED", 1))


def fuzzed(way: str, folder: Path, *options: str, **environment: str) -> str:
    last = folder / "last"
    given = ["--seed", str(SEED), "--calls", str(CALLS), "--last", str(last), *options]
    done = subprocess.run(
        [sys.executable, str(RUN), *given],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240 + CALLS / 10,
    )
    word = last.read_text().strip() if last.exists() else ""
    said = f"{way}, seed {SEED}, status {done.returncode}, last word {word}"
    assert done.returncode == 0, f"{said}\n{done.stdout[-500:]}\n{done.stderr[-6000:]}"
    return done.stdout


def test_every_public_name_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from fuzz import grammar

    rights = grammar.right_calls()
    called = {getattr(right.run, "__name__", "") for right in rights} | {right.name.split("::")[-1] for right in rights}
    for module in (nn.functional, flash_attn):
        assert set(module.__all__) <= called
    assert {f"{name}()" for name in nn.__all__ if name != "functional"} <= called
    assert set(handtuned.ops.OPS) <= called


def test_what_hypothesis_draws(tmp_path: Path) -> None:
    assert "as documented" in fuzzed("hypothesis", tmp_path)


@pytest.mark.skipif("avx2" not in handtuned.testing.available_isas(), reason="its kernels are those for AVX2")
@pytest.mark.parametrize("source", ["avx2", "avx512"])
def test_what_reaches_new_code_under_sanitizers(source: str, tmp_path: Path) -> None:
    """The AVX-512 source with its instructions where the CPU has them, else emulated (fuzz/CMakeLists.txt)."""
    extension = next((ROOT / "build" / "fuzz" / source).glob("_C*.so"), None)
    if extension is None:
        pytest.skip("not a test build: make test")
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    limits = "detect_leaks=0:max_allocation_size_mb=2000:allocator_may_return_null=1"
    said = fuzzed(
        "guided",
        tmp_path,
        *("--guided", str(extension), "--calls", str(CALLS // 2)),
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS=limits,
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    assert "kept words" in said
