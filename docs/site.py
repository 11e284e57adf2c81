"""A hook of mkdocs (mkdocs.yml): pages of what lies outside docs/, and the links that lead there.

README.md is the start page, CONTRIBUTING.md, CHANGELOG.md and LICENSE are pages, and each file of examples/ is one, its
docstring above its code. In the files themselves links are as a reader of the repository needs them.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.txt",
}
EXAMPLES = {
    str(file.relative_to(ROOT)): f"examples/{file.stem}.md" for file in sorted((ROOT / "examples").glob("*.py"))
}


def on_config(config: MkDocsConfig) -> None:
    (examples,) = [entry for entry in config.nav or [] if "Examples" in entry]
    examples["Examples"] = list(EXAMPLES.values())


def on_files(files: Files, config: MkDocsConfig) -> None:
    for source, page in (PAGES | EXAMPLES).items():
        text = (ROOT / source).read_text()
        if source in EXAMPLES:
            text = example(Path(source).stem, text)
        files.append(File.generated(config, page, content=text))


def example(name: str, code: str) -> str:
    """The page of an example: what it says of itself, then all of its lines behind that."""
    module = ast.parse(code)
    says = ast.get_docstring(module)
    assert says, f"examples/{name}.py does not say what it is"
    says = re.sub(r"^(python examples/.*)$", r"```sh\n\1\n```", says, flags=re.MULTILINE)
    below = "\n".join(code.splitlines()[module.body[0].end_lineno :]).strip()
    return f"# {name.replace('_', ' ').capitalize()}\n\n{says}\n\n```python\n{below}\n```\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository made links of the site."""
    here = page.file.src_uri
    sources = {at: source for source, at in PAGES.items()}
    folder = (ROOT / sources[here] if here in sources else Path(config.docs_dir) / here).parent

    def moved(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        target = (folder / path).resolve()
        if not target.is_relative_to(ROOT):
            return link[0]
        name = str(target.relative_to(ROOT))
        to = (PAGES | EXAMPLES).get(name, name.removeprefix("docs/"))
        return f"]({'../' * here.count('/')}{to}{anchor})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    links = r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)"
    return "".join(part if part.startswith("```") else re.sub(links, moved, part) for part in parts)
