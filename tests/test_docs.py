"""The pages stay true: their examples run, their links lead somewhere, their figures are those measured today."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import handtuned
from handtuned import nn

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(number of the first line, code) of each fenced block in that language."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


# ---- code -----------------------------------------------------------------------------------------------------------


def cells(page: Path) -> list[tuple[int, str, str | None]]:
    """Of each python block the number of its first line, its code, and what stands below it as its output."""
    found = re.finditer(
        r"^```python\n(.*?)^```$(?:\n+```output\n(.*?)^```$)?", page.read_text(), re.DOTALL | re.MULTILINE
    )
    return [(page.read_text().count("\n", 0, match.start(1)), match[1], match[2]) for match in found]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for line, code, output in cells(page):  # blocks of a page go on from each other
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        if output is not None:
            lines = printed.getvalue().replace(f"({handtuned._C.isa()})", "(avx2)").splitlines()
            assert [line.rstrip() for line in lines if line.strip()] == output.splitlines(), f"{page}:{line}"


def test_every_page_of_outputs_is_read() -> None:
    """Each output belongs to the block above it, and each cell of the quick start that prints has one."""
    for page in PAGES:
        assert len(blocks(page, "output")) == sum(output is not None for *_, output in cells(page)), page
    assert all(("print(" in code) == (output is not None) for _, code, output in cells(ROOT / "docs/quickstart.md"))
    assert len(blocks(ROOT / "docs/quickstart.md", "output")) > 5


def test_pages_with_examples_are_found() -> None:
    assert {"README.md", "docs/quickstart.md", "docs/replace.md", "docs/explain.md", "docs/install.md"} <= {
        name_of(page) for page in PAGES if blocks(page, "python")
    }
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


# ---- links and commands ---------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_internal_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)} links to {link}"


def test_readme_reaches_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in PAGES:
        assert page.name == "README.md" or f"({name_of(page)})" in readme, f"{name_of(page)} is not linked"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_commands_are_targets(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shell = "".join(code for _, code in blocks(page, "sh")) + "\n".join(re.findall(r"`(make [^`]+)`", page.read_text()))
    for target in re.findall(r"\bmake ([\w-]+)", shell):
        assert target in targets, f"{name_of(page)}: make {target}"


def test_handtuned_commands_exist() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for command in sorted(set(re.findall(r"`handtuned ([a-z]+)[` ]", text)) | {"info", "compare"}):
        done = subprocess.run([sys.executable, "-m", "handtuned", command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, f"handtuned {command}: {done.stderr}"


def test_pages_name_files_that_exist() -> None:
    rooms = r"(?:csrc|triton_kernels|python|tests|bench|docs|examples)/[\w./]+\.\w+"
    for page in PAGES:
        for path in re.findall(rf"`({rooms})`", page.read_text()):
            assert (ROOT / path).exists(), f"{name_of(page)} names {path}"


# ---- public names ---------------------------------------------------------------------------------------------------


def public_names() -> list[tuple[str, object]]:
    modules: tuple[ModuleType, ...] = (handtuned, nn, nn.functional)
    return [(f"{module.__name__}.{name}", getattr(module, name)) for module in modules for name in module.__all__]


@pytest.mark.parametrize(("name", "value"), public_names(), ids=[name for name, _ in public_names()])
def test_public_names_are_documented(name: str, value: object) -> None:
    short = name.rpartition(".")[2]
    if not isinstance(value, str):
        assert getattr(value, "__doc__", None), f"{name} has no docstring of its own"
    if short == "__version__":
        return
    pages = "".join(page.read_text() for page in PAGES)
    assert re.search(rf"\b{re.escape(short)}\b", pages), f"no page mentions {name}"


# ---- figures --------------------------------------------------------------------------------------------------------


def measure_errors(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the instruction set of torch is chosen at import."""
    command = [sys.executable, str(ROOT / "docs/error_table.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(
    "avx2" not in handtuned.testing.available_isas(), reason="the page's figures are those of the AVX2 kernels"
)
def test_error_table_is_what_is_measured() -> None:
    done = measure_errors("--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "27 rows, all within 1.5x of the page" in done.stdout


def test_error_table_check_sees_a_wrong_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # importing the script sets what the table is measured on
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import error_table

    page = error_table.as_errors(error_table.PAGE.read_text())
    assert list(error_table.differences(page, page)) == []
    assert list(error_table.broken_contract(page)) == []

    key = ("layer_norm", "bfloat16")
    by_torch, by_handtuned = page[key]["grad of bias"]
    for other, contract in ((by_handtuned * 1.6, 0), (by_handtuned / 1.6, 0), (by_torch * 1.6, 1)):
        changed = page | {key: page[key] | {"grad of bias": (by_torch, other)}}
        (line,) = error_table.differences(page, changed)
        assert line.startswith("layer_norm bfloat16, grad of bias, handtuned: the page says")
        assert len(list(error_table.broken_contract(changed))) == contract
    without = {k: row for k, row in page.items() if k != key}
    assert len(list(error_table.differences(without, page))) == 1
