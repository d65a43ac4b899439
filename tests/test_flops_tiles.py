"""FLOPs of models that cut images into tiles: by formula, and counted."""

import pytest
import torch
from tiled import KINDS, make_tiled, make_tiled_processor, noise, takes_videos
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_pitome import MergeConfig, merge_tokens
from llava_pitome.flops import Flops, closed_form_of_layouts, counted
from llava_pitome.models.hf_llava import find

SIZES = [(96, 96), (50, 100), (130, 40), (30, 31), (1, 1), (300, 20), (7, 96), (145, 200)]
CONFIGS = [
    MergeConfig(ratio=0.8),
    MergeConfig(tokens=60),
    MergeConfig(tokens=60, prefix_share=0.5),
    MergeConfig(tokens=60, prefix_share=1.0),
    MergeConfig(tokens_per_tile=9, newlines="none"),
    MergeConfig(prefix=0.3),
    MergeConfig(ratio=1.0, tile_shares="thumbnail"),
    MergeConfig(ratio=0.8, tile_shares="thumbnail", site="block"),
    MergeConfig(tokens=60, newlines="scaled", tile_shares="joint"),
]
OF_VIDEOS = [
    MergeConfig(ratio=0.8),
    MergeConfig(tokens_per_frame=4),
    MergeConfig(tokens_per_video=20, temporal=True),
    MergeConfig(tokens_per_video=20, prefix_share=1.0),
]


def make(kind):
    model = make_tiled(kind)
    model.model.vision_tower.use_head = False  # as in OneVision's config; the formula leaves it out
    return model, make_tiled_processor(kind)


def image_prompt(processor, size):
    return processor(images=noise(*size), text="<image> what is this", return_tensors="pt")


def video_prompt(processor, frames):
    video = [noise(48, 48, seed) for seed in range(frames)]
    return processor(videos=[video], text="<video> what is this", return_tensors="pt")


def text_tokens(model, inputs):
    placeholders = [model.config.image_token_id, getattr(model.config, "video_token_id", None) or -1]
    return int((~torch.isin(inputs["input_ids"], torch.tensor(placeholders))).sum())


def counted_without_merging(model, inputs):
    """The FLOPs of the model's own modules alone; hooks run outside of these."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, use_cache=False, logits_to_keep=1)
    found = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def total(inside, *ends):
        return sum(n for name, n in found.items() if inside in name and name.endswith(ends))

    return Flops(
        total("vision_tower", ".embeddings", ".self_attn", ".mlp"),
        total("multi_modal_projector", ".linear_1", ".linear_2"),
        total("language_model", ".self_attn", ".mlp") + total("lm_head", "lm_head"),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_formula_equals_the_count_of_a_dense_model(kind, size):
    model, processor = make(kind)
    inputs, layout = image_prompt(processor, size), find(model).llava.tiling.image(*size)
    formula = closed_form_of_layouts(model, [layout], text_tokens(model, inputs))
    assert counted(model, inputs) == formula == counted_without_merging(model, inputs)


@pytest.mark.parametrize("kind", ["next-mistral", "onevision-odd"])
@pytest.mark.parametrize("size", [(96, 96), (50, 100), (300, 20)], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c.changes()))
def test_the_formula_equals_the_count_of_a_merging_model_without_the_merges(kind, size, config):
    model, processor = make(kind)
    layout = find(model).llava.tiling.image(*size)
    with merge_tokens(model, config, processor):
        inputs = image_prompt(processor, size)
        found, whole = counted_without_merging(model, inputs), counted(model, inputs)
    formula = closed_form_of_layouts(model, [layout], text_tokens(model, inputs), config)
    assert found == formula
    assert whole.llm == formula.llm
    assert formula.tower <= whole.tower and formula.projector <= whole.projector
    dense = closed_form_of_layouts(model, [layout], text_tokens(model, inputs))
    assert formula.total < dense.total


@pytest.mark.parametrize("kind", [kind for kind in KINDS if takes_videos(kind)])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("config", [None, *OF_VIDEOS], ids=lambda c: str(c and c.changes()))
def test_the_formula_equals_the_count_of_a_video(kind, frames, config):
    model, processor = make(kind)
    if config is not None and config.tokens_per_video and frames == 1:
        config = MergeConfig(tokens_per_video=5)
    layout = find(model).llava.tiling.video(frames)
    with merge_tokens(model, config or MergeConfig(ratio=1.0), processor):
        inputs = video_prompt(processor, frames)
        found = counted_without_merging(model, inputs)
    assert found == closed_form_of_layouts(model, [layout], text_tokens(model, inputs), config)


def test_padded_tiles_cost_as_much_as_whole_ones():
    model, _ = make("next-vicuna")
    image = find(model).llava.tiling.image
    whole, padded = (closed_form_of_layouts(model, [image(*size)], 5) for size in ((96, 96), (96, 80)))
    assert whole.tower == padded.tower and whole.projector == padded.projector
    assert whole.llm > padded.llm


def test_a_budget_that_does_not_fit_the_image_is_refused():
    model, _ = make("next-vicuna")
    layout = find(model).llava.tiling.image(96, 96)
    with pytest.raises(ValueError, match=f"tokens=4 does not fit.*to {layout.tokens}"):
        closed_form_of_layouts(model, [layout], 5, MergeConfig(tokens=4))
