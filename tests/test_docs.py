"""The built site (make docs): all pictures and links exist, and nothing comes from other servers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

DOCS = Path(__file__).parent.parent / "docs"
SITE = DOCS / "_build" / "html"
needs_site = pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="no site here; make docs builds it")


class Page(HTMLParser):
    """The references of a page, and the places in the page that others can refer to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.references: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href") and value:
                self.references.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


page = cache(Page)


def broken_references(file: Path) -> Iterator[str]:
    for reference in page(file).references:
        parts = urlsplit(reference)
        if parts.scheme or parts.netloc:  # another site
            continue
        target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
        if not target.is_file() or (
            parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in page(target).anchors
        ):
            yield reference


@needs_site
def test_site_has_no_broken_references():
    pages = sorted(file for file in SITE.rglob("*.html") if "_static" not in file.parts)
    assert len(pages) > 15
    broken = {str(file.relative_to(SITE)): found for file in pages if (found := list(broken_references(file)))}
    assert not broken


def test_broken_references_are_found(tmp_path):
    file = tmp_path / "page.html"
    file.write_text('<img src="no.png"><a href="#here">x</a><a href="#there">y</a><p id="here">')
    assert list(broken_references(file)) == ["no.png", "#there"]


def test_docs_show_every_measured_table():
    text = "".join(file.read_text() for file in DOCS.glob("*.md"))
    results = Path("..", "examples", "benchmarks", "results")
    long_pages = {"README.md", "completion.md"}  # one is included as a page, one only named
    tables = [Path("tables", file.name) for file in (DOCS / "tables").glob("*.md")]
    tables += [
        results / file.name
        for file in (DOCS / results).glob("*.md")
        if file.name not in long_pages and not file.stem.endswith("_long")
    ]
    assert len(tables) > 5
    assert [table for table in tables if f"```{{include}} {table}\n" not in text] == []


@needs_site
def test_site_loads_nothing_from_other_servers():
    for file in SITE.rglob("*.html"):
        text = file.read_text()
        assert 'src="http' not in text, file
        assert '<link rel="stylesheet" href="http' not in text, file
