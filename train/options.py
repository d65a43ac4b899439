"""The options of train.run, and the checks on them that need no model."""

from typing import Any

from llava_pitome import MergeConfig
from llava_pitome.cli.options import (
    Option,
    boolean,
    folder,
    listed,
    merge_options,
    number,
    one_of,
    several,
    share,
    whole,
)
from llava_pitome.config import combined
from llava_pitome.embedded import NAME as EMBEDDED
from llava_pitome.embedded.dataset import SCENES as SCENES_OF
from llava_pitome.methods import METHODS
from llava_pitome.models.checkpoints import QUANTIZATIONS
from train.export import FIRST_SEED
from train.model import LLAMA_PROJECTIONS

EMBEDDED_DATA = tuple(SCENES_OF)  # accepted instead of a file of rows
SCENES = 8192
MAX_LENGTH = 2048  # tokens of a row
MAX_LENGTH_TILED = 8192  # the same for models that cut images into tiles, up to the language model's context
RATIO = 0.9  # used where no option sets an amount
# what a method may compute from the text's attention: in training the text contains the answers
TEXT_INPUTS = {"text", "text_attention", "last_attention", "received_attention"}


def _choice(*names: str) -> tuple[Any, str]:
    return one_of(*names), " | ".join(names)


def _optional_choice(*names: str) -> tuple[Any, str]:
    """As `_choice`, with "none" for None."""
    read, allowed = _choice(*names, "none")
    return lambda text: None if read(text) == "none" else text, allowed


COUNT, FROM_ZERO = (whole(1), "a whole number from 1"), (whole(0), "a whole number from 0")
POSITIVE, BELOW_ONE = (
    (number(0, above=True), "a number above 0"),
    (number(0, 1, below=True), "a number in [0, 1)"),
)
FLAG = (boolean, "true | false")
MERGING = merge_options()
GROUPS = {
    "model and data": {
        "model": Option(
            EMBEDDED, str, "embedded, embedded-next, a hub id or a folder", "the LLaVA that is trained"
        ),
        "data": Option(
            EMBEDDED,
            str,
            f"{', '.join(EMBEDDED_DATA)}, or a JSON or JSONL in LLaVA's format",
            "training data",
        ),
        "images": Option(None, str, "a folder", "image names are relative to it; that of data by default"),
        "scenes": Option(None, *COUNT, f"images of embedded data; {SCENES:,} by default"),
        "max_length": Option(
            None,
            whole(2),
            "a whole number from 2",
            f"tokens of a row, its images counted unmerged; {MAX_LENGTH:,} by default, or with tiles "
            f"{MAX_LENGTH_TILED:,}, up to the language model's context",
        ),
        "skip_broken": Option(0, *FROM_ZERO, "rows that may be left out as broken"),
        "group_by_length": Option(False, *FLAG, "batches of rows of similar length"),
        "workers": Option(0, *FROM_ZERO, "processes that read images"),
    },
    "merging": {
        "ratio": MERGING["ratio"]._replace(
            read=several(share),
            allowed="numbers in (0, 1] with commas",
            help="share of the tokens each tower layer keeps; drawn every step, repeated ones more often",
        ),
        "tokens": MERGING["tokens"]._replace(
            read=several(MERGING["tokens"].read),
            allowed="whole numbers from 1 with commas",
            help="tokens of a whole image, instead of ratio; drawn likewise",
        ),
        "recipe": MERGING["recipe"],
        "merging": MERGING["merging"],
        "distill": Option(False, *FLAG, "also learn the predictions of the unmerged model"),
        "distill_weight": Option(None, *POSITIVE, "weight of the distillation loss; 1 by default"),
    },
    "adapters": {
        "lora_rank": Option(64, *COUNT, "rank of the LoRA adapters"),
        "lora_alpha": Option(128.0, *POSITIVE, "their scale times their rank"),
        "lora_dropout": Option(0.05, *BELOW_ONE, "dropout of their inputs"),
        "targets": Option(
            LLAMA_PROJECTIONS, listed, "names with commas", "projections of the language model with adapters"
        ),
        "tower": Option("frozen", *_choice("frozen", "lora"), "the vision tower"),
        "projector": Option("train", *_choice("train", "frozen"), "the multimodal projector"),
    },
    "optimization": {
        "max_steps": Option(None, *COUNT, "steps, instead of epochs"),
        "epochs": Option(None, *POSITIVE, "passes over the data; 1 by default"),
        "batch_size": Option(16, *COUNT, "rows per process and forward pass"),
        "accumulate": Option(1, *COUNT, "forward passes per step"),
        "lr": Option(2e-4, *POSITIVE, "peak learning rate"),
        "warmup": Option(0.03, *BELOW_ONE, "share of the steps in which the learning rate rises"),
        "weight_decay": Option(0.0, number(0), "a number from 0", "of the optimizer"),
        "seed": Option(0, *FROM_ZERO, "of the order of rows, the draws of ratios, the adapters"),
    },
    "memory and processes": {
        "processes": Option(1, *COUNT, "processes on this machine, one per GPU"),
        "zero": Option(None, *_optional_choice("2", "3"), "DeepSpeed's ZeRO stage"),
        "quantization": Option(None, *_optional_choice(*QUANTIZATIONS), "of the frozen weights"),
        "dtype": Option(
            "auto", *_choice("auto", "bfloat16", "float32"), "of computation; auto: float32 if saved so"
        ),
        "checkpointing": Option(False, *FLAG, "gradient checkpointing: less memory, more time"),
    },
    "output": {
        "output": Option("output/lora", folder, "a folder, not a file", "of adapter, logs and checkpoints"),
        "save_steps": Option(500, *COUNT, "steps between checkpoints"),
        "log_steps": Option(1, *COUNT, "steps between logged losses"),
        "resume": Option(False, *FLAG, "continue from the last checkpoint in output"),
        "evaluate": Option(False, *FLAG, "measure accuracy before and after, for the model card"),
        "limit": Option(None, *COUNT, "questions of the evaluation; all by default"),
    },
}
OPTIONS = {k: o._replace(group=group) for group, options in GROUPS.items() for k, o in options.items()}


def check(options: dict[str, Any]) -> tuple[MergeConfig, ...]:
    """The merge configs of the run, one for each value of ratio or tokens, once the options are checked.

    Raises:
        ValueError: options that contradict each other.
    """
    if options["ratio"] is not None and options["tokens"] is not None:
        raise ValueError("ratio= and tokens= exclude each other")
    if options["zero"] == "3" and options["quantization"] is not None:
        raise ValueError(
            f"zero=3 cannot partition weights that quantization={options['quantization']} has packed; use "
            "zero=2"
        )
    for key, requirement, is_met in (
        ("epochs", "no max_steps=", options["max_steps"] is None),
        ("scenes", " or ".join(f"data={name}" for name in EMBEDDED_DATA), options["data"] in EMBEDDED_DATA),
        ("images", "a data= of your own", options["data"] not in EMBEDDED_DATA),
        ("distill_weight", "distill=true", options["distill"]),
        ("limit", "evaluate=true", options["evaluate"]),
    ):
        if options[key] is not None and not is_met:
            raise ValueError(f"{key}={options[key]} requires {requirement}")
    configs = _merge_configs(options)
    if TEXT_INPUTS & set(METHODS[configs[0].method].needs):
        raise ValueError(
            f"method={configs[0].method!r} selects tokens by the attention of the text, which contains the "
            "answer in training; such methods can be evaluated, not trained with"
        )
    return configs


def _merge_configs(options: dict[str, Any]) -> tuple[MergeConfig, ...]:
    amounts = {key: options[key] for key in ("ratio", "tokens") if options[key] is not None}
    combined(amounts, options["merging"])  # raises for a field that is given twice
    changes = options["merging"] or {}
    drawn: list[dict[str, Any]] = [{key: value} for key in amounts for value in amounts[key]]
    if not drawn:
        drawn = [{"ratio": RATIO}] if options["merging"] is None else [{}]
    return tuple(MergeConfig.recipe(options["recipe"], **changes, **amount) for amount in drawn)


def data_description(options: dict[str, Any]) -> str:
    """The training data as the model card describes it."""
    if options["data"] in EMBEDDED_DATA:
        return f"{options['scenes'] or SCENES} {options['data']} scenes from seed {FIRST_SEED:,} on"
    return options["data"]
