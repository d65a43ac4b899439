"""The embedded LLaVA: its sizes, tokenizer, chat template and processor, and saving it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from llava_pitome.embedded.questions import HINT, Question, ask
from llava_pitome.embedded.scenes import PATCH, SIDE, scene
from train.embedded import data

WIDTH, HEADS, TOWER_LAYERS, TEXT_LAYERS, VOCABULARY = 128, 4, 12, 4, 512
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
CHAT_TEMPLATE = (  # LLaVA-1.5's format: images before the text of a turn
    "{% for m in messages %}"
    "{% set parts = [{'type': 'text', 'text': m['content']}] if m['content'] is string else m['content'] %}"
    "{% if m['role'] == 'system' %}{% for c in parts %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for c in parts if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in parts if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{{ ' ' }}"
    "{% else %}{{ 'ASSISTANT:' }}{% for c in parts if c['type'] == 'text' %}{{ ' ' + c['text'] }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the questions: each of their words is one token, any text can be encoded."""
    questions = (q for seed in range(400) for q in ask(scene(data.TRAIN_SEEDS + seed), data.TURNS))
    return train_tokenizer(questions, VOCABULARY)


def train_tokenizer(questions: Iterable[Question], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocabulary` tokens, trained on questions and answers."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([f"USER: \n{q.text}{HINT} ASSISTANT: {q.answer}" for q in questions], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left", model_max_length=2048, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def make_config(tokenizer: PreTrainedTokenizerFast, tower_layers: int, feature_layer: int) -> LlavaConfig:
    """The model's config; the features are the output of the last layer but one, as in LLaVA-1.5."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=tower_layers,
        num_attention_heads=HEADS,
        image_size=SIDE, patch_size=PATCH, projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, vocab_size=VOCABULARY,
        max_position_embeddings=2048, tie_word_embeddings=True,
        **token_ids(tokenizer),
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=data.PATCHES, vision_feature_layer=feature_layer, tie_word_embeddings=True,
    )  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The model for training, without the tower's last layer, which does not affect its output.

    Position embeddings are initialized with two-dimensional sinusoids, so that the tower need not learn first
    which patches are neighbours.
    """
    model = LlavaForConditionalGeneration(make_config(tokenizer, TOWER_LAYERS - 1, -1))
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    positions.data[1:] = 0.3 * _sinusoids(data.GRID, WIDTH, positions.device)
    return model


def _sinusoids(side: int, width: int, device: torch.device) -> torch.Tensor:
    """Sines and cosines of the row and of the column of each patch: (side * side, width)."""
    frequencies = 100.0 ** -(torch.arange(width // 4, device=device) / (width // 4))
    angles = torch.arange(side, device=device)[:, None] * frequencies  # (side, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    return torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], 1)


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """CLIP's preprocessing at the model's own image size, and its chat template."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=data.MEAN,
        image_std=data.STD,
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip


def save(trained: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes model and processor in bfloat16; the last tower layer, which is unused, is as initialized."""
    model = LlavaForConditionalGeneration(make_config(tokenizer, TOWER_LAYERS, -2))
    missing, unexpected = model.load_state_dict(trained.state_dict(), strict=False)
    unused = f"vision_tower.encoder.layers.{TOWER_LAYERS - 1}."
    if unexpected or any(unused not in name for name in missing):
        raise ValueError(f"weights do not match: missing {missing}, unexpected {unexpected}")
    model.generation_config.update(**token_ids(tokenizer))
    model.to(torch.bfloat16).save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The ids of a tokenizer's special tokens by the names that configs use."""
    return {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
