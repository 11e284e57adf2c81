"""Runs the benchmarks of each family once per allocator setting, each in a process of its own; writes JSON, Markdown
and tables.

    python -m bench [--family NAME] [--quick] [--threads N] [--output DIR] [--allocator NAME] [pytest's own arguments]

Exit status 1 if an op was red. The page with plots: python -m bench.report
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from . import machine, report, results
from .families import FAMILIES, Family

HERE = Path(__file__).resolve().parent
NOTHING_SELECTED = 5  # pytest's exit status where -k leaves nothing


def run_setting(
    family: Family, allocator: str, output: Path, quick: bool, threads: int | None, extra: list[str]
) -> int:
    """One process; returns pytest's exit status. Where nothing is selected, earlier results stay."""
    result = results.json_path(output, family, allocator)
    fresh = result.with_suffix(".part")
    file = str(HERE / f"bench_{family.name}.py")
    command = [sys.executable, "-m", "pytest", file, "-q", "--benchmark-enable", "--benchmark-quiet"]
    command += [f"--family={family.name}", f"--benchmark-json={fresh}", "-rf"]
    command += ["-o", "addopts=--strict-markers", "-W", "ignore::DeprecationWarning"]
    command += ["--quick"] * quick + ([f"--threads={threads}"] if threads else []) + extra
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    tunables = [part for part in (os.environ.get(machine.TUNABLES), machine.ALLOCATORS[allocator]) if part]
    if tunables:
        environment[machine.TUNABLES] = ":".join(tunables)
    status = subprocess.run(command, cwd=HERE.parent, env=environment).returncode
    if status == NOTHING_SELECTED:
        fresh.unlink(missing_ok=True)
        return 0
    result.unlink(missing_ok=True)
    if fresh.exists():
        fresh.rename(result)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of handtuned against its peers.")
    parser.add_argument("--family", choices=list(FAMILIES), help="only this family")
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds, no torch.compile; about a minute")
    parser.add_argument("--threads", type=int, help="torch's and onnxruntime's threads (torch's default)")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="directory of the results")
    parser.add_argument("--allocator", choices=list(machine.ALLOCATORS), help="only this setting")
    options, extra = parser.parse_known_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    chosen = [FAMILIES[options.family]] if options.family else list(FAMILIES.values())
    allocators = [options.allocator] if options.allocator else list(machine.ALLOCATORS)
    settings = [(family, allocator) for family in chosen for allocator in allocators]
    failed = []
    for number, (family, allocator) in enumerate(settings, 1):
        print(f"[{number}/{len(settings)}] {family.name}: {machine.TITLES[allocator]}", flush=True)
        if run_setting(family, allocator, output, options.quick, options.threads, extra):
            failed.append(f"{family.name} ({allocator})")
    for family in chosen:
        runs = results.load(output, family)
        if runs:
            (output / f"{family.name}.md").write_text(report.markdown(runs))
            names = ", ".join(sorted(path.name for path in output.glob(f"{family.name}*")))
            print(f"Results in {options.output}: {names}")
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
