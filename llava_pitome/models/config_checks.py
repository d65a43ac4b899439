"""Which configs a model supports; every check raises ValueError with the value and what is allowed."""

import dataclasses

from torch import nn

from llava_pitome.config import MergeConfig
from llava_pitome.image_layout import single_tile
from llava_pitome.image_schedule import resized
from llava_pitome.methods import METHODS
from llava_pitome.models import hf_language_model
from llava_pitome.models.parts import ModelParts
from llava_pitome.token_schedule import LIMIT

OF_VIDEOS = ("tokens_per_frame", "tokens_per_video", "temporal")  # fields of MergeConfig
OF_TILES = ("newlines", "tile_shares", "across_tiles")


def check(parts: ModelParts, config: MergeConfig) -> None:
    """Raises ValueError for a config that the model does not support."""
    tiling = None if parts.llava is None else parts.llava.tiling
    if tiling is None:
        check_without_tiles(parts.model, config)
        tokens = config.tokens_at(parts.patches, parts.num_feature_layers)
    else:
        check_tiles(parts, config)
        tokens = None
    check_tower_attention(parts.tower, config)
    in_llm = config.decoder or config.reaches_llm
    if parts.llava is None:
        if in_llm or config.merges_in_prefix:
            raise ValueError(
                "a vision tower alone has no projector and no language model to merge in, nor has a "
                f"{type(parts.model).__name__}; give ratio, tokens or resize"
            )
        return
    check_first_token(config, parts.llava.reads_first_token, parts.num_prefix_tokens)
    if not in_llm:
        return
    llm = parts.llava.llm
    config.llm_lengths(LIMIT if tokens is None else tokens, llm.config.num_hidden_layers)
    hf_language_model.check_attention(llm)
    hf_language_model.check_model(parts.model, llm)


def check_without_tiles(model: nn.Module, config: MergeConfig) -> None:
    """Raises ValueError for fields that a model whose images are one tile each has no use for."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name in (*OF_VIDEOS, *OF_TILES):
        if getattr(config, name) != defaults[name]:
            what = "no videos" if name in OF_VIDEOS else "no images that are cut into tiles"
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not allowed: a {type(model).__name__} takes {what}"
            )


def check_tiles(parts: ModelParts, config: MergeConfig) -> None:
    """Raises ValueError for a config that a model which cuts images into tiles does not support."""
    llava, name = parts.llava, type(parts.model).__name__
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    if llava.tiling.frame_side is None:
        for field in OF_VIDEOS:
            if getattr(config, field) != defaults[field]:
                raise ValueError(
                    f"{field}={getattr(config, field)!r} is not allowed: a {name} takes no videos"
                )
    if llava.reads_first_token != (parts.num_prefix_tokens == 0):
        raise ValueError(
            f"vision_feature_select_strategy={'full' if llava.reads_first_token else 'default'!r} does not "
            f"fit a {type(parts.tower).__name__} in a {name}: its features must be the patches alone"
        )
    if config.tile_shares == "attention" and not parts.num_prefix_tokens:
        raise ValueError(
            f"tile_shares='attention' needs a class token, which a {type(parts.tower).__name__} has not"
        )
    method = METHODS[config.method]
    for field in ("tile_shares", "temporal"):
        value = getattr(config, field)
        if method.needs_grid and value in ("joint", "attention", True):
            raise ValueError(
                f"{field}={value!r} merges tokens of several tiles or frames together, which are no grid; "
                f"method {config.method!r} works on one"
            )
    if method.needs_grid and config.merging_layers:
        raise ValueError(
            f"method {config.method!r} works on the grid of patches; in the language model of a {name} "
            "there are tokens of several tiles, which are no grid"
        )
    after_projector = config.prefix is not None or config.prefix_share or not config.merges_by_ratio
    if config.merges_in_tower and config.prefix_share < 1:
        if method.needs_grid and after_projector:
            raise ValueError(
                f"method {config.method!r} works on the grid of patches, which only the first merge has; "
                f"on a {name} give ratio, or prefix"
            )
        if "prefix" not in method.places and after_projector:
            raise ValueError(
                f"a budget of tokens on a {name} needs a merge after the projector, for which method "
                f"{config.method!r} is not defined; give ratio"
            )
    resized(config, single_tile(llava.tiling.side))
    config.ratio_lengths(parts.patches, parts.num_feature_layers)


def check_tower_attention(tower: nn.Module, config: MergeConfig) -> None:
    """Raises ValueError where a tower's attention implementation cannot weight keys by token sizes."""
    name = hf_language_model.attention_implementation(tower.config)
    takes_sizes = name in hf_language_model.MASKED or not hf_language_model.takes_masks(name)
    if config.proportional and config.merges_in_tower and not takes_sizes:
        raise ValueError(
            f"proportional attention adds a bias to the scores, which attn_implementation={name!r} cannot "
            "take; load the model with 'sdpa', 'eager' or flash attention, or set proportional=False"
        )


def check_first_token(config: MergeConfig, reads_first_token: bool, num_prefix_tokens: int) -> None:
    """Raises ValueError where a model drops the first patch of a tower without a class token."""
    after_tower = config.decoder or config.reaches_llm or config.merges_in_prefix
    if after_tower and not reads_first_token and not num_prefix_tokens:
        raise ValueError(
            "vision_feature_select_strategy='default' drops the first patch of a tower without class token; "
            "set it to 'full', in the processor too, to merge after the tower (Vip-LLaVA has no such setting)"
        )
