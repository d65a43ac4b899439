"""The session of the web page: one model, several users with a merging each; what is chosen at first."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from llava_pitome import METHODS, MergeConfig, load
from llava_pitome.cli.main import main
from llava_pitome.cli.web.session import InitialChoices, Session, initial_choices, merge_config
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene

IMAGE = Image.fromarray(render(scene(8)))
COUNT = "How many objects are there?"


@pytest.fixture(scope="module")
def model():
    return load("embedded")


@pytest.fixture
def session(model):
    return Session(*model, 16)


def last(session, image, question, config):
    return list(session.answer(image, question, config))[-1]


def test_concurrent_users_get_their_own_merging(session):
    configs = {ratio: MergeConfig(ratio=ratio) for ratio in (0.95, 0.9, 0.85, 0.8)}

    def tokens(config):
        return last(session, IMAGE, COUNT, config).stats.image_tokens

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(tokens, configs.values()))
    assert found == [config.tokens_at(196, 11) for config in configs.values()]
    assert tokens(None) == 196


def test_flops_decrease_with_merging_and_without_an_image(session):
    plain = last(session, IMAGE, "How many?", None).gflops
    merged = last(session, IMAGE, "How many?", MergeConfig(ratio=0.9)).gflops
    assert plain > merged > last(session, None, "How many?", None).gflops > 0


def test_closing_an_answer_ends_its_generation(model, monkeypatch):
    lengths, generate = [], model[0].generate

    def record(**inputs):
        lengths.append(generate(**inputs).shape[1] - inputs["input_ids"].shape[1])

    monkeypatch.setattr(model[0], "generate", record)
    monkeypatch.setattr(model[0].generation_config, "eos_token_id", None)  # never ends by itself
    session = Session(*model, 400)
    answer = session.answer(None, "What is this?", None)
    next(answer)
    answer.close()
    monkeypatch.setattr(model[0].generation_config, "eos_token_id", 2)
    assert last(session, IMAGE, COUNT, None).text == "6"
    assert len(lengths) == 2 and lengths[0] < 400


def test_an_error_is_raised_and_the_next_question_answered(session):
    with pytest.raises(ValueError, match="question is empty"):
        last(session, IMAGE, " ", None)
    assert last(session, IMAGE, "What?", None).stats


@pytest.mark.parametrize("command", ["chat", "web", "serve"])
def test_a_model_that_does_not_exist_ends_the_command_with_a_reason(command, capsys):
    port = [] if command == "chat" else ["--port", "0"]
    assert main([command, "--model", "/nowhere/at/all", *port]) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err


TOME = MergeConfig(method="tome", ratio=0.7)
EXPRESSIBLE = [
    (None, None, InitialChoices("pitome", 0.9, "")), (0.8, TOME, InitialChoices("pitome", 0.8)),
    (0.8, MergeConfig(tokens=65), InitialChoices("pitome", 0.8)),
    *[(None, MergeConfig(method="tome", ratio=r), InitialChoices("tome", r)) for r in (0.3, 0.9137, 1.0)],
]  # fmt: skip


@pytest.mark.parametrize("ratio, saved, expected", EXPRESSIBLE)
def test_the_page_starts_with_the_ratio_of_the_command_or_the_saved_config(ratio, saved, expected):
    assert initial_choices(ratio, saved, 196, 11) == expected


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_page_is_recognised_in_a_saved_config(method):
    saved = merge_config(method, 0.9, 576, 23)
    found = initial_choices(None, saved, 576, 23)
    assert merge_config(found.method, found.ratio, 576, 23) == saved and not found.note


OTHER = [
    MergeConfig(tokens=65), MergeConfig.recipe("released", ratio=0.9), MergeConfig(ratio=(0.9,) * 11),
    MergeConfig(ratio=0.9, prefix=20), MergeConfig(prefix=0.5),
]  # fmt: skip


@pytest.mark.parametrize("saved", OTHER, ids=lambda config: str(config.changes()))
def test_a_saved_config_that_the_page_cannot_express_is_noted(saved):
    found = initial_choices(None, saved, 196, 11)
    assert (found.method, found.ratio) == ("pitome", 0.9)
    assert all(f'"{name}"' in found.note for name in saved.changes())
    assert "It is not used here: the page starts with pitome at a ratio of 0.9" in found.note
