"""Overlays, heat maps and figures, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava_pitome import MergeConfig
from llava_pitome.cli.draw.heat import COLOURS, DROPPED, heat, value_range
from llava_pitome.cli.draw.overlay import DARK, EDGE, FAINT, overlay
from llava_pitome.cli.draw.panels import Panel, Point, Row, energy, legend, rows, tokens
from llava_pitome.tracing import trace_image


def grey_image(patches: list[list[int]], patch: int = 4) -> Image.Image:
    grey = np.array(patches, np.uint8).repeat(patch, 0).repeat(patch, 1)
    return Image.fromarray(np.stack([grey] * 3, -1))


def pixels(patches, slot, step=8, **options):
    return np.asarray(overlay(grey_image(patches), torch.tensor(slot), step, **options)).astype(int)


@pytest.mark.parametrize(
    "slot, colours",
    [
        ([0, 0, 1, 2], [[50, 50], [50, 200]]),
        ([0, 1, 2, 0], [[100, 100], [50, 100]]),  # a token need not be connected
        ([0, 1, 2, 3], [[0, 100], [50, 200]]),
    ],
)
def test_a_token_has_the_mean_colour_of_its_patches(slot, colours):
    found = pixels([[0, 100], [50, 200]], slot)
    assert found.shape == (16, 16, 3)
    assert (found[2::11, 2::11] == np.array(colours)[..., None]).all()


def test_a_patch_that_is_a_token_of_its_own_shows_the_image():
    checks = np.indices((8, 8)).sum(0) % 2 * 255
    image = Image.fromarray(np.stack([checks.astype(np.uint8)] * 3, -1))
    found = np.asarray(overlay(image, torch.tensor([0, 0, 1, 2]), step=8))
    assert len(np.unique(found[2:6, 2:6])) == 1  # merged: one colour
    assert len(np.unique(found[10:14, 2:6])) > 1


def test_lines_separate_tokens_and_are_faint_between_single_patches():
    found = pixels([[0, 100], [50, 200]], [0, 0, 1, 2])
    assert (found[8, 2] == EDGE).all() and (found[8, 13] == EDGE).all()
    assert (found[2, 7:9] == 50).all()  # one token on both sides
    black = pixels([[0, 0], [0, 0]], [0, 0, 1, 2])
    assert (black[12, 8] == round(FAINT * 255)).all()


@pytest.mark.parametrize("step", [1, 2, 9, 16, 33])
def test_lines_add_no_pixels(step):
    slot = torch.arange(4)
    assert overlay(grey_image([[0, 100], [50, 200]]), slot, step).size == (2 * step, 2 * step)
    assert heat(slot.float(), slot, step).size == (2 * step, 2 * step)


def test_dropped_patches_are_dark_and_change_no_colour():
    dropped = torch.tensor([False, True, False, False])
    found = pixels([[40, 200], [80, 100]], [0, 0, 0, 1], dropped=dropped)
    assert (found[2, 2] == 60).all() and (found[13, 2] == 60).all()  # without the 200
    assert (found[2, 13] == round(200 * DARK)).all()


def test_a_grid_need_not_be_square():
    found = pixels([[0, 100, 200]], [0, 0, 1], grid=(1, 3))
    assert found.shape == (8, 24, 3)
    assert (found[4, 4] == 50).all() and (found[4, 20] == 200).all()


@pytest.mark.parametrize(
    "patches, grid, reason",
    [
        (5, None, "5 patches are no grid of"), (4, (3, 2), "4 patches are no grid of 3 x 2"),
        (9, None, "3 x 3 patches do not tile an image of 8 x 8 pixels"),
    ],
)  # fmt: skip
def test_patches_that_do_not_fit_the_image_are_refused(patches, grid, reason):
    with pytest.raises(ValueError, match=reason):
        overlay(Image.new("RGB", (8, 8)), torch.zeros(patches, dtype=torch.long), grid=grid)


@pytest.mark.parametrize(
    "values, dropped, colours, ends",
    [
        ([-1, 0, 1, 0], None, [COLOURS[0], COLOURS[2], COLOURS[4], COLOURS[2]], (-1, 1)),
        ([1, 1, 1, 1], None, [COLOURS[2]] * 4, (1, 1)),
        ([0, 9, 1, 1], 1, [COLOURS[0], DROPPED, COLOURS[4], COLOURS[4]], (0, 1)),
    ],
)
def test_heat_scales_the_values_of_patches_that_are_not_dropped(values, dropped, colours, ends):
    values = torch.tensor(values, dtype=torch.float32)
    dropped = None if dropped is None else torch.arange(4) == dropped
    found = np.asarray(heat(values, torch.arange(4), step=9, dropped=dropped))
    assert [tuple(found[y, x]) for y in (4, 14) for x in (4, 14)] == colours
    assert value_range(values, dropped) == ends


def test_rows_hold_the_tokens_and_the_energies_that_exist(model, processor, pictures):
    points = [Point("a", "tower", 0), Point("b", "prefix", 0)]
    pitome, tome = (
        trace_image(model, processor, pictures[1], MergeConfig(ratio=0.8, method=m))
        for m in ("pitome", "tome")
    )
    first, second = rows("mine", pitome, points, 96)
    assert [p.caption for p in first.panels] == ["36 patches", "29 tokens", "9 tokens"]
    assert [p.caption for p in second.panels] == ["", "before: 36 tokens", "nothing merges here"]
    assert (first.detail, second.detail) == ("ratio 0.8", "of pitome")
    assert len(rows("mine", pitome, points, 96, "none")) == len(rows("theirs", tome, points, 96)) == 1
    assert energy(tome, points[0], 96).caption == "tome has no energy"
    _, fallback = rows("theirs", tome, points, 96, "all")
    assert fallback.detail == "PiToMe's, of the tokens of tome" and fallback.panels[1].values
    assert "Energy" in legend([pitome], [second]) and "dropped" not in legend([pitome], [first, second])


def test_a_resized_image_keeps_its_grid(model, processor, pictures):
    traced = trace_image(model, processor, pictures[1], MergeConfig(ratio=0.8, resize=(4, 5)))
    assert tokens(traced, Point("", "tower", 6), 100).image.size == (100, 80)


# Figures


@pytest.fixture
def drawn(tmp_path):
    """Draws a figure and reads its file."""
    from llava_pitome.cli.draw.figure import figure, save

    def draw(titles, rows, legend=""):
        save(figure(titles, rows, legend), tmp_path / "figure.png")
        return np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))

    return draw


def box(figure, colour, tolerance=0):
    """The box (left, top, right, bottom) of a colour."""
    ys, xs = (np.abs(figure.astype(int) - colour) <= tolerance).all(-1).nonzero()
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def noise(width, height, channel):
    """An image of one strong channel, whose pixels all differ from their neighbours."""
    values = np.random.default_rng(channel).integers(0, 50, (height, width, 3), dtype=np.uint8)
    values[..., channel] += 200
    return values


@pytest.mark.parametrize("size", [64, 90, 224])
def test_every_image_is_in_the_figure_pixel_by_pixel(drawn, size):
    images = [noise(size, size, 0), noise(size, size - 10, 1), noise(size - 7, size, 2)]
    panels = [Panel(Image.fromarray(image), "a caption") for image in images]
    figure = drawn(["left", "right"], [Row("one", "", panels[:2]), Row("two", "", [panels[2], panels[0]])])
    windows = np.lib.stride_tricks.sliding_window_view(figure, (1, 8, 3))[:, :, 0, 0]
    corners = []
    for image in images:
        ys, xs = (windows == image[0, :8]).all((-1, -2)).nonzero()
        y, x = ys[0], xs[0]
        assert np.array_equal(figure[y : y + len(image), x : x + image.shape[1]], image)
        corners.append((y, x))
    (top, left), (_, right), (lower, _) = corners
    assert right >= left + size + 10 and lower >= top + size + 10


@pytest.mark.parametrize("size", [64, 300])
def test_no_text_touches_the_border_of_a_figure(drawn, size):
    panel = Panel(Image.new("RGB", (size, size)), "196 patches", (-0.001, 12345.0))
    rows = [Row(f"method {i}", "64 tokens at the prefix", [panel]) for i in range(2)]
    found = drawn(["a title of the column, in many words"], rows, "a legend longer than the figure " * 4)
    for border in (found[:8], found[-8:], found[:, :8], found[:, -8:]):
        assert (border == 255).all()


def test_a_panel_without_an_image_gives_the_reason_or_stays_white(drawn):
    empty = (243, 244, 246)
    black = Panel(Image.new("RGB", (90, 90)), "")
    found = drawn(
        ["a", "b", "c"], [Row("", "", [black, Panel(None, "nothing merges here"), Panel(None, "")])]
    )
    left, top, right, bottom = box(found, empty)
    assert (right - left, bottom - top) == (90, 90)
    assert (found[top:bottom, right + 1 :] == 255).all()


def test_a_colour_scale_is_below_its_image(drawn):
    panel = Panel(Image.new("RGB", (120, 120), (255, 0, 0)), "", (0.0, 1.0))
    found = drawn(["a"], [Row("", "", [panel])])
    assert box(found, COLOURS[0], 3)[1] >= box(found, (255, 0, 0))[3]
    assert box(found, COLOURS[0], 3)[0] < box(found, COLOURS[-1], 3)[0]
