"""Images on which methods differ: what each answered, and which patches its tokens stand for."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from eval.embedded_images import data_url, embedded_image
from eval.evaluation.tasks import EMBEDDED_TASKS
from eval.naming import PITOME, TOWER, UNMERGED, amount_phrase, method_title, place_phrase
from eval.report.rows import Row
from eval.report.sweep_results import Result, SweepResults
from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.cli.draw.overlay import Outside, overlay
from llava_pitome.image_schedule import resized
from llava_pitome.models import hf_llava
from llava_pitome.tracing import record_merges, trace_image

SCALE = 2  # screen pixels per image pixel
CORRECT = 0.5  # score from which an answer counts as right


class Answer(NamedTuple):
    """One method's answer, whether it is right, and its tokens as an image (a data URL)."""

    title: str
    text: str
    is_right: bool
    image: str


class Example(NamedTuple):
    """One question on which methods differ; its image is a data URL."""

    image: str
    question: str
    true_answer: str
    answers: list[Answer]


def find_examples(sweep: SweepResults, rows: Sequence[Row], count: int) -> tuple[list[Example], str]:
    """Examples at the median number of tokens, each method in its own place, and a sentence about them."""
    if (data := sweep.embedded_data) is None:
        return [], "Example images are shown for the embedded benchmark only, whose images need no download."
    results = {result.name: result for result in sweep.tasks[EMBEDDED_TASKS[data]]}
    home = [row for row in rows if row.is_at_home and row.tokens is not None]
    counts = sorted({row.tokens for row in home})
    if not count or not counts:
        return [], "No example images: no method was evaluated in its own place."
    tokens = counts[(len(counts) - 1) // 2]
    shown = [row for row in rows if row.method == UNMERGED] + [r for r in home if r.tokens == tokens]
    found = [results[row.name] for row in shown]
    chosen = _choose(found, shown, count)
    if not chosen:
        return [], f"No example images: at {amount_phrase(tokens)} all methods answer every question alike."
    images = [embedded_image(found[0].images()[i], data) for i in chosen]
    model, processor = load(sweep.facts["model"], dtype=sweep.facts["dtype"])
    draw = _draw_tokens if hf_llava.find(model).llava.tiling is None else _draw_tiled_tokens
    drawn = [draw(row, images, model, processor) for row in shown]
    examples = []
    for n, i in enumerate(chosen):
        question = found[0].answers[i]
        answers = [_answer(row, result, i, of_row[n]) for row, result, of_row in zip(shown, found, drawn)]
        truth = str(question.get("multiple_choice_answer", ""))
        examples.append(Example(data_url(_enlarge(images[n])), question["question"], truth, answers))
    return examples, (
        f"Questions on which the methods differ most, at {amount_phrase(tokens)}, each method in its own "
        "paper's place; alternately such that PiToMe answers right and wrong. The patches of a token have "
        "their mean colour, with white lines between tokens; dark patches are dropped, hatched ones are "
        "padding. Of random methods, the first seed is shown."
    )


def _choose(results: Sequence[Result], rows: Sequence[Row], count: int) -> list[int]:
    """Questions on which most methods differ, on different images, PiToMe right and wrong alternately."""
    if not all(result.is_scored for result in results):
        return []
    right = np.array([[a["exact_match"] >= CORRECT for a in result.answers] for result in results])
    share = right[[row.method != UNMERGED for row in rows]].mean(0)
    reference = next(
        (right[i] for i, r in enumerate(rows) if (r.method, r.place) == (PITOME, TOWER)), share >= CORRECT
    )
    ranked = [int(i) for i in np.argsort(np.abs(share - 0.5), kind="stable") if 0 < share[i] < 1]
    images = results[0].images()
    chosen: list[int] = []
    for turn in range(count):
        left = [i for i in ranked if images[i] not in {images[j] for j in chosen}]
        chosen += [i for i in left if reference[i] == (turn % 2 == 0)][:1] or left[:1]
    return chosen


def _answer(row: Row, result: Result, question: int, image: Image.Image) -> Answer:
    """A method's answer to one question."""
    text, score = (result.answers[question][key] for key in ("answer", "exact_match"))
    text = ", ".join(map(str, text)) if isinstance(text, list) else str(text)
    place = f" {place_phrase(row.place)}" if row.place else ""
    kept = f"{row.image_tokens:.4g} tokens" if row.tokens is None else amount_phrase(row.tokens)
    return Answer(f"{method_title(row.method)}{place}, {kept}", text, score >= CORRECT, data_url(image))


def _draw_tokens(
    row: Row, images: Sequence[Image.Image], model: torch.nn.Module, processor: Any
) -> list[Image.Image]:
    """The tokens of each image at the language model's input; the plain image where that is every patch."""
    config = None if row.config is None else MergeConfig.from_dict(row.config)
    patch = processor.patch_size
    if config is not None and config.resize is not None:
        rows, columns = config.resize
        small = [i.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC) for i in images]
        images = [s.resize(i.size, Image.Resampling.NEAREST) for s, i in zip(small, images)]
    if config is None or not (config.merges_in_tower or config.merges_in_prefix):
        return [_enlarge(image) for image in images]
    pixels = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    with merge_tokens(model, config) as handle, record_merges(handle) as recorder, torch.no_grad():
        model.model.get_image_features(pixel_values=pixels.to(model.dtype))
        states = [recorder.trace(i).after("prefix") for i in range(len(images))]
    return [overlay(i, state.slot, patch * SCALE, dropped=state.dropped) for i, state in zip(images, states)]


def _draw_tiled_tokens(
    row: Row, images: Sequence[Image.Image], model: torch.nn.Module, processor: Any
) -> list[Image.Image]:
    """As `_draw_tokens`, where the model cuts images into tiles: these put together, and the thumbnail."""
    config = None if row.config is None else MergeConfig.from_dict(row.config)
    if config is not None and config.resize is not None:
        return [_resized(image, config, model, processor) for image in images]
    if config is None or not (config.merges_in_tower or config.merges_in_prefix):
        return list(images)
    drawn = []
    for image in images:
        traced = trace_image(model, processor, image, config)
        state, outside = traced.trace.after("prefix"), Outside(traced.padding, traced.blank)
        step = processor.patch_size
        drawn.append(overlay(traced.image, state.slot, step, traced.grid, state.dropped, outside))
    return drawn


def _resized(image: Image.Image, config: MergeConfig, model: torch.nn.Module, processor: Any) -> Image.Image:
    """The detail that an image has in resized tiles, at its own size."""
    tiling = hf_llava.find(model).llava.tiling
    grid = resized(config, tiling.image(image.height, image.width)).regions[-1]
    small = (max(grid.width, 1) * processor.patch_size, max(grid.height, 1) * processor.patch_size)
    return image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.NEAREST)


def _enlarge(image: Image.Image) -> Image.Image:
    return image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST)
