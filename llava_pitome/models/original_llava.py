"""The parts of an original LLaVA: the only file that knows the attribute names of llava-torch.

The package itself is never imported: its classes are recognized by their names.
"""

from torch import nn

from llava_pitome.models.parts import LlavaParts

MODEL = "LlavaLlamaForCausalLM"
TOWER = "CLIPVisionTower"
FEATURES = ("patch", "cls_patch")  # without and with the class token


def llava_parts(model: nn.Module) -> LlavaParts:
    """The parts of an original LLaVA around the blocks of its vision tower.

    Raises:
        ValueError: its vision tower is missing, not loaded, or not a CLIP at one resolution, or its features
            are packed as a grid.
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
    """Raises ValueError where features are packed as a grid, as LLaVA-NeXT does.

    Args:
        config: has the settings as attributes, or lacks them.
    """
    merge_type = getattr(config, "mm_patch_merge_type", None) or "flat"
    aspect = getattr(config, "image_aspect_ratio", None) or "square"
    if merge_type != "flat" or aspect.startswith("anyres"):
        raise ValueError(
            f"mm_patch_merge_type={merge_type!r} with image_aspect_ratio={aspect!r} is not supported: it "
            "cuts an image into tiles and packs their features as a grid, which merged tokens do not form; "
            "allowed are 'flat', with 'square' or 'pad'"
        )
