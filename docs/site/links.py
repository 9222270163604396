"""A hook of mkdocs: a page's links to files outside docs/ work on the site as they do in the repository.

The site gets a page for each linked file: Markdown as it is, source with its text in a block of code. Pictures and notebooks
are copied.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
_LINK = re.compile(r"(?<=\]\()(?!\w+:)[^)#\s]+")
_COPIED = (".png", ".ipynb")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to, and what that links to."""
    unread = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    known = set(unread[1:])
    while unread:
        path = unread.pop()
        text = (ROOT / path).read_text(encoding="utf-8") if not path.endswith(_COPIED) else ""
        if path not in known:
            known.add(path)
            files.append(_file(path, text, config))
        if path.endswith(".md"):
            linked = {_in_repository(path, link) for link in _LINK.findall(text)}
            unread += [target for target in linked - known if (ROOT / target).is_file()]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links as the site needs them. A target that does not exist stays, and mkdocs reports it."""
    path = page.file.src_uri
    path = {"readme.md": "README.md"}.get(path, path.removeprefix("source/") if _is_source(path) else f"docs/{path}")
    if (ROOT / path).suffix != ".md" or not (ROOT / path).is_file():  # a page of code
        return markdown

    def on_site(link: re.Match[str]) -> str:
        target = _in_repository(path, link.group())
        folder = posixpath.dirname(page.file.src_uri) or "."
        return posixpath.relpath(_site_path(target), folder) if (ROOT / target).is_file() else link.group()

    return _LINK.sub(on_site, markdown)


def _file(path: str, text: str, config: MkDocsConfig) -> File:
    if path.endswith(_COPIED):
        return File.generated(config, _site_path(path), abs_src_path=str(ROOT / path))
    if not path.endswith(".md"):
        language = Path(path).suffix.removeprefix(".") or "text"
        text = f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n# {path}\n\n``````{language}\n{text}\n``````\n"
    inclusion = InclusionLevel.UNDEFINED if path == "README.md" else InclusionLevel.NOT_IN_NAV
    return File.generated(config, _site_path(path), content=text, inclusion=inclusion)


def _in_repository(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _site_path(path: str) -> str:
    if path == "README.md":
        return "readme.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" + ("" if path.endswith((*_COPIED, ".md")) else ".md")


def _is_source(path: str) -> bool:
    return path.startswith("source/")
