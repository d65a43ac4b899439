"""The web page with models that cut images into tiles."""

import pytest
from test_tiled_chat import make
from tiled import noise

from llava_pitome import MergeConfig
from llava_pitome.cli.web.page import Callbacks, _draw, _points
from llava_pitome.cli.web.session import InitialChoices, Session, initial_choices
from llava_pitome.flops import closed_form_of_layouts

KINDS = ("next-vicuna", "onevision")
METHODS = ("pitome", "visionzip", "fastv")


@pytest.fixture(params=KINDS)
def session(request):
    return Session(*make(request.param), 4)


def last(session, image, config):
    return list(session.answer(image, "what is this", config))[-1]


@pytest.mark.parametrize("size", [(60, 100), (130, 40)], ids=str)
def test_stats_are_those_of_the_image(session, size):
    config, image = MergeConfig(ratio=0.8), noise(*size)
    merged, plain = last(session, image, config), last(session, image, None)
    assert merged.stats.image_tokens == session.counts.images(config, [size])[0]
    assert plain.stats.image_tokens == plain.stats.patches == merged.stats.patches
    text = merged.stats.prompt_tokens - merged.stats.image_tokens
    layout = session.counts.tiling.image(*size)
    assert merged.gflops == closed_form_of_layouts(session._model, [layout], text, config).total / 1e9
    assert plain.gflops > merged.gflops > last(session, None, None).gflops > 0


@pytest.mark.parametrize("method", METHODS)
def test_amounts_are_those_of_an_image_of_the_nominal_size(session, method):
    callbacks = Callbacks(session)
    height, width = session.counts.tiling.nominal_size
    line = callbacks.amount(method, 0.9)
    assert f" for an image of {width} x {height} pixels, merged in the " in line
    unmerged = session.counts.images(None, [None])[0]
    tokens, of = int(line.split()[0]), int(line.split()[4])  # "40 image tokens of 162 ..."
    assert tokens < of == unmerged
    assert callbacks.amount("pitome", 1.0).startswith(f"{unmerged} image tokens of {unmerged} ")


@pytest.mark.parametrize("method", METHODS)
def test_every_point_of_a_trace_is_drawn(method):
    session = Session(*make("next-vicuna"), 4)
    config = Callbacks(session)._config(type("Choices", (), {"method": method, "ratio": 0.9}))
    trace = session.trace(noise(60, 100), "what is this", config)
    for point in _points(trace):
        tokens, energy, caption = _draw(trace, point)
        assert tokens.width > 300 and caption
        assert ("energy of the" in caption) == (energy is not None)


def test_the_page_starts_as_the_model_was_saved():
    session = Session(*make("next-vicuna"), 4)
    sizes = session.patches, session.layers, session.has_tiles
    assert initial_choices(None, MergeConfig(ratio=0.8), *sizes) == InitialChoices("pitome", 0.8)
    assert "cannot express" in initial_choices(None, MergeConfig(tokens=40), *sizes).note
