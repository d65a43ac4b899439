"""Whole models in float64, so that equality can be tight and no near tie falls otherwise."""

import torch
from prompts import batch, single
from torch import nn
from transformers import GenerationMixin
from transformers.models.llama.modeling_llama import LlamaRMSNorm

CLOSE = {"rtol": 0, "atol": 1e-9}
ENCODES_FIRST = hasattr(
    GenerationMixin, "_expand_multimodal_outputs"
)  # transformers 5.23 does, 5.17 does not


def precise(model):
    """The model in float64 throughout; Llama's own norm goes through float32."""
    model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return model


def doubled(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def padded(processor, prompts, pictures, side="left"):
    processor.tokenizer.padding_side = side
    if not any("<image>" in prompt for prompt in prompts):
        return dict(processor(text=prompts, return_tensors="pt", padding=True))
    return doubled(batch(processor, prompts, pictures))


def alone(processor, prompt, pictures):
    return doubled(single(processor, prompt, pictures))


def positions(mask, count):
    """Of the last `count` tokens, as generate numbers them."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -count:]


def run(model, inputs, **options):
    """One forward pass; rotations are rounded to float32, so that rows must have positions of their own."""
    given = positions(inputs["attention_mask"], inputs["input_ids"].shape[1])
    if "pixel_values" in inputs:
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}
    with torch.no_grad():
        return model(**inputs, position_ids=given, **{"use_cache": True} | options)


def answer(model, inputs, count=5, **options):
    """The tokens that generate adds, with no end and no image among them."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False} | options
    found = model.generate(**inputs, suppress_tokens=[4], **options)
    return found[:, inputs["input_ids"].shape[1] :]
