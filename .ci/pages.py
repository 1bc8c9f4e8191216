"""Hooks of mkdocs: pages that lie outside of docs/, notebooks, and links that leave docs/.

A file of the repository that is a page of the site has one text, at its place in the repository.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "RELEASE.md": "release.md",
    "SECURITY.md": "security.md",
    "model_cards/digits-8/README.md": "results/digits-8/index.md",
    "model_cards/fashion-mnist-32/README.md": "results/fashion-mnist-32/index.md",
}
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?(?:\s+\"[^\"]*\")?\))")
_BADGE = re.compile(r"\[!\[([^\]]*)\]\([^)]*\)\]")  # a picture of another site that is a link
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of `PAGES`, the pictures that lie beside them, and the notebooks."""
    for source, page in PAGES.items():
        text = _FRONT_MATTER.sub("", (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=_moved(text, source, page, config)))
        for picture in sorted((ROOT / source).parent.glob("*.png")):
            place = posixpath.join(posixpath.dirname(page), picture.name)
            files.append(File.generated(config, place, abs_src_path=str(picture)))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        page = f"notebooks/{notebook.stem}.md"
        content = page_of(notebook.read_text(encoding="utf-8"), notebook.name)
        files.append(File.generated(config, page, content=content))
    return files


def page_of(notebook: str, name: str) -> str:
    """Return a notebook as Markdown, with the outputs that are stored in it."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(_BADGE.sub(r"[\1]", text))
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                code = "".join(data["image/png"]).replace("\n", "")
                parts.append(f"![What the cell above shows](data:image/png;base64,{code})")
            elif shown := "".join(data["text/plain"]).rstrip():
                parts.append(f"````text\n{shown}\n````")
    return "\n\n".join([*parts, f"[This page as a notebook]({name})"])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page in docs/ that leave it to the page or the file meant."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return _moved(markdown, f"docs/{page.file.src_uri}", page.file.src_uri, config)


def _moved(text: str, source: str, page: str, config: MkDocsConfig) -> str:
    """Return text of the repository's file `source` with the links that `page` needs."""
    here, there = posixpath.dirname(source), posixpath.dirname(page) or "."

    def link(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        if re.match(r"[a-z]+:|//", target):
            # the README's links and pictures are absolute, for PyPI
            raw = str(config.repo_url).replace("//github.com/", "//raw.githubusercontent.com/")
            homes = (f"{config.repo_url}/blob/main/", f"{raw}/main/")
            if not target.startswith(homes):
                return found[0]
            for home in homes:
                target = target.removeprefix(home)
            target = re.sub(r"^(docs/notebooks/.*)\.ipynb$", r"\1.md", target)
        else:
            target = posixpath.normpath(posixpath.join(here, target))
        if target in PAGES:
            target = posixpath.relpath(PAGES[target], there)
        elif target.startswith("docs/"):
            target = posixpath.relpath(target.removeprefix("docs/"), there)
        elif posixpath.dirname(target) == here and target.endswith(".png"):
            target = posixpath.basename(target)
        elif (ROOT / target).exists():
            target = f"{config.repo_url}/blob/main/{target}"
        return f"{before}{target}{after}"

    return _LINK.sub(link, text)
