import numpy as np
import pytest
import torch
from PIL import Image

from llava_pitome.draw import EDGE, overlay, strip


def picture(colours: list[list[int]], patch: int = 4) -> Image.Image:
    grey = np.array(colours, np.uint8).repeat(patch, 0).repeat(patch, 1)
    return Image.fromarray(np.stack([grey] * 3, -1))


def test_a_token_is_drawn_in_the_mean_colour_of_its_patches():
    drawn = np.asarray(overlay(picture([[0, 100], [50, 200]]), torch.tensor([0, 0, 1, 2]), scale=2))
    assert drawn.shape == (16, 16, 3)
    assert (drawn[2, 2] == 50).all() and (drawn[2, 13] == 50).all()  # the two upper patches are one token
    assert (drawn[13, 2] == 50).all() and (drawn[13, 13] == 200).all()


def test_lines_run_between_tokens_and_only_there():
    drawn = np.asarray(overlay(picture([[0, 100], [50, 200]]), torch.tensor([0, 0, 1, 2]), scale=2))
    assert (drawn[7, 2] == EDGE).all() and (drawn[8, 13] == EDGE).all() and (drawn[13, 8] == EDGE).all()
    assert (drawn[2, 7] != EDGE).any()


@pytest.mark.parametrize(("patches", "side"), [(5, 8), (9, 8)])
def test_patches_that_do_not_tile_the_picture_raise(patches, side):
    with pytest.raises(ValueError, match=f"{patches} patches do not tile a picture of {side} x {side}"):
        overlay(Image.new("RGB", (side, side)), torch.zeros(patches, dtype=torch.long))


def test_a_strip_holds_its_pictures_side_by_side():
    whole = strip([Image.new("RGB", (4, 6)), Image.new("RGB", (5, 6))], gap=2)
    assert whole.size == (11, 6)
    assert whole.getpixel((4, 0)) == (255, 255, 255) and whole.getpixel((6, 0)) == (0, 0, 0)
