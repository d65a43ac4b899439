"""What README and documents point to is there: files, pictures, headings, pages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "eval/results/sweep/report.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its blocks and words of code."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as they stand behind a `#`."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links(page: Path) -> list[str]:
    return [link for link in LINK.findall(prose(page)) if not link.startswith(("http://", "https://"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file() and file.is_relative_to(ROOT), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(file), f"{file.name} has no heading {anchor!r}"


def test_the_readme_leads_to_every_page():
    there = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert there >= set((ROOT / "docs").glob("*.md"))


def test_every_picture_of_the_documents_is_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    assert shown >= set((ROOT / "docs/pictures").iterdir())


@pytest.mark.parametrize("page", PAGES[:-1], ids=lambda page: page.name)
def test_every_file_of_the_project_that_a_page_names_is_there(page):
    named = re.findall(
        r"\b(?:eval|train|scripts|docs|tests|llava_pitome)/[\w/.-]+\.(?:py|sh|md|json|png|txt)",
        page.read_text(),
    )
    invented = {
        "llava_pitome/methods/mine.py",
        "llava_pitome/methods/shortest.py",
        "llava_pitome/places/middle.py",
    }
    assert not [name for name in named if name not in invented and not (ROOT / name).exists()]
