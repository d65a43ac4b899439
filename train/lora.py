"""Which weights of a LLaVA learn: low-rank adapters through peft, and the projector whole."""

from typing import Any

from torch import nn

LANGUAGE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PROJECTOR = "multi_modal_projector"


def wrap(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """The model with adapters on its language model, everything else frozen but what the options name.

    Args:
        model: a LLaVA that does not merge yet; its weights stay where they are.
        options: lora_rank, lora_alpha, lora_dropout; targets, names of the language model's projections;
            tower "lora" or "frozen"; projector "train" or "frozen"; quantization; checkpointing; zero; seed.

    Raises:
        ValueError: targets that are not there.
    """
    import peft
    from transformers import set_seed

    inside = {name.rpartition(".")[2] for name, _ in model.named_modules() if "language_model" in name}
    if unknown := set(options["targets"]) - inside:
        raise ValueError(
            f"targets={', '.join(sorted(unknown))}: the language model has no such projections; LLaMA's are "
            f"{', '.join(LANGUAGE)}"
        )
    if options["quantization"] is not None:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    parts = [rf".*language_model.*\.({'|'.join(options['targets'])})"]
    if options["tower"] == "lora":
        parts.append(rf".*vision_tower.*\.({'|'.join(TOWER)})")
    config = peft.LoraConfig(
        r=options["lora_rank"],
        lora_alpha=options["lora_alpha"],
        lora_dropout=options["lora_dropout"],
        target_modules="|".join(parts),
        modules_to_save=[PROJECTOR] if options["projector"] == "train" else None,
        task_type="CAUSAL_LM",
    )
    set_seed(options["seed"])
    # DeepSpeed keeps float32 copies of what learns, and takes one dtype alone
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=options["zero"] is None)
    if options["zero"] is None:
        _learn_in_float32(wrapped)
    if options["checkpointing"]:
        _checkpoint(model)
    return wrapped


def _learn_in_float32(model: nn.Module) -> None:
    """Weights that learn are kept in float32: steps of 1e-4 of theirs are lost to bfloat16's eight bits."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def _checkpoint(model: nn.Module) -> None:
    """Gradient checkpointing, of what is on the way from the first weight that learns to the loss alone.

    Trainer would also ask for gradients of every input, as reentrant checkpointing needs them; these would
    send the backward pass through a frozen tower.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
