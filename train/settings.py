"""The keys of train/run.py, and what must fit together among them before anything is loaded."""

from typing import Any

from llava_pitome import MergeConfig
from llava_pitome.cli.options import Option, boolean, fields, folder, listed, one_of, share, whole
from llava_pitome.config import RECIPES, combined
from llava_pitome.methods import METHODS
from llava_pitome.models.checkpoints import QUANTIZATIONS
from train.export import SEEDS
from train.lora import LANGUAGE

EMBEDDED = "embedded"
SCENES = 8192
RATIO = 0.9  # where nothing says how far to merge
KINDS = ("auto", "bfloat16", "float32")
SEEING = {"text", "text_attention", "last_attention", "received_attention"}  # in training, the answers


def _ratios(text: str) -> tuple[float, ...]:
    return tuple(share(word) for word in text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(whole(1)(word) for word in text.split(","))


def _positive(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise ValueError(text)
    return float(text)


def _from_zero(text: str) -> float:
    return 0.0 if float(text) == 0 else _positive(text)


def _below_one(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise ValueError(text)
    return float(text)


COUNT, NUMBER = "a whole number from 1", "a number above 0"
OPTIONS = {
    "model": Option(EMBEDDED, str, "embedded, a hub id or a folder", "what learns"),
    "data": Option(EMBEDDED, str, "embedded, or a JSON or JSONL in LLaVA's format", "what it learns from"),
    "images": Option(None, str, "a folder", "that image names start from; that of data where not given"),
    "scenes": Option(None, whole(1), COUNT, f"pictures of data=embedded; {SCENES:,} where not given"),
    "ratio": Option(
        None,
        _ratios,
        "numbers in (0, 1], with commas",
        "how far to merge; drawn every step, one said twice twice as often",
    ),
    "tokens": Option(None, _counts, "whole numbers from 1, with commas", "image tokens, instead of a ratio"),
    "recipe": Option("paper", one_of(*RECIPES), ", ".join(RECIPES), "how to merge"),
    "merging": Option(None, fields, "fields of MergeConfig as JSON", "what changes the recipe"),
    "output": Option("output/lora", folder, "a folder, not a file", "where adapter, logs and checkpoints go"),
    "max_steps": Option(None, whole(1), COUNT, "steps; instead of epochs"),
    "epochs": Option(None, _positive, NUMBER, "how often every row is seen; once where not given"),
    "batch_size": Option(16, whole(1), COUNT, "rows a process and pass"),
    "accumulate": Option(1, whole(1), COUNT, "passes a step"),
    "lr": Option(2e-4, _positive, NUMBER, "learning rate, where it is highest"),
    "warmup": Option(0.03, _below_one, "a number in [0, 1)", "share of the steps in which it rises"),
    "weight_decay": Option(0.0, _from_zero, "a number from 0", "of the optimizer"),
    "zero": Option(None, one_of("2", "3", "none"), "2 | 3 | none", "DeepSpeed's ZeRO stage"),
    "processes": Option(1, whole(1), COUNT, "on this machine; one a GPU"),
    "quantization": Option(
        None, one_of(*QUANTIZATIONS, "none"), " | ".join((*QUANTIZATIONS, "none")), "of the frozen weights"
    ),
    "dtype": Option("auto", one_of(*KINDS), " | ".join(KINDS), "of passes; auto: float32 where saved so"),
    "distill": Option(False, boolean, "true | false", "also learn what the unmerged model says"),
    "distill_weight": Option(None, _positive, NUMBER, "of that beside the data's answers; 1 where not given"),
    "lora_rank": Option(64, whole(1), COUNT, "of the adapters"),
    "lora_alpha": Option(128.0, _positive, NUMBER, "their scale, times their rank"),
    "lora_dropout": Option(0.05, _below_one, "a number in [0, 1)", "in front of them"),
    "targets": Option(
        LANGUAGE, listed, "names with commas", "projections of the language model with adapters"
    ),
    "tower": Option("frozen", one_of("frozen", "lora"), "frozen | lora", "the vision tower"),
    "projector": Option("train", one_of("train", "frozen"), "train | frozen", "between tower and LLM"),
    "max_length": Option(2048, whole(2), "a whole number from 2", "tokens of a row, pictures unmerged"),
    "skip_broken": Option(0, whole(0), "a whole number from 0", "rows that may be left out as broken"),
    "group_by_length": Option(False, boolean, "true | false", "rows of like length in one batch"),
    "checkpointing": Option(False, boolean, "true | false", "gradient checkpointing: less memory, more time"),
    "workers": Option(0, whole(0), "a whole number from 0", "processes that read pictures"),
    "save_steps": Option(500, whole(1), COUNT, "steps between checkpoints"),
    "log_steps": Option(1, whole(1), COUNT, "steps between losses"),
    "resume": Option(False, boolean, "true | false", "go on from the last checkpoint in output"),
    "evaluate": Option(False, boolean, "true | false", "measure before and after, for the model card"),
    "limit": Option(None, whole(1), COUNT, "questions to evaluate with; all where not given"),
    "seed": Option(0, whole(0), "a whole number from 0", "of order, draws and adapters"),
}


def check(options: dict[str, Any]) -> tuple[MergeConfig, ...]:
    """The configs that steps choose from, once everything that can be checked without a model is.

    Raises:
        ValueError: options that do not fit together.
    """
    for key in ("zero", "quantization"):
        if options[key] == "none":
            options[key] = None
    if options["ratio"] is not None and options["tokens"] is not None:
        raise ValueError("give ratio= or tokens=, not both")
    if options["zero"] == "3" and options["quantization"] is not None:
        raise ValueError(
            f"zero=3 divides weights that quantization={options['quantization']} has packed; take zero=2"
        )
    for key, needed, there in (
        ("epochs", "no max_steps=", options["max_steps"] is None),
        ("scenes", "data=embedded", options["data"] == EMBEDDED),
        ("images", "a data= of your own", options["data"] != EMBEDDED),
        ("distill_weight", "distill=true", options["distill"]),
        ("limit", "evaluate=true", options["evaluate"]),
    ):
        if options[key] is not None and not there:
            raise ValueError(f"{key}={options[key]} takes {needed} beside it")
    merging = _merging(options)
    if SEEING & set(METHODS[merging[0].method].needs):
        raise ValueError(
            f"method={merging[0].method!r} goes by what the text attends to, in training the answer; such "
            "methods can be evaluated, not trained with"
        )
    return merging


def _merging(options: dict[str, Any]) -> tuple[MergeConfig, ...]:
    """One config for each number of ratio= or tokens=, or the one that merging= makes of the recipe."""
    several = {key: options[key] for key in ("ratio", "tokens") if options[key] is not None}
    combined(several, options["merging"])  # nothing twice
    changes = options["merging"] or {}
    amounts: list[dict[str, Any]] = [{key: number} for key in several for number in several[key]]
    if not amounts:
        amounts = [{"ratio": RATIO}] if options["merging"] is None else [{}]
    return tuple(MergeConfig.recipe(options["recipe"], **changes, **amount) for amount in amounts)


def described(options: dict[str, Any]) -> str:
    """What the data is, for people."""
    if options["data"] == EMBEDDED:
        return f"{options['scenes'] or SCENES} embedded scenes from seed {SEEDS:,} on"
    return options["data"]
