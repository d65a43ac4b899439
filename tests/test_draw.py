"""What drawings look like, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava_pitome.cli.draw.heat import COLD_TO_HOT, DROPPED, bar, heat, spread
from llava_pitome.cli.draw.lettering import width, wrapped
from llava_pitome.cli.draw.overlay import DARK, EDGE, FAINT, overlay
from llava_pitome.cli.draw.sheet import EMPTY, PAPER, Panel, Row, sheet, strip


def picture(colours: list[list[int]], patch: int = 4) -> Image.Image:
    grey = np.array(colours, np.uint8).repeat(patch, 0).repeat(patch, 1)
    return Image.fromarray(np.stack([grey] * 3, -1))


def drawn(colours, slot, step=8, **options):
    return np.asarray(overlay(picture(colours), torch.tensor(slot), step, **options)).astype(int)


def test_a_token_is_drawn_in_the_mean_colour_of_its_patches():
    found = drawn([[0, 100], [50, 200]], [0, 0, 1, 2])
    assert found.shape == (16, 16, 3)
    assert (found[2, 2] == 50).all() and (found[2, 13] == 50).all()  # the two upper patches are one token
    assert (found[13, 2] == 50).all() and (found[13, 13] == 200).all()


def test_a_token_need_not_be_in_one_piece():
    found = drawn([[0, 100], [50, 200]], [0, 1, 2, 0])
    assert (found[2, 2] == 100).all() and (found[13, 13] == 100).all() and (found[13, 2] == 50).all()


def test_a_patch_that_is_a_token_of_its_own_shows_the_picture():
    checks = np.indices((8, 8)).sum(0) % 2 * 255
    seen = Image.fromarray(np.stack([checks.astype(np.uint8)] * 3, -1))
    found = np.asarray(overlay(seen, torch.tensor([0, 0, 1, 2]), step=8))
    assert len(np.unique(found[2:6, 2:6])) == 1  # merged: flat
    assert len(np.unique(found[10:14, 2:6])) > 1


def test_lines_run_between_tokens_and_only_there():
    found = drawn([[0, 100], [50, 200]], [0, 0, 1, 2])
    assert (found[8, 2] == EDGE).all() and (found[8, 13] == EDGE).all()
    assert (found[2, 7:9] == 50).all()  # the same token on both sides


def test_a_line_between_two_patches_that_are_alone_is_faint():
    found = drawn([[0, 0], [0, 0]], [0, 0, 1, 2])
    assert (found[12, 8] == round(FAINT * 255)).all()


@pytest.mark.parametrize("step", [1, 2, 9, 16, 33])
def test_a_drawing_is_as_large_as_its_patches_whatever_the_thickness_of_lines(step):
    slot = torch.arange(4)
    assert overlay(picture([[0, 100], [50, 200]]), slot, step).size == (2 * step, 2 * step)
    assert heat(slot.float(), slot, step).size == (2 * step, 2 * step)


def test_dropped_patches_are_dark_and_do_not_count_in_any_colour():
    dropped = torch.tensor([False, True, False, False])
    found = drawn([[40, 200], [80, 100]], [0, 0, 0, 1], dropped=dropped)
    assert (found[2, 2] == 60).all() and (found[13, 2] == 60).all()  # without the 200
    assert (found[2, 13] == round(200 * DARK)).all()


def test_a_grid_need_not_be_square():
    found = drawn([[0, 100, 200]], [0, 0, 1], grid=(1, 3))
    assert found.shape == (8, 24, 3)
    assert (found[4, 4] == 50).all() and (found[4, 20] == 200).all()


@pytest.mark.parametrize("patches, grid", [(5, None), (4, (3, 2)), (6, None)])
def test_patches_that_are_no_grid_raise(patches, grid):
    with pytest.raises(ValueError, match=f"{patches} patches are no grid of"):
        overlay(Image.new("RGB", (8, 8)), torch.zeros(patches, dtype=torch.long), grid=grid)


def test_patches_that_do_not_tile_the_picture_raise():
    with pytest.raises(ValueError, match="3 x 3 patches do not tile a picture of 8 x 8 pixels"):
        overlay(Image.new("RGB", (8, 8)), torch.zeros(9, dtype=torch.long))


def test_heat_goes_from_the_coldest_to_the_hottest_colour():
    found = np.asarray(heat(torch.tensor([-1.0, 0.0, 1.0, 0.0]), torch.arange(4), step=9))
    assert tuple(found[4, 4]) == COLD_TO_HOT[0] and tuple(found[14, 4]) == COLD_TO_HOT[-1]
    assert tuple(found[4, 14]) == COLD_TO_HOT[2] == tuple(found[14, 14])


def test_equal_values_have_the_colour_in_the_middle():
    found = np.asarray(heat(torch.ones(4), torch.arange(4), step=9))
    assert tuple(found[4, 4]) == COLD_TO_HOT[2]


def test_dropped_patches_have_no_heat_and_set_no_scale():
    values, dropped = torch.tensor([0.0, 9.0, 1.0, 1.0]), torch.tensor([False, True, False, False])
    assert spread(values, dropped) == (0, 1)
    found = np.asarray(heat(values, torch.arange(4), step=9, dropped=dropped))
    assert tuple(found[4, 14]) == DROPPED and tuple(found[14, 14]) == COLD_TO_HOT[-1]


def test_the_scale_runs_over_all_colours():
    found = np.asarray(bar(101, 3))
    assert found.shape == (3, 101, 3)
    assert [tuple(found[1, x]) for x in (0, 25, 50, 75, 100)] == list(COLD_TO_HOT)


def test_lines_of_text_fit_and_hold_every_word():
    text = "what every method kept, and unbelievablylongwordswithoutaspace too"
    lines = wrapped(text, 14, 90)
    assert all(width(line, 14) <= 90 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrapped("", 14, 90) == []


def find(whole, colour):
    """The box (left, top, right, bottom) of a colour in a picture."""
    rows, columns = (np.asarray(whole) == colour).all(-1).nonzero()
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_a_sheet_has_every_picture_once_whole_and_in_line():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)]
    panels = [Panel(Image.new("RGB", (90, 80 if i else 90), c), "a caption") for i, c in enumerate(colours)]
    rows = [Row("one", "", panels[:2]), Row("two", "a longer detail than others", panels[2:])]
    whole = sheet(["left", "right"], rows, "a note")
    boxes = [find(whole, colour) for colour in colours]
    assert [(b[2] - b[0], b[3] - b[1]) for b in boxes] == [(90, 90), (90, 80), (90, 80), (90, 80)]
    assert boxes[0][0] == boxes[2][0] and boxes[1][0] == boxes[3][0] > boxes[0][2]
    assert boxes[2][1] == boxes[3][1] > boxes[0][3]


def ink(whole, box):
    """Whether anything but paper is in a box of a picture."""
    return (np.asarray(whole.crop(box)) != PAPER).any()


def test_no_text_touches_the_edge_of_a_sheet():
    rows = [Row(f"method {i}", "64 tokens at the prefix", [Panel(Image.new("RGB", (70, 70)), "196 patches")])
            for i in range(2)]  # fmt: skip
    whole = sheet(["what the tower sees, in many words"], rows, "a note that is longer than the sheet " * 3)
    for box in ((0, 0, whole.width, 8), (0, 0, 8, whole.height),
                (whole.width - 8, 0, whole.width, whole.height),
                (0, whole.height - 8, whole.width, whole.height)):  # fmt: skip
        assert not ink(whole, box)


def test_a_panel_without_a_picture_says_why_or_stays_white():
    black = Panel(Image.new("RGB", (90, 90)), "here")
    rows = [Row("one", "", [black, Panel(None, "nothing merges here"), Panel(None, "")])]
    whole = sheet(["a", "b", "c"], rows, "")
    left, top, _, bottom = find(whole, EMPTY)
    assert bottom - top == 90
    across = left + 90 + 1
    assert not ink(whole, (across, top, whole.width, whole.height))


def test_a_colour_scale_has_room_of_its_own():
    panel = Panel(Image.new("RGB", (120, 120), (255, 0, 0)), "in front: 12 tokens", (-0.001, 12345.0))
    plain = sheet(["a"], [Row("one", "", [panel._replace(ends=None)])], "")
    whole = sheet(["a"], [Row("one", "", [panel])], "")
    assert whole.height > plain.height and whole.width == plain.width
    assert find(whole, COLD_TO_HOT[0])[1] >= find(whole, (255, 0, 0))[3]


def test_a_strip_holds_its_pictures_side_by_side():
    whole = strip([Image.new("RGB", (4, 6)), Image.new("RGB", (5, 6))], gap=2)
    assert whole.size == (11, 6)
    assert whole.getpixel((4, 0)) == (255, 255, 255) and whole.getpixel((6, 0)) == (0, 0, 0)
