"""Configs, prompts and forward passes for tests of complete models."""

import torch

from llava_pitome import MergeConfig

IMAGE, PAD = 4, 3
RECIPES = [
    MergeConfig(ratio=0.8),
    MergeConfig.recipe("released", ratio=0.8),
    MergeConfig(tokens=5, method="tome"),
    MergeConfig(tokens=6, prefix_share=0.5),
    MergeConfig(prefix=0.3, decoder={0: 0.5, 1: 2}, llm_proportional=True),
    MergeConfig(resize=(4, 5)),
]
PROMPTS = ["<image> what is this", "a red <image> cat or <image> dog", "what is <image>", "two red cat"]


def images_of(prompt, pictures):
    """As many of the images as the prompt has placeholders."""
    return pictures[: prompt.count("<image>")]


def batch(processor, prompts, pictures):
    """Inputs of all prompts, padded."""
    return processor(
        images=[images_of(p, pictures) for p in prompts], text=prompts, return_tensors="pt", padding=True
    )


def generate(model, inputs, count=6):
    """Ids of exactly `count` new tokens, greedy."""
    return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ]


def single(processor, prompt, pictures):
    """Inputs of one prompt."""
    return processor(images=images_of(prompt, pictures) or None, text=prompt, return_tensors="pt")


def features(model, inputs):
    """The hidden states of the tower's feature layer."""
    with torch.no_grad():
        out = model.model.vision_tower(inputs["pixel_values"].to(model.dtype), output_hidden_states=True)
    return out.hidden_states[model.config.vision_feature_layer]
