"""The processor of an original checkpoint: the same ids and pixels as the original package makes."""

import json
from importlib.util import find_spec
from typing import Any

from llava_pitome import embedded

IMAGE, PAD = "<image>", "<pad>"
READERS = ("sentencepiece", "google.protobuf")  # of a tokenizer.model
PICTURES = (  # settings of CLIP's image processor
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "do_convert_rgb",
)  # fmt: skip


def build(path: str, raw: dict[str, Any], config: Any, hub: dict[str, Any], tower_hub: dict[str, Any]) -> Any:
    """The LlavaProcessor of an original checkpoint.

    Args:
        path: its folder or hub id.
        raw: its config.json; where that says image_aspect_ratio="pad", pictures are padded to squares with
            CLIP's mean colour, as the original does.
        config: the LlavaConfig made of it.
        hub: where its files come from.
        tower_hub: the same for its tower's.

    Raises:
        ValueError: what reads its tokenizer is not installed.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor
    from transformers.models.llava import LlavaImageProcessorPil

    clip = CLIPImageProcessorPil.from_pretrained(raw["mm_vision_tower"], **tower_hub).to_dict()
    pictures = LlavaImageProcessorPil(
        **{name: clip[name] for name in PICTURES if clip.get(name) is not None},
        do_pad=raw.get("image_aspect_ratio") == "pad",
    )
    return LlavaProcessor(
        pictures,
        _tokenizer(path, config.text_config, hub),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=(embedded.PATH / "chat_template.jinja").read_text(),  # Vicuna's, version 1
        num_additional_image_tokens=1,
    )


def _tokenizer(path: str, config: Any, hub: dict[str, Any]) -> Any:
    """The checkpoint's tokenizer with <image>, and with <pad> where it has none."""
    from transformers import AddedToken, AutoTokenizer
    from transformers.utils import cached_file

    ready = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub)
    if ready is None and not all(map(find_spec, READERS)):
        raise ValueError(
            f"the tokenizer.model of {path} is read with {' and '.join(READERS)}, which are not both "
            "installed: pip install 'llava-pitome[original]'"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, config=config, **hub)
    splits = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if splits.get("type") == "Metaspace":
        tokenizer = _sections(tokenizer, splits["prepend_scheme"])
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def _sections(tokenizer: Any, spaces: str) -> Any:
    """A Llama tokenizer that begins anew behind <image>, where the original splits a prompt in two.

    There the original puts a space, as in front of a prompt. Where its tokenizer puts one in front of the
    "first" section only, and not behind every special token, it is put in front of a line break, which is
    what follows a picture.
    """
    from tokenizers import Regex, normalizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    if spaces == "first":
        backend.normalizer = normalizers.Replace(Regex(r"\A\n"), " \n")
    return PreTrainedTokenizerFast(  # LlamaTokenizer would forget the above once it is saved
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **tokenizer.special_tokens_map,
    )
