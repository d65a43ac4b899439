"""Pictures on which methods differ: what each answered, and which patches became one token there."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from eval.combinations import REFERENCE, UNMERGED
from eval.gather import EMBEDDED, Found, Sweep, pictures, scored
from eval.rows import TOWER, Row
from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.cli.draw.overlay import overlay
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene
from llava_pitome.tracing import record_merges

SCALE = 2  # screen pixels a picture pixel


class Answer(NamedTuple):
    """What one method said, whether it is right, and its tokens as a picture."""

    row: Row
    said: str
    right: bool
    drawn: Image.Image


class Example(NamedTuple):
    """One question on which methods differ."""

    picture: Image.Image
    question: str
    truth: str
    answers: list[Answer]


def find(sweep: Sweep, rows: Sequence[Row], count: int) -> tuple[list[Example], str]:
    """Examples at the middle one of the token counts, and what is to be said of them.

    Every method is shown in its own paper's place, and PiToMe in the tower.
    """
    if EMBEDDED not in sweep.tasks:
        return (
            [],
            "Example pictures are shown for the embedded benchmark only, whose pictures need no download.",
        )
    by_name = {found.about["name"]: found for found in sweep.tasks[EMBEDDED]}
    home = [row for row in rows if row.at_home and row.tokens is not None]
    counts = sorted({row.tokens for row in home})
    if not count or not counts:
        return [], "No example pictures: nothing was compared in its own place."
    tokens = counts[(len(counts) - 1) // 2]
    shown = [row for row in rows if row.method == UNMERGED] + [r for r in home if r.tokens == tokens]
    chosen = _choose([by_name[row.name] for row in shown], shown, count)
    if not chosen:
        return [], f"No example pictures: at {tokens} tokens no question divides the methods."
    seeds = [pictures(by_name[shown[0].name])[i] for i in chosen]
    seen = [Image.fromarray(render(scene(seed))) for seed in seeds]
    loaded = load("embedded", dtype=sweep.facts["dtype"])
    drawn = {row.name: _drawn(row, seen, sweep.facts["patches"], *loaded) for row in shown}
    examples = [
        Example(
            _large(seen[n]),
            by_name[shown[0].name].answers[i]["question"],
            str(by_name[shown[0].name].answers[i].get("multiple_choice_answer", "")),
            [_answer(row, by_name[row.name], i, drawn[row.name][n]) for row in shown],
        )
        for n, i in enumerate(chosen)
    ]
    return examples, (
        f"Questions on which the methods differ most, at {tokens} tokens, each method in its own paper's "
        "place; in turns such that PiToMe gets right and wrong. Patches of one token have their mean "
        "colour, with white lines between tokens; dark patches are dropped. Of methods that draw, the "
        "first draw is shown."
    )


def _choose(found: Sequence[Found], rows: Sequence[Row], count: int) -> list[int]:
    """Questions that divide the methods most, on different pictures, PiToMe right and wrong in turns."""
    if not all(scored(f) for f in found):
        return []
    right = np.array([[a["exact_match"] >= 0.5 for a in f.answers] for f in found])  # (methods, Q)
    merged = np.array([row.method != UNMERGED for row in rows])
    share = right[merged].mean(0)
    mine = next(
        (right[i] for i, r in enumerate(rows) if (r.method, r.place) == (REFERENCE, TOWER)), share >= 0.5
    )
    ranked = [int(i) for i in np.argsort(np.abs(share - 0.5), kind="stable") if 0 < share[i] < 1]
    seen, used = pictures(found[0]), set()
    chosen: list[int] = []
    for turn in range(count):
        fits = [i for i in ranked if seen[i] not in used and i not in chosen]
        best = next((i for i in fits if mine[i] == (turn % 2 == 0)), next(iter(fits), None))
        if best is not None:
            chosen.append(best)
            used.add(seen[best])
    return chosen


def _answer(row: Row, found: Found, i: int, drawn: Image.Image) -> Answer:
    said = found.answers[i]["answer"]
    said = ", ".join(map(str, said)) if isinstance(said, list) else str(said)
    return Answer(row, said, bool(found.answers[i]["exact_match"] >= 0.5), drawn)


def _drawn(
    row: Row, seen: Sequence[Image.Image], patches: int, model: torch.nn.Module, processor: Any
) -> list[Image.Image]:
    """What reaches the language model of each picture; the plain pictures where that is every patch."""
    config = None if row.config is None else MergeConfig.from_dict(row.config)
    if config is not None and config.resize is not None:
        seen = [_small(picture, config, patches) for picture in seen]
    if config is None or not (config.merges_in_tower or config.merges_in_prefix):
        return [_large(picture) for picture in seen]
    pixels = processor.image_processor(list(seen), return_tensors="pt")["pixel_values"]
    with merge_tokens(model, config) as merging, record_merges(merging) as recorder, torch.no_grad():
        model.model.get_image_features(pixel_values=pixels.to(model.dtype))
        states = [recorder.trace(i).after("prefix") for i in range(len(seen))]
    step = seen[0].width // round(patches**0.5) * SCALE
    return [overlay(p, state.slot, step, dropped=state.dropped) for p, state in zip(seen, states)]


def _small(picture: Image.Image, config: MergeConfig, patches: int) -> Image.Image:
    """The picture as it is left when it is shrunk to fewer patches."""
    rows, columns = config.resize
    patch = picture.width // round(patches**0.5)
    small = picture.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def _large(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)
