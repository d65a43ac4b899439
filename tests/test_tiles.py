"""How images are cut into tiles, and how many tokens each region keeps: numbers alone."""

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tiled import make_tiled_processor, pinpoints, tile_side
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from llava_pitome import MergeConfig
from llava_pitome.image_layout import ImageLayout, unpadded
from llava_pitome.image_schedule import divide, schedule, tokens_of_image
from llava_pitome.models import llava_next, llava_next_video, llava_onevision

LAYERS = 5
NEWLINE = -1.0
FAMILIES = {
    "next-vicuna": (llava_next, LlavaNextModel),
    "next-video": (llava_next_video, LlavaNextVideoModel),
    "onevision": (llava_onevision, LlavaOnevisionModel),
    "onevision-odd": (llava_onevision, LlavaOnevisionModel),
}
random.seed(0)
SIZES = [
    (1, 1), (2000, 300), (300, 2000), (48, 48), (48, 96), (336, 336), (1000, 10), (3, 200), (97, 96),
    (1, 2000), (2000, 1), (1, 500), (500, 1), (5, 2000),  # of which no row, or column, of patches is left
    *((random.randint(1, 300), random.randint(1, 300)) for _ in range(150)),
    *((random.randint(1, 2000), random.randint(1, 2000)) for _ in range(50)),
]  # fmt: skip


def config_of(kind):
    side = tile_side(kind)
    return SimpleNamespace(
        vision_config=SimpleNamespace(image_size=side * 8, patch_size=8),
        image_grid_pinpoints=pinpoints(kind), vision_aspect_ratio="anyres_max_2", spatial_pool_stride=2,
    )  # fmt: skip


def tiling_of(kind):
    return FAMILIES[kind][0].tiling(config_of(kind))


def packed(kind, size, layout):
    """What transformers packs of patches that are numbered from 0; a newline is NEWLINE."""
    patches = tile_side(kind) ** 2
    numbers = torch.arange(layout.tiles * patches, dtype=torch.float64).view(layout.tiles, patches, 1)
    options = {"image_newline": torch.tensor([NEWLINE], dtype=torch.float64)}
    if kind.startswith("onevision"):
        options["vision_aspect_ratio"] = "anyres_max_2"
    else:
        options["vision_feature_select_strategy"] = "default"
    model, sizes = FAMILIES[kind][1], torch.tensor([size])
    (out,), _ = model.pack_image_features(
        SimpleNamespace(config=config_of(kind)), [numbers], sizes, **options
    )
    return out.flatten().tolist()


def by_layout(layout: ImageLayout):
    """The same by a layout's own numbers; None where it says that the model pools."""
    found = []
    for region in layout.regions:
        side = layout.side
        for y in range(region.window.top, region.window.bottom):
            for x in range(region.window.left, region.window.right):
                tile = region.first + y // side * region.columns + x // side
                found.append(None if region.is_pooled else tile * side**2 + y % side * side + x % side)
            found += [NEWLINE] * region.newlines
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_layouts_are_those_of_transformers_own_packing(kind):
    tiling, pooled = tiling_of(kind), 0
    for size in SIZES:
        layout = tiling.image(*size)
        expected = packed(kind, size, layout)
        assert layout.tokens == len(expected), size
        grid = layout.regions[1]
        if grid.is_pooled:
            pooled += 1
            newlines = [i for i, x in enumerate(expected) if x == NEWLINE]
            assert len(newlines) == grid.height
            assert {b - a for a, b in pairwise(newlines)} <= {grid.width + 1}
        else:
            assert by_layout(layout) == expected, size
    assert (pooled > 20) == kind.startswith("onevision")


@pytest.mark.parametrize("kind", FAMILIES)
def test_layouts_count_as_transformers_processors_do(kind):
    processor, tiling = make_tiled_processor(kind), tiling_of(kind)
    counts = processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_tokens"]
    assert counts == [tiling.image(*size).tokens for size in SIZES]


# Token counts

COUNTED = [
    MergeConfig(**values)
    for values in (
        {"ratio": 0.9},
        {"ratio": 0.5},
        {"ratio": 0.8, "prefix_share": 0.5},
        {"ratio": 0.9, "newlines": "scaled"},
        {"ratio": (0.9, 0.8, 1.0, 0.7, 1.0)},
        {"tokens_per_tile": 1},
        {"tokens_per_tile": 9, "newlines": "none"},
        {"tokens_per_tile": 20, "prefix_share": 1.0},
        {"prefix": 0.3},
        {"prefix": 0.01, "newlines": "scaled"},
        {"ratio": 0.9, "prefix": 0.5},
        {"ratio": 1.0, "tile_shares": "thumbnail"},
        {"ratio": 0.9, "tile_shares": "thumbnail"},
        {"ratio": 1.0, "newlines": "none"},
    )
]
SHARES = ("area", "equal", "joint", "attention", "thumbnail")


def layouts(kind, every=5):
    return [tiling_of(kind).image(*size) for size in SIZES[::every]]


def is_consistent(config, layout):
    """What holds for every schedule."""
    found = schedule(config, layout, LAYERS)
    lengths = found.lengths
    assert len(lengths) == LAYERS + 1 and lengths[0] == layout.side**2
    assert all(a >= b >= 1 for a, b in pairwise(lengths))
    assert len(found.arrived) == len(found.regions) == len(found.newlines) == len(layout.regions)
    assert found.tokens == sum(found.regions) + sum(found.newlines) + found.ends_with_newline
    for region, arrived, kept, newlines in zip(layout.regions, found.arrived, found.regions, found.newlines):
        assert 0 <= kept <= region.tokens and 0 <= newlines <= region.num_newlines
        assert kept <= arrived or region.is_pooled
        assert (kept > 0) == (region.tokens > 0) or config.tile_shares == "thumbnail"
    return found


@pytest.mark.parametrize("config", COUNTED, ids=lambda config: str(config.changes()))
@pytest.mark.parametrize("kind", FAMILIES)
def test_token_counts_are_consistent_for_every_size(kind, config):
    for layout in layouts(kind):
        found = is_consistent(config, layout)
        assert tokens_of_image(config, LAYERS, layout) == found.tokens
        region, kept = layout.regions[0], found.regions[0]
        assert kept <= region.tokens
        if config.tokens_per_tile is not None:
            assert kept == config.tokens_per_tile
        if config.tile_shares == "thumbnail":
            assert found.regions[1:] == found.newlines[1:] == (0,)


@pytest.mark.parametrize("newlines", ["rows", "scaled", "none"])
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_budget_is_met_exactly_and_its_range_is_named(kind, shares, newlines):
    for layout in layouts(kind, every=12):
        with pytest.raises(ValueError, match=r"tokens=100000 does not fit: .*allowed is \d+ to \d+") as error:
            schedule(MergeConfig(tokens=100000, tile_shares=shares, newlines=newlines), layout, LAYERS)
        least, most = map(int, str(error.value).split("allowed is ")[1].split(" to "))
        tiles = sum(n > 0 for n in layout.tile_patches[: 1 if shares == "thumbnail" else None])
        assert least >= min(tiles, most)
        if shares != "thumbnail" and newlines != "none":
            assert most == layout.tokens
        for tokens in {least, (least + most) // 3 or 1, most}:
            config = MergeConfig(tokens=max(tokens, least), tile_shares=shares, newlines=newlines)
            assert is_consistent(config, layout).tokens == config.tokens
        for tokens in {least - 1, most + 1} - {0}:
            with pytest.raises(
                ValueError, match=f"tokens={tokens} does not fit.*allowed is {least} to {most}"
            ):
                schedule(MergeConfig(tokens=tokens, tile_shares=shares, newlines=newlines), layout, LAYERS)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_budget_of_all_tokens_merges_nothing(kind):
    for layout in layouts(kind):
        found = schedule(MergeConfig(tokens=layout.tokens), layout, LAYERS)
        plain = schedule(MergeConfig(ratio=1.0), layout, LAYERS)
        assert found == plain
        assert plain.tokens == layout.tokens and set(plain.lengths) == {layout.side**2}


def test_equal_shares_give_every_tile_alike():
    layout = tiling_of("next-vicuna").image(96, 96)
    by_area = schedule(MergeConfig(tokens=62), layout, LAYERS).regions
    assert by_area == (10, 40)
    layout = tiling_of("next-vicuna").image(60, 96)  # whose tiles show padding
    found = {s: schedule(MergeConfig(tokens=60, tile_shares=s), layout, LAYERS) for s in ("equal", "area")}
    rows = layout.regions[1].height
    tiles = layout.regions[1].tiles
    assert found["equal"].regions[0] == round((60 - rows) / (tiles + 1))
    assert found["area"].regions[0] > found["equal"].regions[0]


@pytest.mark.parametrize(
    "config, expected",
    [
        (MergeConfig(prefix=60), 60),
        (MergeConfig(tokens=60, newlines="none"), 60),
        (MergeConfig(prefix=0.5), 18 + 72 + 12),
        (MergeConfig(tokens_per_tile=9), 45 + 12),
        (MergeConfig(tokens_per_tile=9, newlines="none"), 45),
        (MergeConfig(tokens_per_tile=9, newlines="scaled"), 45 + 6),
        (MergeConfig(ratio=(0.5, 1.0, 1.0, 1.0, 1.0)), 18 * 5 + 12),
        (MergeConfig(ratio=1.0, tile_shares="thumbnail"), 36),
        (MergeConfig(tokens_per_frame=3), 36 + 144 + 12),
    ],
    ids=lambda x: str(x.changes()) if isinstance(x, MergeConfig) else None,
)
def test_counts_of_an_image_of_four_whole_tiles(config, expected):
    layout = tiling_of("next-video").image(96, 96)
    assert tokens_of_image(config, LAYERS, layout) == expected


def test_padding_costs_no_tokens():
    """Tiles of which a third shows the image keep a third of the tokens."""
    whole, padded = (tiling_of("next-vicuna").image(height, 144) for height in (48, 16))
    assert padded.regions[1].tokens * 3 == whole.regions[1].tokens
    for config in (MergeConfig(ratio=0.8), MergeConfig(tokens_per_tile=10), MergeConfig(prefix=0.5)):
        kept = schedule(config, whole, LAYERS).regions[1] // 3
        assert schedule(config, padded, LAYERS).regions[1] == 3 * -(-kept // 3)


# Videos


@pytest.mark.parametrize(
    "kind, side, newline", [("next-video", 3, 0), ("onevision", 3, 1), ("onevision-odd", 4, 1)]
)
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_counts_of_videos(kind, side, newline, frames):
    layout = tiling_of(kind).video(frames)
    assert layout.tokens == frames * side**2 + newline
    for values, expected in (
        ({"ratio": 1.0}, layout.tokens), ({"tokens_per_frame": 2}, frames * 2 + newline),
        ({"tokens_per_frame": 2, "newlines": "none"}, frames * 2), ({"tokens_per_video": 8}, 8),
        ({"tokens_per_video": 8, "newlines": "none"}, 8), ({"prefix": 8}, 8),
        ({"prefix": 0.5}, frames * -(-(side**2) // 2) + newline),
        ({"tokens": 30, "tokens_per_frame": 1}, frames + newline),
    ):  # fmt: skip
        for temporal in (False, True):
            found = is_consistent(MergeConfig(**values, temporal=temporal), layout)
            assert found.tokens == expected, values


@pytest.mark.parametrize("kind", ["next-video", "onevision", "onevision-odd"])
def test_budgets_of_videos_that_do_not_fit_name_their_range(kind):
    layout = tiling_of(kind).video(3)
    of_frame, most = layout.regions[0].tokens, layout.tokens
    least = 3 + layout.ends_with_newline
    for tokens in (least - 1, most + 1):
        with pytest.raises(ValueError, match=f"tokens_per_video={tokens} .*allowed is {least} to {most}"):
            schedule(MergeConfig(tokens_per_video=tokens), layout, LAYERS)
    with pytest.raises(ValueError, match=f"tokens_per_frame={of_frame + 1} .*allowed is 1 to {of_frame}"):
        schedule(MergeConfig(tokens_per_frame=of_frame + 1), layout, LAYERS)
    with pytest.raises(ValueError, match="tokens=30 is the budget of an image"):
        schedule(MergeConfig(tokens=30), layout, LAYERS)
    for tokens in (least, most):
        assert schedule(MergeConfig(tokens_per_video=tokens), layout, LAYERS).tokens == tokens


@pytest.mark.parametrize("frames", [0, -1])
@pytest.mark.parametrize("kind", ["next-video", "onevision"])
def test_a_video_without_frames_is_refused(kind, frames):
    with pytest.raises(ValueError, match=f"a video has {frames} frames; at least 1"):
        tiling_of(kind).video(frames)


def test_a_model_without_videos_has_no_layout_for_them():
    with pytest.raises(ValueError, match="takes no videos"):
        tiling_of("next-vicuna").video(3)


def test_a_still_video_can_keep_all_tokens_of_one_frame():
    """With `temporal` the tower leaves every frame as many tokens as the whole video keeps."""
    layout = tiling_of("onevision").video(8)
    still = schedule(MergeConfig(tokens_per_video=10, temporal=True), layout, LAYERS)
    assert still.lengths[-1] == 36  # of which a frame has 9 tokens once it is pooled
    assert schedule(MergeConfig(tokens_per_video=10), layout, LAYERS).lengths[-1] == 8


# Bad sizes and grids


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-1, 5)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels; each side must be at least 1"):
        tiling_of("next-vicuna").image(*size)


@pytest.mark.parametrize("grid", [[50, 96], [96, 47], [24, 48], [0, 48]])
def test_grids_that_are_not_whole_tiles_are_refused(grid):
    config = config_of("next-vicuna")
    config.image_grid_pinpoints = [[48, 96], grid]
    with pytest.raises(ValueError, match=r"image_grid_pinpoints holds \[.* multiples of a tile's 48"):
        llava_next.tiling(config)


@pytest.mark.parametrize("aspect", ["anyres", "pad", "anyres_max_", "anyres_max_x"])
def test_another_aspect_than_anyres_max_is_refused(aspect):
    config = config_of("onevision")
    config.vision_aspect_ratio = aspect
    with pytest.raises(ValueError, match=f"vision_aspect_ratio='{aspect}' is not supported"):
        llava_onevision.tiling(config)


@pytest.mark.parametrize("counts", [[1], [2, 2], [1, 1, 3]])
def test_counts_of_images_that_do_not_add_up_are_refused(counts):
    with pytest.raises(ValueError, match=r"batch_num_images=.* image_sizes holds 3"):
        tiling_of("onevision").images([[50, 50]] * 3, torch.tensor(counts))


def test_images_that_share_a_prompt_are_one_tile_each():
    sizes = torch.tensor([[50, 100], [100, 50], [96, 96]])
    found = tiling_of("onevision").images(sizes, [2, 1])
    assert [layout.tiles for layout in found] == [1, 1, 5]
    assert [layout.tokens for layout in found[:2]] == [37, 37]
    assert [layout.tiles for layout in tiling_of("onevision").images(sizes)] == [3, 3, 5]
    assert [layout.tiles for layout in tiling_of("next-vicuna").images(sizes, [2, 1])] == [3, 3, 5]


# Dividing


def test_numbers_are_divided_in_proportion_within_their_limits():
    random.seed(1)
    for _ in range(200):
        count = random.randint(1, 6)
        most = [random.randint(0, 40) for _ in range(count)]
        least = [random.randint(0, high) for high in most]
        weights = [random.random() * 9 for _ in range(count)]
        total = random.randint(sum(least), sum(most))
        found = divide(total, weights, least, most)
        assert sum(found) == total
        assert all(low <= n <= high for low, n, high in zip(least, found, most))
    assert divide(10, [1, 1, 2], [0] * 3, [10] * 3) == [3, 2, 5]
    assert divide(7, [0, 0], [0, 0], [9, 9]) in ([4, 3], [7, 0], [3, 4])
    assert divide(9, [1, 1, 1], [0] * 3, [1, 9, 9]) == [1, 4, 4]


def test_windows_round_as_unpad_image_does():
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    for height, width in SIZES:
        grid = torch.arange(12 * 18).view(1, 12, 18)
        top, bottom, left, right = unpadded(12, 18, height, width)
        assert torch.equal(unpad_image(grid, (height, width)), grid[:, top:bottom, left:right])
