"""A tiny LLaVA of the original package, and checkpoints of it in the form of the published ones."""

import json
import shutil

import numpy as np
import sentencepiece
import torch
from conftest import SIDE, VISION
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from PIL import Image
from prompts import images_of
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

IMAGE, ROWS = IMAGE_TOKEN_INDEX, 340
SHAPES = [(40, 77, 3), (90, 31, 3), (48, 48, 3), (7, 5, 3)]  # wide, tall, square, small
SENTENCES = [
    "USER: What is this? ASSISTANT: a red cat</s>",
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
]
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>",
    "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 2048, "padding_side": "right",
    "legacy": False,
}  # fmt: skip
PUBLISHED = {  # the keys of published LLaVA-1.5 checkpoints, written by transformers 4, with sizes as here
    "_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False,
    "hidden_act": "silu", "hidden_size": 32, "image_aspect_ratio": "pad", "initializer_range": 0.02,
    "intermediate_size": 64, "max_length": 4096, "max_position_embeddings": 4096, "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "model_type": "llava", "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
    "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.31.0", "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True, "vocab_size": ROWS,
}  # fmt: skip


def dialogue(*turns):
    """The original package's prompt for questions and answers, in turns."""
    conversation = conv_templates["vicuna_v1"].copy()
    for i, turn in enumerate([*turns, None]):
        conversation.append_message(conversation.roles[i % 2], turn)
    return conversation.get_prompt()


QUESTION = "<image>\nWhat is this?"
PROMPTS = [
    dialogue(QUESTION),
    dialogue("<image>\n<image>\nIs it a cat or a dog?"),
    dialogue(QUESTION, "a red cat", "And that?"),
]


def make_tower(folder, seed=0):
    torch.manual_seed(seed)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return folder


def make_original(tower, **options):
    torch.manual_seed(1)
    config = LlavaConfig(**{
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": ROWS, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.2, "mm_vision_tower": str(tower), "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu",
        "use_mm_proj": True, "image_aspect_ratio": "pad", "tokenizer_padding_side": "left",
    } | options)  # fmt: skip
    model = LlavaLlamaForCausalLM(config).eval()
    model.get_vision_tower().load_model()
    return model


def make_vocabulary(folder):
    """A tokenizer.model with byte fallback, as Llama's."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 9), model_prefix=str(folder / "tokenizer"), vocab_size=ROWS,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def save(model, vocabulary, folder, tokenizer=None, **changes):
    """A checkpoint of the model, with changes to its config.json; None removes a key."""
    model.save_pretrained(folder)
    shutil.copy(vocabulary, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER | (tokenizer or {})))
    return change_config(folder, **changes)


def change_config(folder, **changes):
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return folder


def shard(folder, rename=str, count=3):
    """Replaces a checkpoint's weights by .bin shards, as published ones have."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    weights = {rename(k): v.clone() for k, v in weights.items()}
    names, files = sorted(weights), {}
    for i in range(count):
        file = f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        torch.save({k: weights[k] for k in names[i::count]}, folder / file)
        files |= dict.fromkeys(names[i::count], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()
    return folder


def pad(rows, images, left=True):
    """Inputs of the original class, of rows of ids."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = [0] * (longest - len(row))
        ids.append(fill + row if left else row + fill)
        mask.append(fill + [1] * len(row) if left else [1] * len(row) + fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "images": images}


def original_inputs(model, folder, prompts, images=None):
    """Inputs of the original class, as its package makes them of one list of images."""
    tokenizer = AutoTokenizer.from_pretrained(folder, config=LlamaConfig(), use_fast=False)
    ids = [tokenizer_image_token(prompt, tokenizer) for prompt in prompts]
    if images:
        images = process_images(images, model.get_vision_tower().image_processor, model.config)
    return pad(ids, images)


def converted_inputs(processor, prompts, images):
    """Inputs of the Hugging Face class."""
    images = [images_of(prompt, images) for prompt in prompts]
    return processor(images=images, text=prompts, return_tensors="pt", padding=True)


def generate(model, inputs, count=6, **options):
    """Greedy answers, of either class: the original's `generate` returns no prompts."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False} | options
    inputs = dict(inputs)
    answers = model.generate(inputs.pop("input_ids"), **inputs, **options)
    return answers if "images" in inputs else answers[:, -count:]


def make_images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)) for shape in SHAPES]
