"""The tokens of merged images: as many as placeholders, nothing of padding, newlines in their places."""

from typing import NamedTuple

import pytest
import torch
from conftest import PATCH
from prompts import IMAGE
from tiled import (
    Prompt,
    features_of,
    inputs_of,
    make_tiled,
    make_tiled_processor,
    noise,
)

from llava_pitome import MergeConfig, merge_tokens
from llava_pitome.hooks.image_packing import ImagePacking
from llava_pitome.methods import METHODS
from llava_pitome.models import hf_llava

SIZES = [(50, 100), (20, 150), (100, 33), (1, 1), (1, 500), (500, 1), (90, 90), (300, 200)]
CONFIGS = [
    *({"ratio": 0.9, "method": name} for name, m in METHODS.items() if "tower" in m.places),
    *({"prefix": 0.4, "method": name} for name, m in METHODS.items() if "prefix" in m.places),
    *({"tokens": 60, "prefix_share": 1.0, "method": k} for k, m in METHODS.items() if "prefix" in m.places),
    *({"tokens": 60, "tile_shares": shares} for shares in ("area", "equal", "joint")),
    {"tokens": 20, "tile_shares": "thumbnail"},
    *({"tokens": 60, "tile_shares": shares, "prefix_share": 0.5} for shares in ("equal", "joint")),
    {"tokens": 60, "across_tiles": False, "newlines": "none"},
    {"tokens": 61, "across_tiles": False, "tile_shares": "equal", "newlines": "scaled", "prefix_share": 0.3},
    {"tokens": 60, "tile_shares": "attention"},
    {"tokens": 60, "tile_shares": "attention", "prefix_share": 1.0, "newlines": "scaled"},
    {"tokens_per_tile": 1},
    {"tokens_per_tile": 35, "newlines": "scaled"},
    {"tokens_per_tile": 7, "prefix_share": 0.5, "across_tiles": False},
    {"ratio": 0.7, "prefix_share": 0.6},
    {"ratio": (0.9, 1.0, 0.5, 1.0, 0.8)},
    {"ratio": 0.9, "prefix": 0.01},
    {"prefix": 60},
    {"ratio": 1.0, "newlines": "none"},
    {"ratio": 1.0, "newlines": "scaled"},
    {"ratio": 1.0, "tile_shares": "thumbnail"},
    {"ratio": 0.95, "order": "method", "site": "block", "size_weighted": False, "proportional": False},
]  # fmt: skip


def config_for(kind, fields):
    """A config with what the vision tower of a kind offers; None where its method cannot be used."""
    config = MergeConfig(**fields)
    needs_class = config.tile_shares == "attention" or "class_attention" in METHODS[config.method].needs
    if kind.startswith("onevision"):
        if needs_class and config.merges_in_tower:
            return None
        if "ratio" in fields and isinstance(fields["ratio"], tuple):
            return MergeConfig(**fields | {"ratio": (*fields["ratio"], 1.0)})
        if config.tile_shares == "attention":
            return None
    return config


def ids_of(value):
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def cases(*kinds):
    """The configs that each kind of models supports."""
    found = [(kind, fields) for kind in kinds for fields in CONFIGS if config_for(kind, fields) is not None]
    return pytest.mark.parametrize("kind, fields", found, ids=ids_of)


@cases("next-video", "onevision", "onevision-odd")
def test_as_many_placeholders_are_written_as_tokens_arrive(kind, fields):
    config = config_for(kind, fields)
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    fitting = 0
    with merge_tokens(model, config, processor), torch.no_grad():
        for seed, size in enumerate(SIZES):
            prompt = Prompt("what <image> is", (noise(*size, seed),))
            try:
                inputs = inputs_of(processor, [prompt])
            except ValueError as error:
                assert "=6" in str(error) and "does not fit: this image has" in str(error)
                continue
            fitting += 1
            (features,) = features_of(model, inputs)
            written = int((inputs["input_ids"] == IMAGE).sum())
            assert len(features) == written and features.isfinite().all()
            told = processor._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"]
            assert told == [written]
            model(**inputs)
    assert fitting >= 3


def transparent(model):
    """The model with a vision tower whose layers add nothing, so that features are averages of patches."""
    for layer in model.model.vision_tower.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    return model


def padding_of(layout):
    """Which pixels (tiles, 1, H, W) of an image's tiles are in patches that the model leaves out."""
    found = torch.zeros(layout.tiles, layout.side, layout.side, dtype=torch.bool)
    for region in layout.regions:
        top, bottom, left, right = region.window
        for tile in range(region.tiles):
            for y in range(layout.side):
                for x in range(layout.side):
                    row = tile // region.columns * layout.side + y
                    column = tile % region.columns * layout.side + x
                    found[region.first + tile, y, x] = not (top <= row < bottom and left <= column < right)
    return found.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2).unsqueeze(1)


@cases("next-video", "onevision-odd")
def test_no_token_holds_anything_of_padding(kind, fields):
    """With a tower in which patches do not attend to each other, other padding changes no bit.

    Class attention, by which some methods choose, is divided among patches and padding.
    """
    config = config_for(kind, fields)
    model, processor = transparent(make_tiled(kind)), make_tiled_processor(kind)
    tiling = hf_llava.find(model).llava.tiling
    torch.manual_seed(0)
    compared = 0
    with merge_tokens(model, config, processor), torch.no_grad():
        for seed, size in enumerate(SIZES):
            try:
                inputs = inputs_of(processor, [Prompt("<image>", (noise(*size, seed),))])
            except ValueError:  # the budget does not fit
                continue
            padding = padding_of(tiling.image(*size)).unsqueeze(0)
            (expected,) = features_of(model, inputs)
            pixels = inputs["pixel_values"]
            inputs["pixel_values"] = torch.where(padding, 300 * torch.randn(pixels.shape), pixels)
            compared += not torch.equal(inputs["pixel_values"], pixels)
            found = features_of(model, inputs)[0]
            if "class_attention" in METHODS[config.method].needs:
                assert found.abs().max() < 2 * expected.abs().max()
            else:
                assert torch.equal(found, expected)
    assert compared >= 2


@pytest.fixture
def packed(monkeypatch):
    """A list to which every call's layout, schedule and packed tokens are added."""
    found, merged = [], ImagePacking._merged

    def keep(self, call, *args):
        tokens = merged(self, call, *args)
        found.append((call.layout, call.schedule, tokens))
        return tokens

    monkeypatch.setattr(ImagePacking, "_merged", keep)
    return found


AVERAGES = ("pitome", "tome", "grid", "random", "prumerge")


@cases("next-video", "onevision", "onevision-odd")
def test_tokens_add_up_to_those_without_merging_and_stay_in_order(kind, fields, packed):
    config = config_for(kind, fields)
    model, processor = make_tiled(kind), make_tiled_processor(kind)
    newline = model.model.image_newline
    with merge_tokens(model, config, processor), torch.no_grad():
        for seed, size in enumerate(SIZES[:3] + SIZES[6:]):
            inputs = inputs_of(processor, [Prompt("<image>", (noise(*size, seed),))])
            (features,) = features_of(model, inputs)
            layout, counts, tokens = packed.pop()
            position, sizes = tokens.position[0], tokens.sizes[0]
            assert bool((position.diff() > 0).all())
            is_newline = (features == newline).all(1)
            assert int(is_newline.sum()) == sum(counts.newlines)
            first = 0
            for region, kept, newlines in zip(layout.regions, counts.regions, counts.newlines):
                step, last = region.width + region.newlines, first + region.tokens + region.num_newlines
                inside = (position >= first) & (position < last)
                own = position[inside & is_newline] - first
                assert bool((own % step == region.width).all()) and len(own) == newlines
                assert not newlines or own[-1] == last - first - 1
                if newlines:
                    rows = (own // step + 1).tolist()
                    assert rows == [i * region.height // newlines for i in range(1, newlines + 1)]
                if config.tile_shares != "joint":
                    assert int((inside & ~is_newline).sum()) == kept
                    if config.method in AVERAGES and kept:
                        assert sizes[inside & ~is_newline].sum() == region.tokens
                first = last
            if config.method in AVERAGES and config.tile_shares == "joint":
                assert sizes.sum() == layout.tokens
    assert not packed


@pytest.mark.parametrize("newlines, kept", [("rows", 12), ("scaled", 6), ("none", 0)])
def test_newlines_stay_as_the_config_says(newlines, kept, packed):
    model, processor = make_tiled("next-vicuna"), make_tiled_processor("next-vicuna")
    with merge_tokens(model, MergeConfig(tokens_per_tile=9, newlines=newlines), processor):
        inputs = inputs_of(processor, [Prompt("<image>", (noise(96, 96),))])
        (features,) = features_of(model, inputs)
    assert int((features == model.model.image_newline).all(1).sum()) == kept
    assert len(features) == 5 * 9 + kept


# Averages, written out


class Token(NamedTuple):
    """A token in the written-out merges: its row and column, those of its patches, its value."""

    place: tuple[int, int]
    places: list[tuple[int, int]]
    value: torch.Tensor


def merge_written_out(tokens, plan, row):
    """Tokens averaged by one row of a plan, each patch counted alike."""
    merged = []
    for slot, kept in enumerate(plan.kept[row].tolist()):
        group = [token for token, s in zip(tokens, plan.slot[row].tolist()) if s == slot]
        places = [place for token in group for place in token.places]
        value = sum(token.value * len(token.places) for token in group) / len(places)
        merged.append(Token(tokens[kept].place, places, value))
    return merged


def written_out(model, pixels, layout, records):
    """The features of one image by its recorded merges, each token computed by itself."""
    model = model.model
    with torch.no_grad():
        patches = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        patches = model.multi_modal_projector(patches).double()
    side, found = layout.side, []
    later = [record.plan for record in records if record.place == "prefix"]
    for region in layout.regions:
        top, bottom, left, right = region.window
        tokens = []
        for tile in range(region.tiles):
            row, column = (n * side for n in divmod(tile, region.columns))
            places = [(row + p // side, column + p % side) for p in range(side**2)]
            own = [Token(x, [x], value) for x, value in zip(places, patches[region.first + tile])]
            for record in records:
                if record.place == "tower":
                    own = merge_written_out(own, record.plan, region.first + tile)
            for token in own:
                shown = [top <= y < bottom and left <= x < right for y, x in token.places]
                assert all(shown) or not any(shown)
                tokens += [token] * all(shown)
        tokens.sort(key=lambda token: token.place)
        if later and region.tokens:
            tokens = merge_written_out(tokens, later.pop(0), 0)
        tokens += [Token((y, right), [], model.image_newline) for y in range(top, bottom) if region.newlines]
        found += [token.value.detach().double() for token in sorted(tokens, key=lambda token: token.place)]
    return torch.stack(found)


@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": 0.9}, {"ratio": 0.9, "prefix": 0.5}, {"tokens": 55, "prefix_share": 0.5}, {"prefix": 0.4},
        {"tokens_per_tile": 6}, {"tokens": 60, "prefix_share": 1.0, "metric": "hidden"},
    ],
    ids=ids_of,
)  # fmt: skip
@pytest.mark.parametrize("size", [(50, 100), (20, 150), (100, 33), (90, 90)])
def test_features_are_averages_of_patches(fields, size):
    """Tower and projector are linear where their layers add nothing, so that averages can be written out."""
    model, processor = transparent(make_tiled("next-vicuna")), make_tiled_processor("next-vicuna")
    model.model.multi_modal_projector.act = torch.nn.Identity()
    layout = hf_llava.find(model).llava.tiling.image(*size)
    prompt = Prompt("<image>", (noise(*size),))
    records = []
    config = MergeConfig(method="tome", **fields)
    with merge_tokens(model, config, processor) as handle, torch.no_grad():
        inputs = inputs_of(processor, [prompt])
        handle.record(records.append)
        (features,) = features_of(model, inputs)
        handle.record(None)
    pixels = inputs["pixel_values"][0, : layout.tiles]
    expected = written_out(model, pixels, layout, records)
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=1e-5)
