"""Whole models in float64, so that equality can be tight and near ties are decided alike."""

import torch
from prompts import batch, single
from torch import nn
from transformers import GenerationMixin

CLOSE = {"rtol": 0, "atol": 1e-9}
ENCODES_FIRST = hasattr(
    GenerationMixin, "_expand_multimodal_outputs"
)  # transformers 5.23 does, 5.17 does not


def precise(model):
    """Returns the model in float64 throughout; norms of transformers' own compute in float32."""
    model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, nn.RMSNorm):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return model


def doubled(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def padded(processor, prompts, pictures, side="left"):
    """Returns a padded batch of prompts."""
    processor.tokenizer.padding_side = side
    if not any("<image>" in prompt for prompt in prompts):
        return dict(processor(text=prompts, return_tensors="pt", padding=True))
    return doubled(batch(processor, prompts, pictures))


def alone(processor, prompt, pictures):
    """Returns a batch of one prompt."""
    return doubled(single(processor, prompt, pictures))


def positions(mask, count):
    """Returns the position ids of the last `count` tokens, as `generate` numbers them."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -count:]


def run(model, inputs, **options):
    """Returns the output of one forward pass; position ids are per row, as rotations are float32."""
    position_ids = positions(inputs["attention_mask"], inputs["input_ids"].shape[1])
    if "pixel_values" in inputs:
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}
    with torch.no_grad():
        return model(**inputs, position_ids=position_ids, **{"use_cache": True} | options)


def answer(model, inputs, count=5, **options):
    """Returns `count` generated tokens, without an end or an image token."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False} | options
    generated = model.generate(**inputs, suppress_tokens=[4], **options)
    return generated[:, inputs["input_ids"].shape[1] :]
