"""The model that is trained: a LLaVA with LoRA adapters (peft) and, by default, its projector in full."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from llava_pitome import MergeConfig, embedded
from llava_pitome.models import checkpoints, config_checks
from llava_pitome.models import hf_llava as llava

LLAMA_PROJECTIONS = (  # Mistral and Qwen2 use the same names
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
TOWER_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PROJECTOR = "multi_modal_projector"


def load_model(
    options: dict[str, Any], configs: Sequence[MergeConfig], arguments: Any
) -> tuple[nn.Module, Any]:
    """The model without adapters and merging, and its processor.

    Raises:
        ValueError: it is not a LLaVA, is an adapter, or does not support one of the merge configs.
    """
    import torch

    path = options["model"]
    if path != embedded.NAME and checkpoints.model_path(path) != path:
        raise ValueError(
            f"model={path} is an adapter: save what its merge_and_unload returns, and train that"
        )
    device = {}
    if options["quantization"] is not None and torch.cuda.is_available():
        device = {"device_map": {"": arguments.local_process_index}}
    dtype = "bfloat16" if arguments.bf16 else "float32"
    model, processor = checkpoints.load(path, options["quantization"], dtype=dtype, **device)
    parts = llava.find(model)
    for config in configs:
        config_checks.check(parts, config)
    return model, processor


def base_model_name(path: str) -> str:
    """The model as its adapter names it: an absolute path, a hub id, or "embedded"."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def add_adapters(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """The model as a peft model; trainable are its adapters and, with projector=train, the projector.

    Raises:
        ValueError: targets that the language model does not have.
    """
    import peft
    from transformers import set_seed

    names = {name.rpartition(".")[2] for name, _ in model.named_modules() if "language_model" in name}
    if unknown := set(options["targets"]) - names:
        raise ValueError(
            f"targets={', '.join(sorted(unknown))}: the language model has no such projections; LLaMA's are "
            f"{', '.join(LLAMA_PROJECTIONS)}"
        )
    if options["quantization"] is not None:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = [rf".*language_model.*\.({'|'.join(options['targets'])})"]
    if options["tower"] == "lora":
        targets.append(rf".*vision_tower.*\.layers\..*\.({'|'.join(TOWER_PROJECTIONS)})")
    config = peft.LoraConfig(
        r=options["lora_rank"],
        lora_alpha=options["lora_alpha"],
        lora_dropout=options["lora_dropout"],
        target_modules="|".join(targets),
        modules_to_save=[PROJECTOR] if options["projector"] == "train" else None,
        task_type="CAUSAL_LM",
    )
    set_seed(options["seed"])
    # DeepSpeed keeps float32 copies of trainable weights itself, and requires one dtype
    peft_model = peft.get_peft_model(model, config, autocast_adapter_dtype=options["zero"] is None)
    if options["zero"] is None:  # bfloat16 has 8 bits, in which updates of 1e-4 are lost
        for weight in peft_model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    if options["checkpointing"]:
        # not the Trainer's: it also requires gradients of the inputs, for reentrant checkpointing, which
        # would send the backward pass through a frozen tower
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
    return peft_model
