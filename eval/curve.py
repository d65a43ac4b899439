"""The accuracy curve on the embedded benchmark: python eval/curve.py [output=FOLDER] [jobs=N] [limit=N].

Every method at every ratio, and the unmerged model with and without its pictures, through eval/run.py, so
that each number is lmms-eval's own. All methods leave the same number of tokens at a ratio. Writes curve.json
and curve.md; a stopped curve goes on.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from llava_pitome.options import Option, parse, whole

RATIOS = (0.975, 0.95, 0.925, 0.9, 0.85, 0.8)
METHODS = {
    "PiToMe (paper)": ("recipe=paper",),
    "PiToMe (released)": ("recipe=released",),
    "ToMe": ("method=tome",),
    "random": ("method=random",),
}
UNMERGED, BLANK = "unmerged", "unmerged, pictures greyed out"
OPTIONS = {
    "output": Option("output/curve", str, "a folder", "where results go"),
    "jobs": Option(os.cpu_count() or 1, whole(1), "a whole number from 1", "points at a time"),
    "limit": Option(None, whole(1), "a whole number from 1", "ask only the first so many"),
}


def main(words: list[str]) -> int:
    """Runs every point and writes the table."""
    try:
        options = parse(words, OPTIONS)
    except ValueError as error:
        print(f"curve: {error}", file=sys.stderr)
        return 2
    output = Path(options["output"])
    points = {UNMERGED: ("ratio=1",), BLANK: ("ratio=1", "blank=true")}
    points |= {point(n, r): (f"ratio={r}", *how) for n, how in METHODS.items() for r in RATIOS}
    with ThreadPoolExecutor(options["jobs"]) as pool:
        rows = list(pool.map(partial(_run, options), enumerate(points.values())))
    if None in rows:
        print("curve: a point failed, see above; the same command goes on from there", file=sys.stderr)
        return 1
    facts = json.loads((output / "00" / "results.json").read_text())
    facts = {k: facts[k] for k in ("model", "commit", "packages", "machine")}
    found = dict(zip(points, rows, strict=True))
    (output / "curve.json").write_text(json.dumps(facts | {"points": found}, indent=1) + "\n")
    (output / "curve.md").write_text(tabulate(found))
    print(tabulate(found))
    return 0


def point(method: str, ratio: float) -> str:
    """The name of a point of the curve."""
    return f"{method} at {ratio}"


def tabulate(points: dict[str, dict]) -> str:
    """The curve as a Markdown table: a row a ratio, a column a method."""
    head = f"| ratio | tokens | {' | '.join(METHODS)} |\n|{'---|' * (len(METHODS) + 2)}\n"
    plain = points[UNMERGED]
    lines = [f"| 1 | {plain['image_tokens']} |" + f" {cell(plain)} |" * len(METHODS)]
    for ratio in RATIOS:
        row = [points[point(name, ratio)] for name in METHODS]
        lines.append(f"| {ratio} | {row[0]['image_tokens']} | {' | '.join(map(cell, row))} |")
    return head + "\n".join(lines) + "\n"


def cell(row: dict) -> str:
    """Accuracy and its standard error, in per cent."""
    return f"{row['accuracy']['mean']:.1f} ± {row['accuracy']['stderr']:.1f}"


def _run(options: dict, numbered: tuple[int, tuple[str, ...]]) -> dict | None:
    """One point in a process and a folder of its own; None where it failed."""
    number, words = numbered
    output = Path(options["output"]) / f"{number:02}"
    command = [
        sys.executable,
        str(Path(__file__).parent / "run.py"),
        "model=embedded",
        "baseline=false",
        *words,
    ]
    command += [f"output={output}", "batch_size=32"] + (
        [f"limit={options['limit']}"] if options["limit"] else []
    )
    threads = max((os.cpu_count() or 1) // options["jobs"], 1)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        print(f"curve: eval/run.py {' '.join(words)} failed:\n{ran.stderr}", file=sys.stderr)
        return None
    (row,) = json.loads((output / "results.json").read_text())["rows"]
    print(f"{row['model']}: {cell(row)}", flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
