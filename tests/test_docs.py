"""The built site (make docs): all pictures and links exist, and a browser has no complaints."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

DOCS = Path(__file__).parent.parent / "docs"
SITE = DOCS / "_build" / "html"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
SHOWN = ("index.html", "concepts.html", "notebooks/1_the_idea.html", "api.html")

needs_site = pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="no site here; make docs builds it")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here")


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
    tables = [file.relative_to(DOCS) for file in (DOCS / "tables").rglob("*.md")]
    assert len(tables) > 5
    assert [table for table in tables if f"```{{include}} {table}\n" not in text] == []


@needs_site
def test_site_loads_nothing_from_other_servers():
    for file in SITE.rglob("*.html"):
        text = file.read_text()
        assert 'src="http' not in text, file
        assert '<link rel="stylesheet" href="http' not in text, file


def complaints(url: str, folder: Path) -> list[str]:
    """What a browser writes on its console."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--dump-dom"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", url]
    written = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<body" in written.stdout
    said = [line for line in written.stderr.splitlines() if "CONSOLE" in line]
    # the theme reports its colors and its scroll position
    return [line for line in said if "[PST]: Changed to" not in line and "[PST]: Scrolled" not in line]


@needs_site
@needs_browser
@pytest.mark.parametrize("name", SHOWN)
def test_browser_shows_page_without_complaints(name, tmp_path):
    assert complaints((SITE / name).as_uri(), tmp_path) == []


@needs_browser
def test_browser_complains_about_script_error(tmp_path):
    file = tmp_path / "page.html"
    file.write_text("<body><script>undefined_function()</script>")
    assert len(complaints(file.as_uri(), tmp_path / "profile")) == 1
