"""What the Triton families' budgets share: kernels compiled ahead of time, held to limits and committed figures."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import triton_tools

MOST_SHARED = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 99 * 1024, "gfx942": 64 * 1024}
# Bytes, of products without tensor cores and of second tries: ptxas leaves a few there for one more block at a time.
MOST_STACK = 32
Form = tuple[Any, ...]
Key = tuple[str, str]
Compiled = dict[Key, list[triton_tools.Resources]]


def compiled_forms(launch: str, names: tuple[str, ...], cases: list[Form]) -> Compiled:
    """(a form in words, architecture) -> what `launch` launches. A case: values of `names`, then architectures. The
    first name is the kernel's, which alone is compiled."""
    keys = [(case, arch) for *case, archs in dict.fromkeys(cases) for arch in archs]
    asked = [{"arch": arch, "only": f"{case[0]}_kernel", **dict(zip(names, case, strict=True))} for case, arch in keys]
    found = triton_tools.ahead_of_time(launch, asked, timeout=3600.0)
    return {(" ".join(map(str, case)), arch): kernels for (case, arch), kernels in zip(keys, found, strict=True)}


def check_budgets(compiled: Compiled, sampled: list[Form], budgets_file: Path) -> None:
    """No spills where operands have 16 bits (but for the second try of tiles that met a NaN, behind the first in the
    list), an architecture's limits; of what is sampled also registers, by the 8 in
    which hardware hands them out, shared memory and instructions. After a wanted change: HANDTUNED_WRITE_BUDGETS=1
    pytest -k budgets."""
    found: dict[str, dict[str, list[int]]] = {}
    always = {(" ".join(map(str, case)), arch) for *case, archs in sampled for arch in archs}
    wrong = []
    for (case, arch), kernels in compiled.items():
        for number, kernel in enumerate(kernels):
            most_stack = 0 if "float16" in case and number == 0 else MOST_STACK
            if kernel.spills > most_stack or kernel.shared > MOST_SHARED[arch]:
                wrong.append(f"{case} on {arch}: {kernel.spills} bytes spilled, {kernel.shared} of shared memory")
        used = [-(-kernels[0].registers // 8) * 8, kernels[0].shared, sum(kernels[0].mix.values())]
        found.setdefault(case, {})[arch] = used
    assert not wrong, "\n".join(wrong)
    if os.environ.get("HANDTUNED_WRITE_BUDGETS") == "1":
        kept = {case: {a: u for a, u in used.items() if (case, a) in always} for case, used in found.items()}
        lines = [f'  "{case}": {json.dumps(used)}' for case, used in kept.items() if used]
        head = '{\n "entry": ["registers", "shared bytes", "instructions (PTX; AMD: assembly)"],\n "budgets": {\n'
        budgets_file.write_text(head + ",\n".join(lines) + "\n }\n}\n")
    budgets = json.loads(budgets_file.read_text())["budgets"]
    for case, of_arch in found.items():
        for arch, used in of_arch.items():
            if case not in budgets or arch not in budgets[case]:
                assert (case, arch) not in always
                continue
            named = zip(("registers", "shared bytes", "instructions"), used, budgets[case][arch], strict=True)
            for what, now, most in named:
                assert now <= most * 1.05, f"{case} on {arch} takes {now} {what}, budget {most}"


def check_instructions(compiled: Compiled, tensor_cores: dict[str, Collection[str]]) -> None:
    """Tensor cores and no local memory where operands have 16 bits, no atomics."""
    for (case, arch), kernels in compiled.items():
        for number, kernel in enumerate(kernels):
            if "bfloat16" in case:
                cores = [op for op in kernel.mix if op.startswith(tuple(tensor_cores[arch]))]
                assert cores, f"{case} on {arch} has none of {tensor_cores[arch]}: {sorted(kernel.mix)}"
                local = [op for op in kernel.mix if op.startswith(("ld.local", "st.local", "scratch_"))]
                assert number or not local, f"{case} on {arch}: {local}"
            atomics = [op for op in kernel.mix if op.startswith(("atom.", "red.")) or "atomic" in op]
            assert not atomics, f"{case} on {arch}: {atomics}"
