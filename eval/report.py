"""Tables, pictures and words from a sweep: python eval/report.py input=FOLDER [output=FOLDER] key=value ...

Writes report.md, report.csv, plots, and report.html, which holds all of it and pictures on which methods
differ, in one file that needs no network.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from eval import page, plots, tables, verdicts
from eval.comparison import DRAWS, LEVEL
from eval.examples import find
from eval.gather import Sweep, pictures, read
from eval.helping import helped
from eval.rows import ALPHA, Row, make
from llava_pitome.cli.options import Option, parse, whole
from llava_pitome.methods import METHODS

OPTIONS = {
    "input": Option("output/sweep", str, "a folder that eval/sweep.py has written", "what to report"),
    "output": Option(None, str, "a folder", "where the report goes; input/report where not given"),
    "examples": Option(6, whole(0), "a whole number from 0", "pictures to show"),
    "draws": Option(DRAWS, whole(100), "a whole number from 100", "resamplings for intervals and p values"),
    "seed": Option(0, whole(0), "a whole number from 0", "of the resamplings"),
}
LATE = (
    "* All image tokens pass the language model's first layers here, so that at equal tokens such a method "
    "has seen more, and costs more; the mean over the layers says how much."
)
BY_CLASS = ", ".join(name for name, method in METHODS.items() if "class_attention" in method.needs)
CLASS_TOKEN = (
    f"{BY_CLASS} go by the class token's attention. CLIP's was trained to stand for the picture, the "
    "embedded model's was not, and nothing reads it: what these lose here says little about them on CLIP."
)


def main(words: list[str]) -> int:
    """Writes a report; returns the command's exit status."""
    if helped(words, __doc__, OPTIONS):
        return 0
    try:
        options = parse(words, OPTIONS)
        sweep = read(Path(options["input"]))
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    output = Path(options["output"] or Path(options["input"]) / "report")
    (output / "plots").mkdir(parents=True, exist_ok=True)
    tasks = {task: make(sweep, task, options["draws"], options["seed"]) for task in sweep.tasks}
    drawn = {task: plots.draw(rows, output / "plots", task) for task, rows in tasks.items()}
    heading = f"PiToMe and its peers: {sweep.facts['model']} on {', '.join(tasks)}"
    (output / "report.csv").write_text(tables.raw(tasks))
    (output / "report.md").write_text(_markdown(heading, sweep, tasks, drawn, options["draws"]))
    (output / "report.html").write_text(_html(heading, sweep, tasks, drawn, options))
    for rows in tasks.values():
        for line in _words(rows):
            print(line)
    print(f"written to {output}")
    return 0


def _words(rows: Sequence[Row]) -> list[str]:
    """What the numbers say."""
    if not any(row.interval for row in rows):
        return [verdicts.unpaired(rows)]
    if not any(row.same or row.cross or row.best for row in rows):
        return ["PiToMe and another method were nowhere compared at the same tokens."]
    across = [line for kind in verdicts.REFERENCES for line in verdicts.cross_place(rows, kind)]
    return [verdicts.counts(rows), *verdicts.same_place(rows), *across]


def _how(draws: int) -> str:
    """How the numbers were made."""
    return (
        f"Brackets are {LEVEL:.0%} intervals from {draws} resamplings of pictures, with all questions about "
        "each. Differences are the method's accuracy minus PiToMe's (recipe paper; best where that is said), "
        f"on the same questions; p values are two-sided, from {draws} random signs of the pictures' "
        "differences. p (Holm) holds for all comparisons in one place together; "
        f'"ahead" and "behind" mean p < {ALPHA} by itself. Methods that draw are averaged over their draws. '
        "GFLOPs are counted in the task's first prompt; milliseconds are medians with quartiles."
    )


def _facts(sweep: Sweep) -> list[str]:
    """What was measured on what, and what is missing."""
    told = []
    machine, packages = sweep.results.get("machine", {}), sweep.results.get("packages", {})
    told.append("Evaluated on " + ", ".join(f"{k} {v}" for k, v in machine.items()))
    told.append("With " + ", ".join(f"{k} {v}" for k, v in packages.items() if v))
    told.append(f"Commit {sweep.results.get('commit')}; questions: {sweep.facts['limit'] or 'all'}")
    if sweep.timed["rows"]:
        asked, on = sweep.timed["options"], sweep.timed["machine"]
        told.append(
            f"Timed in turns, {asked['rounds']} rounds, batch 1, {asked['text']} text tokens, answers of "
            f"{asked['new_tokens']}, on {on['processor']}, {on['threads']} threads, {on['device']}"
        )
    else:
        told.append("Nothing was timed.")
    skipped: dict[tuple[str, str, str], None] = {}
    for c in sweep.facts["combinations"]:
        if c["skipped"]:
            skipped[c["method"], c["place"], c["skipped"]] = None
    told += [f"Skipped: {method} in {place}, {why}" for method, place, why in skipped]
    for task, found in sweep.tasks.items():
        if pictures(found[0]) is None:
            told.append(
                f"{task} does not say which questions share a picture: each counts as a picture of its own"
            )
    if sweep.facts["model"] == "embedded":
        told.append(CLASS_TOKEN)
    if sweep.missing:
        told.append(f"WITHOUT RESULTS, and so not in this report: {', '.join(sweep.missing)}")
    if sweep.others:
        told.append(f"RESULTS OF OTHER CODE OR DATA than the last command's: {', '.join(sweep.others)}")
    return told


def _tables(rows: Sequence[Row]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The tables of a task by heading."""
    found = {
        "In short: each method in its own place": tables.brief(rows),
        "Every method in every place": (tables.heads(rows), tables.cells(rows)),
    }
    for kind in verdicts.REFERENCES:
        if any(getattr(row, kind) for row in rows):
            against = verdicts.reference(kind)
            found[f"Each method in its own place, against {against}"] = tables.cross(rows, kind)
    return found


def _markdown(heading: str, sweep: Sweep, tasks: dict, drawn: dict, draws: int) -> str:
    """The report as Markdown."""
    parts = [f"# {heading}"]
    for task, rows in tasks.items():
        parts += [f"## {task}", "\n".join(f"- {line}".replace("*", r"\*") for line in _words(rows))]
        for name, table in _tables(rows).items():
            parts += [f"### {name}", tables.markdown(*table)]
        if any(verdicts.late(row) for row in rows):
            parts.append("\\" + LATE)
        parts += [f"![{path.stem}](plots/{path.name})" for path in drawn[task]]
    parts += ["## How", _how(draws), "\n".join(f"- {line}" for line in _facts(sweep))]
    return "\n\n".join(parts) + "\n"


def _html(heading: str, sweep: Sweep, tasks: dict, drawn: dict, options: dict) -> str:
    """The report as one HTML file."""
    parts = []
    for task, rows in tasks.items():
        parts += [page.section(task), page.bullets(_words(rows))]
        for name, (heads, lines) in _tables(rows).items():
            parts += [page.section(name, 3), page.table(heads, lines, mine=verdicts.title("pitome"))]
        if any(verdicts.late(row) for row in rows):
            parts.append(page.paragraph(LATE, small=True))
        parts += [page.picture(path) for path in drawn[task]]
    rows = next(iter(tasks.values()))
    shown, said = find(sweep, tasks.get("embedded_vqa", rows), options["examples"])
    parts += [page.section("Pictures"), page.paragraph(said), *(page.example(one) for one in shown)]
    parts += [page.section("How"), page.paragraph(_how(options["draws"])), page.bullets(_facts(sweep))]
    return page.page(heading, parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
