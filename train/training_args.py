"""The Trainer's arguments, from the options of train.run."""

from pathlib import Path
from typing import Any

from llava_pitome.models import checkpoints
from train.launch import is_launched

ZERO = Path(__file__).parent / "deepspeed"
SHARED_MEMORY_OP = "deepspeed_shm_comm"  # of DeepSpeed; gloo does the same without a compiler


def training_arguments(options: dict[str, Any]) -> Any:
    """TrainingArguments; DeepSpeed and the process group are initialized.

    Raises:
        ValueError: the model is not a LLaVA, or the Trainer refuses a value.
    """
    import torch
    from transformers import TrainingArguments

    cpu = not torch.cuda.is_available()
    if options["zero"] and cpu:
        import deepspeed

        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
        deepspeed.init_distributed(dist_backend="gloo")
    return TrainingArguments(
        output_dir=options["output"],
        max_steps=options["max_steps"] or -1,
        num_train_epochs=options["epochs"] or 1.0,
        per_device_train_batch_size=options["batch_size"],
        gradient_accumulation_steps=options["accumulate"],
        learning_rate=options["lr"],
        lr_scheduler_type="cosine",
        warmup_steps=options["warmup"],  # a share of the steps below 1
        weight_decay=options["weight_decay"],
        bf16=_uses_bf16(options),
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
        ddp_backend="gloo" if cpu and is_launched() else None,
        deepspeed=str(ZERO / f"zero{options['zero']}.json") if options["zero"] else None,
        remove_unused_columns=False,
        label_names=["labels"],
    )


def _uses_bf16(options: dict[str, Any]) -> bool:
    """Whether computation is in bfloat16; trainable weights are in float32 in either case."""
    checkpoints.patches_and_layers(options["model"])  # raises for anything but a LLaVA
    if options["dtype"] != "auto":
        return options["dtype"] == "bfloat16"
    saved = checkpoints.read_config(options["model"]).dtype
    return not str(saved).endswith("float32")
