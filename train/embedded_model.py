"""What the embedded LLaVA is made of: sizes, tokenizer, chat template, and how it is saved."""

from pathlib import Path

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

from llava_pitome.embedded.questions import HINT, ask
from llava_pitome.embedded.scenes import PATCH, SIDE, scene
from train import embedded_data as data

WIDTH, HEADS, TOWER_LAYERS, TEXT_LAYERS, VOCABULARY = 128, 4, 12, 4, 512
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
CHAT = (  # LLaVA-1.5's own form: pictures first, then the words
    "{% for m in messages %}"
    "{% set parts = [{'type': 'text', 'text': m['content']}] if m['content'] is string else m['content'] %}"
    "{% if m['role'] == 'system' %}{% for c in parts %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for c in parts if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in parts if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{{ ' ' }}"
    "{% else %}{{ 'ASSISTANT:' }}{% for c in parts if c['type'] == 'text' %}{{ ' ' + c['text'] }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from the questions: their words are one token, any text passes."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words = [q for seed in range(400) for q in ask(scene(data.TRAIN_SEEDS + seed), data.TURNS)]
    bpe.train_from_iterator([f"USER: \n{q.text}{HINT} ASSISTANT: {q.answer}" for q in words], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left", model_max_length=2048, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def config(words: PreTrainedTokenizerFast, tower_layers: int, feature_layer: int) -> LlavaConfig:
    """The shape of the model; the features are the output of the last layer but one, as in LLaVA-1.5."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=tower_layers,
        num_attention_heads=HEADS,
        image_size=SIDE, patch_size=PATCH, projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, vocab_size=VOCABULARY,
        max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=data.PATCHES, vision_feature_layer=feature_layer, tie_word_embeddings=True,
    )  # fmt: skip


def training_model(words: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The model without the tower's last layer, which nothing reads and which would only cost time.

    Positions start as two-dimensional waves, so that the tower need not find out first which patches are
    neighbours.
    """
    model = LlavaForConditionalGeneration(config(words, TOWER_LAYERS - 1, -1))
    model.model.vision_tower.embeddings.position_embedding.weight.data[1:] = 0.3 * _waves(
        SIDE // PATCH, WIDTH
    )
    return model


def _waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of the row and of the column of each patch: (side * side, width)."""
    speed = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * speed  # (side, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    return torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], 1)


def processor(words: PreTrainedTokenizerFast) -> LlavaProcessor:
    """CLIP's preprocessing at the model's own size, and its chat template."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=data.MEAN,
        image_std=data.STD,
    )
    return LlavaProcessor(
        images, words, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    )  # fmt: skip


def save(trained: LlavaForConditionalGeneration, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the whole model as bfloat16; the unread last tower layer is as initialised."""
    whole = LlavaForConditionalGeneration(config(words, TOWER_LAYERS, -2))
    missing, unexpected = whole.load_state_dict(trained.state_dict(), strict=False)
    unread = f"vision_tower.encoder.layers.{TOWER_LAYERS - 1}."
    if unexpected or any(unread not in name for name in missing):
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    whole.generation_config.update(
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id
    )
    whole.to(torch.bfloat16).save_pretrained(folder)
    processor(words).save_pretrained(folder)
