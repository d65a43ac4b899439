"""One setting of the paper's recipe changed at a time: python eval/ablate.py [pictures=N] [output=FOLDER].

Asked on training pictures, so that the validation questions stay unseen by whoever chooses settings from it.
Writes ablations.json and ablations.md: accuracy, and the difference to the paper's recipe, both asked the
same questions, with the half-width of its 95 % confidence interval over pictures.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

from eval.helping import helped
from eval.quiz import BUDGETS, EACH, TRAINING, everyone
from eval.results import commit
from llava_pitome import MergeConfig
from llava_pitome.cli.bench.environment import machine
from llava_pitome.cli.options import Option, parse, whole
from llava_pitome.config import RECIPES

UNSEEN = TRAINING + 1_000_000  # pictures on which nothing was chosen
PAPER = "the paper"
ROWS: dict[str, dict[str, dict]] = {  # dimension, then what is changed
    PAPER: {PAPER: {}},
    "split": {
        "in raster order": {"parameters": {"split": "raster"}},
    },
    "protection": {
        "3 candidates for each that goes": {"parameters": {"candidates": 3.0}},
        "4 candidates": {"parameters": {"candidates": 4.0}},
        "6 candidates": {"parameters": {"candidates": 6.0}},
        "nobody is protected": {"parameters": {"candidates": None}},
        "nobody, raster split (ToMe)": {"parameters": {"candidates": None, "split": "raster"}},
    },
    "margin": {
        "from 0.9 to 0.45": {"parameters": {"end": 0.45}},
        "0.9 throughout": {"parameters": {"margin": 0.9}},
        "0.8 throughout": {"parameters": {"margin": 0.8}},
        "0.5 throughout": {"parameters": {"margin": 0.5}},
        "0 throughout": {"parameters": {"margin": 0.0}},
    },
    "alpha": {
        "0": {"parameters": {"alpha": 0.0}},
        "0.3": {"parameters": {"alpha": 0.3}},
        "3": {"parameters": {"alpha": 3.0}},
    },
    "energy": {"ELU, as released": {"parameters": {"energy": "elu"}}},
    "size weighting": {"plain means": {"size_weighted": False}},
    "proportional attention": {
        "off in the tower": {"proportional": False},
        "on in the language model too": {"llm_proportional": True},
        "in the language model alone": {"proportional": False, "llm_proportional": True},
    },
    "positions in the language model": {"of their patches": {"positions": "original"}},
    "order": {"by energy, as released": {"order": "method"}},
    "metric": {"hidden state": {"metric": "hidden"}},
    "site": {"behind the block": {"site": "block"}},
    "layers": {
        "first half": {"depths": (0.0, 0.5)},
        "second half": {"depths": (0.5, 1.0)},
        "last quarter": {"depths": (0.75, 1.0)},
    },
    "prefix": {
        "half of the reduction": {"prefix_share": 0.5},
        "all of it": {"prefix_share": 1.0},
    },
    "the recipe best": {
        "whole": RECIPES["best"],
        "without more candidates": {**RECIPES["best"], "parameters": {}},
        "without the prefix": {**RECIPES["best"], "prefix_share": 0.0},
        "without log sizes in the language model": {**RECIPES["best"], "llm_proportional": False},
        "without the patches' positions": {**RECIPES["best"], "positions": "packed"},
        "with ToMe's matching": {**RECIPES["best"], "parameters": {}, "method": "tome"},
        "with a draw by lot": {**RECIPES["best"], "parameters": {}, "method": "random"},
    },
}
OPTIONS = {
    "pictures": Option(2048, whole(1), "a whole number from 1", "training pictures, three questions each"),
    "jobs": Option(os.cpu_count() or 1, whole(1), "a whole number from 1", "processes"),
    "output": Option("output/ablations", str, "a folder", "where the table goes"),
}


def main(words: list[str]) -> int:
    """Asks, and writes the table."""
    if helped(words, __doc__, OPTIONS):
        return 0
    try:
        options = parse(words, OPTIONS)
    except ValueError as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2
    named = [(dimension, name) for dimension, changes in ROWS.items() for name in changes]
    configs = [MergeConfig(tokens=t, **ROWS[d][n]) for d, n in named for t in BUDGETS]
    found = everyone(configs, UNSEEN, options["pictures"], options["jobs"])
    plain: list[np.ndarray] = []
    rows = []
    for dimension, name in named:
        said = [next(found) for _ in BUDGETS]
        plain = plain or said
        cells = {str(t): cell(now, base) for t, now, base in zip(BUDGETS, said, plain)}
        rows.append(
            {"dimension": dimension, "change": name, "config": ROWS[dimension][name], "tokens": cells}
        )
        print(line(rows[-1]), flush=True)
    output = Path(options["output"])
    output.mkdir(parents=True, exist_ok=True)
    facts = {"pictures": options["pictures"], "questions": options["pictures"] * EACH, "commit": commit()}
    facts |= {"machine": machine(), "rows": rows}
    (output / "ablations.json").write_text(json.dumps(facts, indent=1) + "\n")
    (output / "ablations.md").write_text(tabulate(rows))
    return 0


def cell(right: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Accuracy in per cent, and its difference to the base's, picture by picture."""
    apart = 100 * (right.astype(float) - base).reshape(-1, EACH).mean(1)
    half = 1.96 * apart.std(ddof=1) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
    return {"accuracy": 100 * float(right.mean()), "difference": float(apart.mean()), "half": float(half)}


def line(row: dict) -> str:
    """A row of the Markdown table."""
    cells = [
        f"{c['accuracy']:.1f}"
        + ("" if row["dimension"] == PAPER else f" ({c['difference']:+.1f} ± {c['half']:.1f})")
        for c in row["tokens"].values()
    ]
    return f"| {row['dimension']} | {row['change']} | {' | '.join(cells)} |"


def tabulate(rows: list[dict]) -> str:
    """The whole table as Markdown."""
    head = f"| setting | changed to | {' | '.join(f'{t} tokens' for t in BUDGETS)} |\n"
    return head + f"|{'---|' * (len(BUDGETS) + 2)}\n" + "\n".join(map(line, rows)) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
