"""Tiny models that cut images into tiles, with random weights, and processors for them.

Tiles have 6 x 6 patches of 8 pixels ("onevision-odd": 7 x 7), so that grids of up to three tiles, pooling and
padding all occur with images of a hundred pixels.
"""

from typing import NamedTuple

import torch
from conftest import PATCH, WORDS, make_processor
from torch import Tensor, nn

KINDS = ("next-vicuna", "next-mistral", "next-llama3", "next-video", "onevision", "onevision-odd")
TILED_WORDS = [*WORDS, "<video>"]
VISION_LAYERS = 6


def tile_side(kind: str) -> int:
    """Rows of patches of a tile."""
    return 7 if kind == "onevision-odd" else 6


def pinpoints(kind: str) -> list[list[int]]:
    """The grids of one to four tiles, in pixels."""
    tile = tile_side(kind) * PATCH
    return [[tile * rows, tile * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def takes_videos(kind: str) -> bool:
    """Whether models of a kind take videos."""
    return kind == "next-video" or kind.startswith("onevision")


def make_tiled(kind: str, seed: int = 0, **options) -> nn.Module:
    """A model with random weights in the structure of a real one; `options` go to its config.

    Args:
        kind: one of KINDS.
        seed: of the weights.
        **options: of the model's config.
    """
    import transformers as hf

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = shape | {
        "num_hidden_layers": VISION_LAYERS, "image_size": tile_side(kind) * PATCH, "patch_size": PATCH,
    }  # fmt: skip
    text = shape | {
        "num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": len(TILED_WORDS), "pad_token_id": 3,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
    }  # fmt: skip
    shared = {"image_token_index": WORDS.index("<image>"), "image_grid_pinpoints": pinpoints(kind)}
    videos = {"video_token_index": TILED_WORDS.index("<video>")}
    if kind.startswith("onevision"):
        config = hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**vision),
            text_config=hf.Qwen2Config(**text),
            **shared | videos | {"vision_aspect_ratio": "anyres_max_2"} | options,
        )
        return hf.LlavaOnevisionForConditionalGeneration(config).eval()
    clip = hf.CLIPVisionConfig(**vision)
    if kind == "next-video":
        llm = hf.LlamaConfig(**text | {"num_key_value_heads": 4})
        config = hf.LlavaNextVideoConfig(vision_config=clip, text_config=llm, **shared | videos | options)
        return hf.LlavaNextVideoForConditionalGeneration(config).eval()
    llm = {
        "next-vicuna": lambda: hf.LlamaConfig(**text | {"num_key_value_heads": 4}),
        "next-mistral": lambda: hf.MistralConfig(**text, sliding_window=None),
        "next-llama3": lambda: hf.LlamaConfig(
            **text, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
        ),
    }[kind]()
    config = hf.LlavaNextConfig(vision_config=clip, text_config=llm, **shared | options)
    return hf.LlavaNextForConditionalGeneration(config).eval()


class VideoProcessor:
    """Stands in for transformers' video processors, which need torchvision: frames go through an image one.

    Attributes:
        images: an image processor that makes one tile of an image.
    """

    model_input_names = ("pixel_values_videos",)

    def __init__(self, images):
        """Keeps it."""
        self.images = images

    def __call__(self, videos, return_tensors=None, **_kwargs):
        """The pixels (V, F, C, H, W) of videos; a list where their numbers of frames differ."""
        from transformers import BatchFeature
        from transformers.video_utils import make_batched_videos

        pixels = [self._frames(video) for video in make_batched_videos(videos)]
        is_one_shape = len({x.shape for x in pixels}) == 1
        return BatchFeature({"pixel_values_videos": torch.stack(pixels) if is_one_shape else pixels})

    def _frames(self, video) -> Tensor:
        return self.images(list(video), return_tensors="pt")["pixel_values"]


def make_tiled_processor(kind: str):
    """The processor of a model made by `make_tiled`."""
    import transformers as hf

    tile = tile_side(kind) * PATCH
    tokenizer = make_processor().tokenizer
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    square = {"height": tile, "width": tile}
    if kind.startswith("onevision"):
        images = hf.LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=pinpoints(kind))
        frames = VideoProcessor(hf.SiglipImageProcessorPil(size=square))
        return _unchecked(
            hf.LlavaOnevisionProcessor, images, tokenizer, frames, num_image_tokens=tile_side(kind) ** 2,
            vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2",
        )  # fmt: skip
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": tile}, crop_size=square, image_grid_pinpoints=pinpoints(kind)
    )
    given = {
        "patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    }  # fmt: skip
    if kind != "next-video":
        return hf.LlavaNextProcessor(images, tokenizer, **given)
    frames = VideoProcessor(hf.CLIPImageProcessorPil(size={"shortest_edge": tile}, crop_size=square))
    return _unchecked(hf.LlavaNextVideoProcessor, frames, images, tokenizer, **given)


def _unchecked(kind: type, *args, **kwargs):
    """A processor that takes a stand-in for its video processor."""
    processor = kind.__new__(kind)
    processor.check_argument_for_proper_class = lambda *_: None
    processor.__init__(*args, **kwargs)
    del processor.check_argument_for_proper_class
    return processor


def noise(height: int, width: int, seed: int = 0):
    """An image of noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


class Prompt(NamedTuple):
    """A prompt with its images or videos."""

    text: str
    images: tuple = ()
    videos: tuple = ()


def clip(frames: int, seed: int = 0) -> list:
    """A video of noise."""
    return [noise(50, 60, seed + i) for i in range(frames)]


def prompts_of(kind: str) -> dict[str, list[Prompt]]:
    """Batches of prompts by name: images of different sizes and numbers, text alone, and videos."""
    sizes = [(50, 100), (70, 50), (90, 90), (130, 40), (1, 1), (20, 150), (96, 96)]
    image = [noise(*size, seed) for seed, size in enumerate(sizes)]
    found = {
        "images": [
            Prompt("<image> what", (image[0],)),
            Prompt("two red"),
            Prompt("a <image> cat or dog", (image[1],)),
            Prompt("what is this <image>", (image[5],)),
            Prompt("<image> that", (image[4],)),
        ],
        "several images": [
            Prompt("<image> what <image> or <image>", tuple(image[1:4])),
            Prompt("is this red <image>", (image[3],)),
            Prompt("a dog"),
            Prompt("<image> <image>", (image[6], image[0])),
        ],
    }
    if takes_videos(kind):
        found["videos"] = [
            Prompt("<video> what", (), (clip(3),)),
            Prompt("two cat"),
            Prompt("a dog or <video> is this", (), (clip(3, 9),)),
        ]
        found["several videos"] = [
            Prompt("<video> what <video>", (), (clip(2), clip(2, 5))),
            Prompt("is <video>", (), (clip(2, 9),)),
        ]
        found["images and videos"] = [
            Prompt("<video> what", (), (clip(2),)),
            Prompt("a <image> cat", (image[0],)),
        ]
    return found


def batches() -> list[tuple[str, str]]:
    """Kinds of models with batches of `prompts_of`; those that differ in the language model with one."""
    alike = ("next-mistral", "next-llama3")
    return [
        (kind, name) for kind in KINDS for name in prompts_of(kind) if kind not in alike or name == "images"
    ]


def inputs_of(processor, prompts: list[Prompt]):
    """The inputs of prompts, padded on the left."""
    images = [list(prompt.images) for prompt in prompts if prompt.images]
    videos = [video for prompt in prompts for video in prompt.videos]
    media = {"images": images or None} | ({"videos": videos} if videos else {})
    return processor(**media, text=[p.text for p in prompts], return_tensors="pt", padding=True)


def features_of(model: nn.Module, inputs) -> list[Tensor]:
    """The features of all images and videos of some inputs, as they reach the language model."""
    found: list[Tensor] = []
    if "pixel_values" in inputs:
        given = {k: inputs[k] for k in ("pixel_values", "image_sizes", "batch_num_images") if k in inputs}
        found += model.get_image_features(**given, return_dict=True).pooler_output
    if "pixel_values_videos" in inputs:
        found += model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output
    return list(found)
