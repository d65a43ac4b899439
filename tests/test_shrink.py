import pytest
import torch
from conftest import PATCHES, SIDE, make_model, make_processor
from precise import ENCODES_FIRST
from prompts import IMAGE, PROMPTS, batch, generate, images_of, single
from torch.nn import functional as F

from llava_pitome import MergeConfig, apply, merge_tokens, remove

EOS = torch.tensor([2])  # which generate may not choose as the first token


def smaller(pixels, grid):
    size = (grid[0] * 8, grid[1] * 8)
    return F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)


def shrunk(model, pixels, grid):
    """The features of shrunk pictures, by the tower's own way with other sizes."""
    with torch.no_grad():
        tower = model.model.vision_tower
        out = tower(smaller(pixels, grid), output_hidden_states=True, interpolate_pos_encoding=True)
        first = int(model.config.vision_feature_select_strategy == "default")
        return model.model.multi_modal_projector(out.hidden_states[-2][:, first:])


@pytest.mark.parametrize("grid", [(4, 5), (3, 3), (1, 1), (6, 6), (2, 6)])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_shrinking_is_interpolating_in_front_of_the_tower(tower, grid, pictures):
    model, processor = make_model(tower), make_processor(tower)
    pixels = batch(processor, PROMPTS, pictures)["pixel_values"]
    expected = shrunk(model, pixels, grid)
    with merge_tokens(model, MergeConfig(resize=grid), processor), torch.no_grad():
        found = torch.stack(list(model.get_image_features(pixels).pooler_output))
        assert torch.equal(found, expected)
        assert (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum() == grid[0] * grid[1]
        assert generate(model, batch(processor, PROMPTS, pictures)).shape == (4, 6)
    with torch.no_grad():
        again = model.get_image_features(pixels).pooler_output
        assert torch.equal(
            torch.stack(list(again)),
            torch.stack(list(make_model(tower).get_image_features(pixels).pooler_output)),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_tower_alone_shrinks_and_keeps_the_dtype(dtype, by_name, model):
    tower = model.model.vision_tower.to(dtype)
    pixels = torch.randn(2, 3, SIDE, SIDE, dtype=dtype)
    with merge_tokens(tower, MergeConfig(resize=(4, 5))), torch.no_grad():
        found = (tower(pixel_values=pixels) if by_name else tower(pixels)).last_hidden_state
        assert found.shape == (2, 21, 32)
        assert found.dtype == dtype
    with torch.no_grad():
        assert tower(pixels).last_hidden_state.shape == (2, 37, 32)


@pytest.mark.parametrize(
    "config, tokens",
    [
        (MergeConfig(resize=(4, 5), ratio=0.8), 6),
        (MergeConfig(resize=(4, 5), tokens=7), 7),
        (MergeConfig(resize=(4, 5), prefix=0.5), 10),
        (MergeConfig(resize=(4, 5), prefix=7, method="grid"), 7),
        (MergeConfig(resize=(4, 5), prefix=6, prefix_metric="keys", method="visionzip"), 6),
        (MergeConfig(resize=(4, 5), decoder={0: 0.5}, llm_proportional=True), 20),
        (MergeConfig(resize=(4, 5), decoder={1: 6}, method="grid"), 20),
    ],
)
def test_merging_goes_on_from_the_smaller_picture(config, tokens, model, processor, pictures):
    with merge_tokens(model, config, processor) as merging, torch.no_grad():
        inputs = batch(processor, PROMPTS, pictures)
        assert (inputs.input_ids == IMAGE).sum(1).tolist() == [tokens, 2 * tokens, tokens, 0]
        out = model(**inputs)
        assert merging.patches() == 20 < PATCHES
        for row, prompt in enumerate(PROMPTS):
            own = model(**single(processor, prompt, pictures)).logits[0]
            torch.testing.assert_close(out.logits[row, -len(own) :], own, rtol=0, atol=2e-4)


ENCODED = [  # every config that reaches the language model, with every other place
    {"decoder": {0: 2}},
    {"decoder": {0: 0.5}},
    {"decoder": {0: 0.5}, "positions": "original"},
    {"decoder": {0: 3, 1: 2}, "llm_proportional": True},
    {"ratio": 0.8, "decoder": {0: 2}},
    {"ratio": 0.8, "positions": "original"},
    {"tokens": 3, "decoder": {1: 2}, "positions": "original"},
    {"tokens": 3, "prefix_share": 0.5, "llm_proportional": True},
    {"ratio": 0.9, "prefix_share": 0.5, "decoder": {0: 2}},
    {"prefix": 0.9, "decoder": {0: 2}, "llm_proportional": True, "positions": "original"},
    {"prefix": 3, "decoder": {0: 0.5}},
]


@pytest.mark.skipif(not ENCODES_FIRST, reason="transformers 5.17 takes no images that are encoded already")
@pytest.mark.parametrize("resize", [(1, 4), (4, 1), (2, 3), (2, 2), (5, 5), (6, 6)])
@pytest.mark.parametrize("changes", ENCODED, ids=str)
def test_images_encoded_before_a_call_are_resized_once(changes, resize, processor, pictures):
    model = make_model()
    with merge_tokens(model, MergeConfig(resize=resize, **changes), processor), torch.no_grad():
        inputs = batch(processor, PROMPTS, pictures)
        expected = model(**inputs).logits[:, -1]
        pixels = inputs.pop("pixel_values")
        encoded = {"image": model.get_image_features(pixels, return_dict=True)}
        found = model(**inputs, mm_encoder_outputs=encoded).logits[:, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        inputs["pixel_values"] = pixels
        assert torch.equal(
            generate(model, inputs, 1)[:, 0], expected.index_fill(1, EOS, -torch.inf).argmax(1)
        )


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("changes", ENCODED[:4] + ENCODED[7:8], ids=str)
def test_resized_images_are_generated_from_in_batches_and_beams(changes, beams, model, processor, pictures):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    with merge_tokens(model, MergeConfig(resize=(1, 4), **changes), processor):
        found = model.generate(**batch(processor, PROMPTS, pictures), **options)[:, -4:]
        for row, prompt in enumerate(PROMPTS):
            own = model.generate(**single(processor, prompt, pictures), **options)[:, -4:]
            assert torch.equal(found[row : row + 1], own)


def test_a_smaller_picture_is_told_apart_from_its_neighbour(model, processor, pictures):
    with merge_tokens(model, MergeConfig(resize=(3, 3)), processor), torch.no_grad():
        found = model.get_image_features(batch(processor, PROMPTS, pictures)["pixel_values"]).pooler_output
        assert (found[0] - found[1]).abs().max() < 1e-6  # the first picture of two prompts
        assert (found[1] - found[2]).abs().max() > 1e-3
    assert images_of(PROMPTS[1], pictures) == pictures[:2]


def test_shrinking_leaves_nothing_behind(model):
    before = {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()}
    apply(model, MergeConfig(resize=(3, 3)))
    remove(model)
    assert {
        n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()
    } == before
