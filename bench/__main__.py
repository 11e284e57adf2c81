"""Runs the benchmarks once per allocator setting, each in a process of its own, and writes JSON, Markdown and tables.

    python -m bench [--quick] [--threads N] [--output DIR] [--allocator NAME] [pytest's own arguments, e.g. -k rms]

Exit status 1 if an op was red. The page with plots: python -m bench.report
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from . import machine, report

HERE = Path(__file__).resolve().parent


def run_setting(allocator: str, output: Path, quick: bool, threads: int | None, extra: list[str]) -> int:
    """One process; returns pytest's exit status."""
    result = report.json_path(output, allocator)
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(HERE), "-q", "--benchmark-enable", "--benchmark-quiet"]
    command += [f"--benchmark-json={result}", "-rf", "-o", "python_files=bench_*.py"]
    command += ["-o", "addopts=--strict-markers", "-W", "ignore::DeprecationWarning"]
    command += ["--quick"] * quick + ([f"--threads={threads}"] if threads else []) + extra
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    tunables = [part for part in (os.environ.get(machine.TUNABLES), machine.ALLOCATORS[allocator]) if part]
    if tunables:
        environment[machine.TUNABLES] = ":".join(tunables)
    return subprocess.run(command, cwd=HERE.parent, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of handtuned against its peers.")
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds, no torch.compile; under a minute")
    parser.add_argument("--threads", type=int, help="torch's and onnxruntime's threads (torch's default)")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="directory of the results")
    parser.add_argument("--allocator", choices=list(machine.ALLOCATORS), help="only this setting")
    options, extra = parser.parse_known_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    settings = [options.allocator] if options.allocator else list(machine.ALLOCATORS)
    failed = []
    for number, allocator in enumerate(settings, 1):
        print(f"[{number}/{len(settings)}] {machine.TITLES[allocator]}", flush=True)
        if run_setting(allocator, output, options.quick, options.threads, extra):
            failed.append(allocator)
    runs = report.load(output)
    if runs:
        (output / "norm.md").write_text(report.markdown(runs))
        print(f"Results in {options.output}: {', '.join(sorted(p.name for p in output.glob('norm*')))}")
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
