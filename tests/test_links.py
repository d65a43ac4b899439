"""Links, file names and pictures of the README and the documents exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, ROOT / "eval/results/sweep/report.md"]
EXAMPLES = ("methods/mine.py", "methods/shortest.py", "hooks/projector_middle.py")  # of new files
FILE = re.compile(r"(?<![\w./-])[\w-]+(?:/[\w-]+)+\.(?:py|sh|md|txt)\b")


def without_code(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", without_code(page)))
    return [link for link in found if not link.startswith(("http://", "https://"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file() and file.is_relative_to(ROOT), f"no file for {link}"
        assert not anchor or anchor in anchors(file), f"{file.name} has no heading {anchor!r}"


def test_readme_links_every_page():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert linked >= set((ROOT / "docs").glob("*.md"))


def test_every_picture_is_used():
    linked = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    assert linked >= set((ROOT / "docs/pictures").iterdir())


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_named_files_exist(page):
    """Names are relative to the checkout or to the package."""
    for name in FILE.findall(page.read_text()):
        exists = (ROOT / name).exists() or (ROOT / "llava_pitome" / name).exists()
        assert exists or name.endswith(EXAMPLES), f"no file {name}"


def test_picture_of_the_route_is_what_its_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from draw_route import OUTPUT, draw

    assert OUTPUT.read_text() == draw()
