"""The LlavaProcessor of an original checkpoint, with the token ids and pixel values of the original."""

import json
from importlib.util import find_spec
from typing import Any

from llava_pitome import embedded

IMAGE, PAD = "<image>", "<pad>"
READERS = ("sentencepiece", "google.protobuf")  # which transformers needs for a tokenizer.model
IMAGE_SETTINGS = (  # that LlavaImageProcessor shares with CLIPImageProcessor
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "do_convert_rgb",
)  # fmt: skip


def build_processor(
    path: str, raw: dict[str, Any], config: Any, hub: dict[str, Any], tower_hub: dict[str, Any]
) -> Any:
    """The LlavaProcessor of an original checkpoint.

    With image_aspect_ratio="pad" images are padded to squares with CLIP's mean colour, as in the original.

    Args:
        path: its folder or hub id.
        raw: its config.json.
        config: the LlavaConfig converted from it.
        hub: hub arguments for its files.
        tower_hub: hub arguments for its vision tower's files.

    Raises:
        ValueError: a package that reads its tokenizer is not installed.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor
    from transformers.models.llava import LlavaImageProcessorPil

    clip = CLIPImageProcessorPil.from_pretrained(raw["mm_vision_tower"], **tower_hub).to_dict()
    image_processor = LlavaImageProcessorPil(
        **{name: clip[name] for name in IMAGE_SETTINGS if clip.get(name) is not None},
        do_pad=raw.get("image_aspect_ratio") == "pad",
    )
    return LlavaProcessor(
        image_processor,
        _tokenizer(path, config.text_config, hub),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=(embedded.PATH / "chat_template.jinja").read_text(),  # Vicuna's, version 1
        num_additional_image_tokens=1,
    )


def _tokenizer(path: str, config: Any, hub: dict[str, Any]) -> Any:
    """The checkpoint's tokenizer with <image>, and with <pad> where it has no padding token."""
    from transformers import AddedToken, AutoTokenizer
    from transformers.utils import cached_file

    converted = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub)
    if converted is None and not all(map(find_spec, READERS)):
        raise ValueError(
            f"the tokenizer.model of {path} is read with {' and '.join(READERS)}, which are not both "
            "installed: pip install 'llava-pitome[original]'"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, config=config, **hub)
    pre_tokenizer = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if pre_tokenizer.get("type") == "Metaspace":
        tokenizer = _split_at_images(tokenizer, pre_tokenizer["prepend_scheme"])
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def _split_at_images(tokenizer: Any, prepend_scheme: str) -> Any:
    """A Llama tokenizer that tokenizes the text after <image> as the original does: as a text of its own.

    The original puts a space before each text. A tokenizer whose prepend_scheme is "first" puts one before
    the prompt's first text only, so a normalizer puts it before the line break that follows an image.
    """
    from tokenizers import Regex, normalizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    if prepend_scheme == "first":
        backend.normalizer = normalizers.Replace(Regex(r"\A\n"), " \n")
    return PreTrainedTokenizerFast(  # LlamaTokenizer does not save the normalizer
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **tokenizer.special_tokens_map,
    )
