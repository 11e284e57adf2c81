"""The HTML pages as people see them: in headless Chromium, as wide as a desk's and a phone's screen, light and dark."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_bench import ROWS
from test_site import site  # noqa: F401  (a fixture)

from bench import families, report, results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENS = {"desk": (1280, 900), "phone": (390, 844)}
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
READ = """() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > .5) return c; }
    return parse(getComputedStyle(document.documentElement).backgroundColor); };
  const contrast = e => {
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    return (a + .05) / (b + .05); };
  const shown = [...document.querySelectorAll('h1, h2, p, td, li')].filter(e => e.offsetWidth && e.innerText?.trim());
  return { wide: document.documentElement.scrollWidth, text: document.body.innerText.length,
    contrast: Math.min(...shown.map(contrast)),
    smallest: Math.min(...shown.map(e => parseFloat(getComputedStyle(e).fontSize))),
    back: light(behind(document.body)),
    plots: [...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width > 100)
      .map(e => e.querySelectorAll('circle, path, line, rect').length) };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def look(browser: Any, address: str, screen: str, scheme: str) -> dict[str, Any]:
    """What the page shows; fails on whatever it says on the console, and on what it loads from elsewhere."""
    width, height = SCREENS[screen]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((address[:16], "data:")) else said.append(f"loads {r.url}"))
    page.goto(address)
    found: dict[str, Any] = page.evaluate(READ)
    page.close()
    assert not said
    return found


def readable(browser: Any, address: str, plots: bool) -> None:
    for screen, (width, _) in SCREENS.items():
        for scheme in ("light", "dark"):
            found, where = look(browser, address, screen, scheme), (address, screen, scheme)
            assert found["wide"] <= width, where  # nothing to scroll sideways to
            assert found["text"] > 500, where
            assert found["contrast"] >= LEAST_CONTRAST, (where, found["contrast"])
            assert found["smallest"] >= 10, (where, found["smallest"])
            assert (found["back"] < 0.2) == (scheme == "dark"), where
            if plots:
                assert found["plots"], where
                assert min(found["plots"]) >= 5, where


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:  # noqa: F811
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("page", ["index", "api/nn"])
def test_site(browser: Any, served: str, page: str) -> None:
    readable(browser, f"{served}/{page}.html", plots=False)


def test_page_of_the_benchmarks(browser: Any, tmp_path: Path) -> None:
    data = {"allocator": "default", "rows": ROWS * 4, "machine_info": {"handtuned": {"cpu": "some CPU"}}}
    results.json_path(tmp_path, families.NORM, "default").write_text(json.dumps(data))
    assert report.main([str(tmp_path)]) == 0
    readable(browser, (tmp_path / "norm.html").as_uri(), plots=True)


def test_page_of_compare(browser: Any, tmp_path: Path) -> None:
    options = [
        "--module",
        "embeddings",
        "--rounds",
        "2",
        "--batch",
        "2",
        "--threads",
        "1",
        "--html",
        str(tmp_path / "page.html"),
    ]
    done = subprocess.run([sys.executable, "-m", "handtuned", "compare", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    readable(browser, (tmp_path / "page.html").as_uri(), plots=True)


def test_what_is_looked_for_is_found(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<title>x</title><body style='color: #999; background: #fff'>"
        "<p style='width: 900px'>pale<img src='https://a.invalid/'>"
    )
    with pytest.raises(AssertionError, match=r"loads https://a\.invalid"):
        look(browser, page.as_uri(), "phone", "light")
    page.write_text("<title>x</title><body style='color: #999; background: #fff'><p style='width: 900px'>pale")
    found = look(browser, page.as_uri(), "phone", "light")
    assert found["wide"] > 390
    assert found["contrast"] < LEAST_CONTRAST
