"""What the web page starts with: what was asked for, or how the model was saved to merge."""

import pytest

from llava_pitome import METHODS, MergeConfig
from llava_pitome.cli.web.start import Start, merging, start


def test_without_anything_saved_or_asked_it_is_the_default():
    assert start(None, None, 196, 11) == Start("pitome", 0.9, "")


@pytest.mark.parametrize("ratio", [0.3, 0.9, 0.9137, 1])
def test_a_saved_method_and_ratio_are_shown(ratio):
    assert start(None, MergeConfig(method="tome", ratio=ratio), 196, 11) == Start("tome", ratio)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_the_page_can_choose_is_known_again(method):
    saved = merging(method, 0.9, 576, 23)
    found = start(None, saved, 576, 23)
    assert merging(found.method, found.ratio, 576, 23) == saved and not found.note


@pytest.mark.parametrize(
    "saved",
    [
        MergeConfig(tokens=65),
        MergeConfig.recipe("released", ratio=0.9),
        MergeConfig(ratio=(0.9,) * 11),
        MergeConfig(ratio=0.9, prefix=20),
        MergeConfig(prefix=0.5),
    ],
    ids=lambda c: str(c.changes()),
)
def test_what_a_method_and_a_ratio_cannot_say_is_said_in_words(saved):
    found = start(None, saved, 196, 11)
    assert (found.method, found.ratio) == ("pitome", 0.9)
    assert all(f'"{name}"' in found.note for name in saved.changes())
    assert "It is not used here: the page starts with pitome at a ratio of 0.9" in found.note


def test_what_is_asked_for_overrules_what_was_saved():
    assert start(0.8, MergeConfig(method="tome", ratio=0.7), 196, 11) == Start("pitome", 0.8)
    assert start(0.8, MergeConfig(tokens=65), 196, 11) == Start("pitome", 0.8)
