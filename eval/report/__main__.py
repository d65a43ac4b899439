"""Tables, plots and sentences from a sweep: python -m eval.report input=FOLDER [output=FOLDER] key=value ...

Writes report.md, report.csv, plots, and report.html: all of it, and images on which methods differ, in one
file that needs no network.
"""

import sys
from pathlib import Path
from typing import Any

from eval.command import count, run_command
from eval.embedded_images import png_url
from eval.evaluation.tasks import EMBEDDED_TASKS
from eval.report import plots, tables
from eval.report.examples import find_examples
from eval.report.rows import make_rows
from eval.report.significance import LEVEL, RESAMPLES
from eval.report.summary import ALPHA, sentences
from eval.report.sweep_results import SweepResults, read_sweep
from llava_pitome import embedded
from llava_pitome.cli.options import Option
from llava_pitome.methods import METHODS

OPTIONS = {
    "input": Option("output/sweep", str, "a folder that eval.sweep has written", "what to report"),
    "output": Option(None, str, "a folder", "where the report is written; by default input/report"),
    "examples": count(6, "images to show", low=0),
    "draws": count(RESAMPLES, "resamples for intervals and p values", low=100),
    "seed": count(0, "of the resamples", low=0),
}
LATE = (
    "* All image tokens pass the language model's first layers, so at equal tokens such a method sees more, "
    "and costs more; the mean over the layers says how much."
)


def main(words: list[str]) -> int:
    """Writes a report; returns the command's exit status."""
    return run_command(
        "report",
        __doc__,
        OPTIONS,
        words,
        lambda options: (options, read_sweep(Path(options["input"]))),
        _write,
    )


def _write(prepared: tuple[dict[str, Any], SweepResults]) -> None:
    """Writes every file of the report, and prints its sentences."""
    options, sweep = prepared
    output = Path(options["output"] or Path(options["input"]) / "report")
    (output / "plots").mkdir(parents=True, exist_ok=True)
    tasks = {task: make_rows(sweep, task, options["draws"], options["seed"]) for task in sweep.tasks}
    sections = [
        {
            "task": task,
            "sentences": sentences(rows),
            "tables": tables.all_tables(rows),
            "late": LATE if any(row.merges_late for row in rows) else "",
            "plots": plots.draw(rows, output / "plots", task),
        }
        for task, rows in tasks.items()
    ]
    page = {
        "heading": f"PiToMe and its peers: {sweep.facts['model']} on {', '.join(tasks)}",
        "sections": sections,
        "how": _how(options["draws"]),
        "facts": _facts(sweep),
    }
    (output / "report.csv").write_text(tables.csv(tasks))
    (output / "report.md").write_text(_markdown(**page))
    rows = tasks.get(EMBEDDED_TASKS.get(sweep.embedded_data), next(iter(tasks.values())))
    (output / "report.html").write_text(_html(page, *find_examples(sweep, rows, options["examples"])))
    for section in sections:
        print(*section["sentences"], sep="\n")
    print(f"written to {output}")


def _markdown(heading: str, sections: list[dict[str, Any]], how: str, facts: list[str]) -> str:
    """The report as Markdown."""
    parts = [f"# {heading}"]
    for section in sections:
        lines = (f"- {line}".replace("*", r"\*") for line in section["sentences"])
        parts += [f"## {section['task']}", "\n".join(lines)]
        for name, table in section["tables"].items():
            parts += [f"### {name}", tables.markdown(table)]
        parts += ["\\" + section["late"]] * bool(section["late"])
        parts += [f"![{path.stem}](plots/{path.name})" for path in section["plots"]]
    return "\n\n".join([*parts, "## How", how, "\n".join(f"- {line}" for line in facts)]) + "\n"


def _html(page: dict[str, Any], examples: list, about_examples: str) -> str:
    """The report as one HTML file."""
    from jinja2 import Environment, FileSystemLoader

    sections = [
        section | {"plots": {path.stem: png_url(path.read_bytes()) for path in section["plots"]}}
        for section in page["sections"]
    ]
    template = Environment(autoescape=True, loader=FileSystemLoader(Path(__file__).parent)).get_template(
        "page.html.jinja"
    )
    inside = page | {"sections": sections, "examples": examples, "about_examples": about_examples}
    return template.render(inside) + "\n"


def _how(resamples: int) -> str:
    """How the numbers were computed."""
    return (
        f"Brackets are {LEVEL:.0%} intervals from {resamples} bootstrap resamples of images, with "
        "all questions about each. Differences are the method's accuracy minus PiToMe's (recipe paper; best "
        f"where the heading says so), on the same questions; p values are two-sided, from {resamples} random "
        "signs of the images' differences. p (Holm) is adjusted for all comparisons in one place; "
        f'"better" and "worse" mean p < {ALPHA} without adjustment. Random methods are averaged over their '
        "seeds. GFLOPs are counted in the task's first prompt; milliseconds are medians with quartiles."
    )


def _facts(sweep: SweepResults) -> list[str]:
    """What was measured on what, and what is missing."""
    machine, packages = sweep.run_facts.get("machine", {}), sweep.run_facts.get("packages", {})
    facts = [
        "Evaluated on " + ", ".join(f"{k} {v}" for k, v in machine.items()),
        "With " + ", ".join(f"{k} {v}" for k, v in packages.items() if v),
        f"Commit {sweep.run_facts.get('commit')}; questions: {sweep.facts['limit'] or 'all'}",
    ]
    if sweep.timing:
        load, on = sweep.timing_facts["options"], sweep.timing_facts["machine"]
        facts.append(
            f"Timed interleaved, {load['rounds']} rounds, batch 1, {load['text']} text tokens, answers of "
            f"{load['new_tokens']}, on {on['processor']}, {on['threads']} threads, {on['device']}"
        )
    else:
        facts.append("Nothing was timed.")
    skipped = [c for c in sweep.facts["combinations"] if c["skipped"]]
    facts += dict.fromkeys(f"Skipped: {c['method']} in {c['place']}, {c['skipped']}" for c in skipped)
    facts += [
        f"{task} does not say which questions share an image: each counts as an image of its own"
        for task, results in sweep.tasks.items()
        if results[0].images() is None
    ]
    if sweep.facts["model"] in embedded.PATHS:
        methods = ", ".join(name for name, method in METHODS.items() if "class_attention" in method.needs)
        facts.append(
            f"{methods} use the class token's attention. CLIP's was trained to represent the image, the "
            "embedded model's was not, and nothing reads it: their losses here say little about them on CLIP."
        )
    if sweep.missing:
        facts.append(f"WITHOUT RESULTS, and so not in this report: {', '.join(sweep.missing)}")
    if sweep.outdated:
        facts.append(f"RESULTS OF OTHER CODE OR DATA than the last command's: {', '.join(sweep.outdated)}")
    return facts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
