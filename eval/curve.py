"""The accuracy curve on the embedded benchmark: python eval/curve.py [output=output/curve] [limit=N] ...

Every method at every ratio, through eval/run.py, so that each number is lmms-eval's own. All methods remove
the same number of tokens at a ratio. Writes curve.json and curve.md into the output folder; answers are
shared through its cache, so that a stopped curve goes on.
"""

import json
import subprocess
import sys
from pathlib import Path

RATIOS = (0.975, 0.95, 0.925, 0.9, 0.85, 0.8)
METHODS = {
    "PiToMe (paper)": ("recipe=paper",),
    "PiToMe (released)": ("recipe=released",),
    "ToMe": ("method=tome",),
    "random": ("method=random",),
}


def main(words: list[str]) -> int:
    """Runs every point and writes the table; further words go to eval/run.py."""
    output = Path(next((w.split("=", 1)[1] for w in words if w.startswith("output=")), "output/curve"))
    rest = [w for w in words if not w.startswith("output=")]
    points = {}
    for name, arguments in METHODS.items():
        for ratio in RATIOS:
            command = [
                "model=embedded",
                "baseline=true",
                f"ratio={ratio}",
                f"output={output}",
                *arguments,
                *rest,
            ]
            status = subprocess.run(
                [sys.executable, str(Path(__file__).parent / "run.py"), *command], check=False
            ).returncode
            if status:
                print(
                    f"curve: eval/run.py {' '.join(command)} failed; the same command goes on from here",
                    file=sys.stderr,
                )
                return status
            found = json.loads((output / "results.json").read_text())
            plain, merged = found["rows"]
            points[f"{name} @ {ratio}"] = merged | {"name": name, "ratio": ratio}
            points["unmerged"] = plain
            (output / "curve.json").write_text(
                json.dumps({**found, "rows": None, "points": points}, indent=1)
            )
    table = tabulate(points)
    (output / "curve.md").write_text(table)
    print(table)
    return 0


def tabulate(points: dict[str, dict]) -> str:
    """The curve as a Markdown table: a row a ratio, a column a method."""
    head = f"| ratio | tokens | {' | '.join(METHODS)} |\n|{'---|' * (len(METHODS) + 2)}\n"
    plain = points["unmerged"]
    lines = [f"| 1 | {plain['image_tokens']} |" + f" {_cell(plain)} |" * len(METHODS)]
    for ratio in RATIOS:
        row = [points[f"{name} @ {ratio}"] for name in METHODS]
        lines.append(f"| {ratio} | {row[0]['image_tokens']} | {' | '.join(map(_cell, row))} |")
    return head + "\n".join(lines) + "\n"


def _cell(point: dict) -> str:
    return f"{point['accuracy']['mean']:.1f} ± {point['accuracy']['stderr']:.1f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
