"""Where the parts of an original LLaVA are: the only file that knows the attribute names of llava-torch.

The package itself is never imported: its classes are known by their names.
"""

from torch import nn

from llava_pitome.models.parts import LlavaParts

MODEL = "LlavaLlamaForCausalLM"
TOWER = "CLIPVisionTower"
FEATURES = ("patch", "cls_patch")  # without and with the class token


def whole(model: nn.Module) -> LlavaParts:
    """What an original LLaVA has around its tower.

    Raises:
        ValueError: it has no tower yet, another tower than CLIP's at one resolution, or it lays features out
            in a grid.
    """
    tower = model.get_vision_tower()
    if tower is None or not tower.is_loaded:
        what = "no vision tower" if tower is None else "a vision tower whose weights are not loaded"
        raise ValueError(f"the model has {what}; call model.get_vision_tower().load_model() first")
    if type(tower).__name__ != TOWER:
        raise ValueError(f"a {type(tower).__name__} is not supported in a {MODEL}; allowed is a {TOWER}")
    if tower.select_feature not in FEATURES:
        raise ValueError(
            f"mm_vision_select_feature={tower.select_feature!r} is unknown; allowed are "
            f"{' and '.join(map(repr, FEATURES))}"
        )
    check_layout(model.config)
    return LlavaParts(
        tower=tower.vision_tower,
        feature_layer=tower.select_layer,
        reads_first_token=tower.select_feature == "cls_patch",
        projector=model.get_model().mm_projector,
        llm=model.get_model(),
        multimodal=model,
        image_token=None,
    )


def check_layout(config: object) -> None:
    """Raises ValueError where a config lays features out in a grid, as LLaVA-NeXT does.

    Args:
        config: has the settings as attributes, or lacks them.
    """
    layout = getattr(config, "mm_patch_merge_type", None) or "flat"
    shape = getattr(config, "image_aspect_ratio", None) or "square"
    if layout != "flat" or shape.startswith("anyres"):
        raise ValueError(
            f"mm_patch_merge_type={layout!r} with image_aspect_ratio={shape!r} is not supported: it cuts a "
            "picture into tiles and lays their features out in a grid, which merged tokens do not form; "
            "allowed are 'flat', with 'square' or 'pad'"
        )
