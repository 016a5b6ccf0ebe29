"""Every Python block of README and docs runs. The blocks of one page share their names, as in a reader's session."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [page for page in [ROOT / "README.md", *DOCS] if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # blocks write files
    torch.manual_seed(0)
    text = page.read_text()
    names: dict = {}
    for block in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(page), "exec"), names)  # errors show the line of the page


def test_readme_has_code_blocks():
    assert ROOT / "README.md" in PAGES


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *DOCS], ids=lambda page: page.name)
def test_links_to_files_exist(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


def test_readme_is_under_700_words():
    assert len((ROOT / "README.md").read_text().split()) < 700


def test_docs_are_under_8000_words():
    pages = [page for page in [*DOCS, *(ROOT / "docs" / "tables").rglob("*.md")] if page.name != "api.md"]
    assert sum(len(page.read_text().split()) for page in pages) < 8000
