"""The pieces of a run, made from its options: arguments of the Trainer, model, rows."""

import fcntl
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from llava_pitome import MergeConfig
from llava_pitome.models import checkpoints
from llava_pitome.models import hf_llava as llava
from train import export
from train.launch import launched
from train.records import Records
from train.settings import EMBEDDED, SCENES

log = logging.getLogger("train.fit")
ZERO = Path(__file__).parent / "deepspeed"
SHARED_MEMORY = "deepspeed_shm_comm"  # of DeepSpeed's operations
BROKEN = "broken.jsonl"  # in the output folder


def data(options: dict[str, Any]) -> tuple[Records, Path]:
    """The rows' file, and the folder that image names start from; embedded ones are written once.

    Raises:
        ValueError: data= is no file of rows.
    """
    if options["data"] != EMBEDDED:
        file = Path(options["data"])
        return Records(file), Path(options["images"] or file.parent)
    scenes = options["scenes"] or SCENES
    folder = Path(options["output"]).parent / f"embedded-{scenes}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # one of several processes writes
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / "conversations.json"
        if not file.exists():
            log.info("drawing %d scenes", scenes)
            export.write(folder, scenes)
    return Records(file), folder


def arguments(options: dict[str, Any], output: Path) -> Any:
    """The Trainer's arguments, DeepSpeed and the process group prepared.

    Raises:
        ValueError: the model is none, or values that the Trainer refuses.
    """
    import torch
    from transformers import TrainingArguments

    cpu = not torch.cuda.is_available()
    if options["zero"] and cpu:
        import deepspeed

        deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False  # gloo does it without a compiler
        deepspeed.init_distributed(dist_backend="gloo")
    return TrainingArguments(
        output_dir=str(output),
        max_steps=options["max_steps"] or -1,
        num_train_epochs=options["epochs"] or 1.0,
        per_device_train_batch_size=options["batch_size"],
        gradient_accumulation_steps=options["accumulate"],
        learning_rate=options["lr"],
        lr_scheduler_type="cosine",
        warmup_steps=options["warmup"],  # below 1 a share of the steps
        weight_decay=options["weight_decay"],
        bf16=_half(options),
        train_sampling_strategy="group_by_length" if options["group_by_length"] else "random",
        dataloader_num_workers=options["workers"],
        dataloader_pin_memory=not cpu,
        logging_steps=options["log_steps"],
        logging_nan_inf_filter=False,
        report_to=["tensorboard"],
        save_steps=options["save_steps"],
        save_total_limit=2,
        seed=options["seed"],
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and launched() else None,
        deepspeed=str(ZERO / f"zero{options['zero']}.json") if options["zero"] else None,
        remove_unused_columns=False,
        label_names=["labels"],
    )


def _half(options: dict[str, Any]) -> bool:
    """Whether passes are computed in bfloat16; what learns is in float32 all the same."""
    checkpoints.patches_and_layers(options["model"])  # raises for what is no LLaVA
    if options["dtype"] != "auto":
        return options["dtype"] == "bfloat16"
    saved = checkpoints.read_config(options["model"]).dtype
    return not str(saved).endswith("float32")


def model(options: dict[str, Any], merging: Sequence[MergeConfig], arguments: Any) -> tuple[nn.Module, Any]:
    """The model that is to learn, and its processor.

    Raises:
        ValueError: it is no LLaVA, is an adapter itself, or cannot merge so.
    """
    import torch

    path = options["model"]
    if path != EMBEDDED and checkpoints.model_path(path) != path:
        raise ValueError(
            f"model={path} is an adapter: merge_and_unload it, save that, and train what you saved"
        )
    place = {}
    if options["quantization"] is not None and torch.cuda.is_available():
        place = {"device_map": {"": arguments.local_process_index}}
    found, processor = checkpoints.load(
        path, options["quantization"], dtype="bfloat16" if arguments.bf16 else "float32", **place
    )
    vars(found.config).pop("token_merging", None)  # the options say how to merge
    parts = llava.find(found)
    for config in merging:
        llava.check(parts, config)
    return found, processor


def rows(
    options: dict[str, Any],
    merging: Sequence[MergeConfig],
    records: Records,
    folder: Path,
    processor: Any,
    model: nn.Module,
    arguments: Any,
) -> Any:
    """The rows that can be trained on.

    Raises:
        ValueError: too many cannot, or the processor's chat template cannot be followed.
    """
    from train.broken import Broken
    from train.data import Conversations

    parts, first = llava.find(model), arguments.process_index == 0
    file = Path(arguments.output_dir) / BROKEN
    with arguments.main_process_first(local=False):
        if first and not options["resume"]:
            file.unlink(missing_ok=True)  # an earlier run's
    log.info("looking at %d rows", len(records))
    arriving = [config.tokens_at(parts.patches, parts.feature) + parts.front for config in merging]
    return Conversations(
        records,
        folder,
        processor,
        parts.patches + parts.front,
        options["max_length"],
        Broken(options["skip_broken"], file, first),
        round(statistics.mean(arriving)),
    )


def named(path: str) -> str:
    """A model as an adapter names it: a folder by its whole path."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
