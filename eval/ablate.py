"""One setting of a recipe changed at a time: python -m eval.ablate [model=embedded-next] [key=value ...].

With the embedded LLaVA-1.5, settings of the paper's recipe; with embedded-next, how the tokens of an image
are divided among its tiles and newlines. Evaluated on images outside of the validation questions, so that
settings are not chosen on these. Writes ablations.json and ablations.md: accuracy, and the difference to the
recipe on the same questions, with the half-width of its 95 % confidence interval over images.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from eval.command import count, run_command
from eval.embedded_accuracy import BUDGETS, QUESTIONS, TILED_BUDGETS, TRAINING, evaluate_all
from eval.evaluation.results import commit
from eval.naming import amount_phrase
from llava_pitome import MergeConfig, embedded
from llava_pitome.cli.bench.environment import machine
from llava_pitome.cli.options import Option
from llava_pitome.config import RECIPES
from llava_pitome.models import checkpoints

FIRST_SEED = TRAINING + 1_000_000  # of images on which no setting was chosen
PAPER = "the paper"
ROWS: dict[str, dict[str, dict]] = {  # by dimension and name of the change
    PAPER: {PAPER: {}},
    "split": {
        "in raster order": {"parameters": {"split": "raster"}},
    },
    "protection": {
        "3 candidates per merged token": {"parameters": {"candidates": 3.0}},
        "4 candidates": {"parameters": {"candidates": 4.0}},
        "6 candidates": {"parameters": {"candidates": 6.0}},
        "no protection": {"parameters": {"candidates": None}},
        "no protection, raster split (ToMe)": {"parameters": {"candidates": None, "split": "raster"}},
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
    "site": {"after the block": {"site": "block"}},
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
        "with random merging": {**RECIPES["best"], "parameters": {}, "method": "random"},
    },
}
TILES: dict[str, dict] = {  # changes to any recipe, by name
    "newlines: scaled": {"newlines": "scaled"},
    "newlines: none": {"newlines": "none"},
    "shares of tiles: equal": {"tile_shares": "equal"},
    "shares of tiles: joint": {"tile_shares": "joint"},
    "shares of tiles: by the thumbnail's attention": {"tile_shares": "attention"},
    "shares of tiles: the thumbnail alone": {"tile_shares": "thumbnail"},
    "no merging across tiles": {"across_tiles": False},
}
TILED_RECIPES: dict[str, dict] = {
    PAPER: {},
    "the recipe best": RECIPES["best"],
}
WHOLE = "newlines: rows, shares of tiles: area, merging across tiles"
TILED_ROWS = {
    name: {WHOLE: recipe} | {change: recipe | fields for change, fields in TILES.items()}
    for name, recipe in TILED_RECIPES.items()
}
BASES = (PAPER, WHOLE)  # changes to which those after them are compared
OPTIONS = {
    "model": Option(
        embedded.NAME,
        str,
        "embedded | embedded-next | a folder with a model that was trained like one of them",
        "what to evaluate",
    ),
    "pictures": count(2048, "images, three questions each"),
    "jobs": count(os.cpu_count() or 1, "processes"),
    "output": Option("output/ablations", str, "a folder", "where the table is written"),
}


def main(words: list[str]) -> int:
    """Evaluates every change; returns the command's exit status."""
    return run_command("ablate", __doc__, OPTIONS, words, _prepare, _execute)


def _prepare(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, dict]], tuple]:
    """The options, what is changed in a model of this kind, and at how many tokens.

    Raises:
        ValueError: there is no such model.
    """
    if checkpoints.cuts_into_tiles(checkpoints.read_config(options["model"])):
        return options, TILED_ROWS, TILED_BUDGETS
    return options, ROWS, BUDGETS


def _execute(prepared: tuple[dict[str, Any], dict[str, dict[str, dict]], tuple]) -> None:
    """Evaluates, prints every row when it is known, and writes the table."""
    options, changed, budgets = prepared
    named = [(dimension, name) for dimension, changes in changed.items() for name in changes]
    configs = [MergeConfig(tokens=t, **changed[d][n]) for d, n in named for t in budgets]
    found = evaluate_all(configs, FIRST_SEED, *(options[key] for key in ("pictures", "jobs", "model")))
    base: list[np.ndarray] = []
    rows = []
    for dimension, name in named:
        right = [next(found) for _ in budgets]
        base = right if name in BASES else base
        cells = {str(t): compare(*pair) for t, *pair in zip(budgets, right, base)}
        rows.append(
            {"dimension": dimension, "change": name, "config": changed[dimension][name], "tokens": cells}
        )
        print(_line(rows[-1]), flush=True)
    output = Path(options["output"])
    output.mkdir(parents=True, exist_ok=True)
    facts = {
        "model": options["model"],
        "pictures": options["pictures"],
        "questions": options["pictures"] * QUESTIONS,
        "commit": commit(),
    }
    facts |= {"machine": machine(), "rows": rows}
    (output / "ablations.json").write_text(json.dumps(facts, indent=1) + "\n")
    (output / "ablations.md").write_text(markdown(rows))


def compare(right: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Accuracy in per cent, and its difference to the base's over images, with its interval's half-width."""
    differences = 100 * (right.astype(float) - base).reshape(-1, QUESTIONS).mean(1)
    images = len(differences)
    half = 1.96 * differences.std(ddof=1) / images**0.5 if images > 1 else 0.0
    accuracy = 100 * float(right.mean())
    return {"accuracy": accuracy, "difference": float(differences.mean()), "half": float(half)}


def markdown(rows: list[dict]) -> str:
    """The table as Markdown."""
    budgets = [float(text) if "." in text else int(text) for text in rows[0]["tokens"]]
    head = f"| setting | changed to | {' | '.join(map(amount_phrase, budgets))} |\n"
    return head + f"|{'---|' * (len(budgets) + 2)}\n" + "\n".join(map(_line, rows)) + "\n"


def _line(row: dict) -> str:
    """A row of the Markdown table."""
    cells = [f"{c['accuracy']:.1f}" for c in row["tokens"].values()]
    if row["change"] not in BASES:
        differences = (f" ({c['difference']:+.1f} ± {c['half']:.1f})" for c in row["tokens"].values())
        cells = [cell + difference for cell, difference in zip(cells, differences)]
    return f"| {row['dimension']} | {row['change']} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
