"""The site of `make docs`: it builds without a warning, and its API reference has every public name."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from test_docs import EXAMPLES, PAGES, public_names

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-docs" / "bin" / "python"
NO_SOURCE = {"__version__", "OP_NAMESPACE", "flash_attn", "functional", "nn", "ops", "reference", "testing"}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PYTHON.exists():
        pytest.skip("mkdocs is not installed here: make docs")
    folder = tmp_path_factory.mktemp("site")
    command = [str(PYTHON), "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in PAGES:
        name = "index" if page.name == "README.md" else page.stem.lower() if page.parent == ROOT else page.stem
        assert (site / f"{name}.html").exists(), page
    for example in EXAMPLES:
        assert (site / "examples" / f"{example.stem}.html").exists(), example


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    ids = {i for page in (site / "api").glob("*.html") for i in re.findall(r'<h[23] id="([^"]+)"', page.read_text())}
    names = {name.rpartition(".")[2] for name, _ in public_names()} - NO_SOURCE
    assert not names - {i.rpartition(".")[2] for i in ids}


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    text = (site / "index.html").read_text()
    assert not re.findall(r'(?:src|<link[^>]* href)="(?:https?:)?//[^"]*"', text)
