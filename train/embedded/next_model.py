"""The embedded LLaVA-NeXT: grown from the embedded LLaVA-1.5, its tokenizer, processor, and saving it."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from llava_pitome import embedded
from llava_pitome.embedded import anyres, questions_next, scenes_next
from llava_pitome.embedded.questions import ask
from llava_pitome.embedded.scenes import PATCH, SIDE, scene
from train.embedded import data
from train.embedded.model import CHAT_TEMPLATE, TOWER_LAYERS, token_ids, train_tokenizer

VOCABULARY = 608
TURNS = 20  # questions about a scene, of which the tokenizer learns words


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the questions of both embedded models: each of their words is one token."""
    old = (q for seed in range(400) for q in ask(scene(data.TRAIN_SEEDS + seed), data.TURNS))
    new = (
        q
        for seed in range(800)
        for q in questions_next.ask(scenes_next.scene(data.TRAIN_SEEDS + seed), TURNS)
    )
    return train_tokenizer(chain(old, new), VOCABULARY)


def grow(tokenizer: PreTrainedTokenizerFast) -> LlavaNextForConditionalGeneration:
    """The model for training, without the tower's last layer, which does not affect its output.

    Weights are those of the embedded LLaVA-1.5, also of the tokens that both have; those of other tokens and
    the newline are random.
    """
    old = LlavaForConditionalGeneration.from_pretrained(embedded.PATH, dtype=torch.float32)
    old_tokens = PreTrainedTokenizerFast.from_pretrained(embedded.PATH).get_vocab()
    model = LlavaNextForConditionalGeneration(make_config(tokenizer, old.config, TOWER_LAYERS - 1, -1))
    weights = old.state_dict()
    old_vectors = weights["model.language_model.embed_tokens.weight"]
    vectors = torch.randn(VOCABULARY, old_vectors.shape[1], device="cpu") * old_vectors.std()
    for token, index in tokenizer.get_vocab().items():
        if token in old_tokens:
            vectors[index] = old_vectors[old_tokens[token]]
    weights |= dict.fromkeys(("model.language_model.embed_tokens.weight", "lm_head.weight"), vectors)
    last = f"vision_tower.encoder.layers.{TOWER_LAYERS - 1}."
    weights = {name: weight for name, weight in weights.items() if last not in name}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or missing != ["model.image_newline"]:
        raise ValueError(f"weights do not match: missing {missing}, unexpected {unexpected}")
    return model


def make_config(
    tokenizer: PreTrainedTokenizerFast, old: Any, tower_layers: int, feature_layer: int
) -> LlavaNextConfig:
    """The model's config, from that of the embedded LLaVA-1.5."""
    vision = old.vision_config.to_dict() | {"num_hidden_layers": tower_layers}
    text = old.text_config.to_dict() | {"vocab_size": VOCABULARY, **token_ids(tokenizer)}
    return LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[list(p) for p in anyres.PINPOINTS], vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaNextProcessor:
    """LLaVA-NeXT's preprocessing at the model's own tile size and pinpoints, and its chat template."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[list(p) for p in anyres.PINPOINTS],
        image_mean=data.MEAN,
        image_std=data.STD,
    )
    return LlavaNextProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip


def save(trained: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, folder: Path) -> None:
    """Writes model and processor in bfloat16; the last tower layer, which is unused, is as initialized."""
    model = LlavaNextForConditionalGeneration(
        make_config(processor.tokenizer, trained.config, TOWER_LAYERS, -2)
    )
    missing, unexpected = model.load_state_dict(trained.state_dict(), strict=False)
    unused = f"vision_tower.encoder.layers.{TOWER_LAYERS - 1}."
    if unexpected or any(unused not in name for name in missing):
        raise ValueError(f"weights do not match: missing {missing}, unexpected {unexpected}")
    model.generation_config.update(**token_ids(processor.tokenizer))
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
