"""The web page's desk: one model, several people, each with the merging of his own choice."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from llava_pitome import MergeConfig, load
from llava_pitome.cli.main import main
from llava_pitome.cli.web.desk import Desk
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene


@pytest.fixture(scope="module")
def model():
    return load("embedded")


@pytest.fixture
def desk(model):
    return Desk(*model, 16)


PICTURE = Image.fromarray(render(scene(8)))


def test_people_who_ask_at_once_get_their_own_merging(desk):
    wanted = {ratio: MergeConfig(ratio=ratio) for ratio in (0.95, 0.9, 0.85, 0.8)}

    def tokens(config):
        return list(desk.ask(PICTURE, "How many objects are there?", config))[-1].numbers.image_tokens

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(tokens, wanted.values()))
    assert found == [config.tokens_at(196, 11) for config in wanted.values()]
    assert tokens(None) == 196


def test_flops_fall_with_the_tokens_and_text_alone_has_some(desk):
    def gflops(picture, config):
        return list(desk.ask(picture, "How many?", config))[-1].gflops

    plain, merged, words = gflops(PICTURE, None), gflops(PICTURE, MergeConfig(ratio=0.9)), gflops(None, None)
    assert plain > merged > words > 0


def test_the_answer_of_somebody_who_left_ends(model, monkeypatch):
    made, generate = [], model[0].generate

    def counted(**inputs):
        made.append(generate(**inputs).shape[1] - inputs["input_ids"].shape[1])
        return None  # nobody looks at it: the text is streamed

    monkeypatch.setattr(model[0], "generate", counted)
    monkeypatch.setattr(model[0].generation_config, "eos_token_id", None)  # talks on and on
    desk = Desk(*model, 400)
    answer = desk.ask(None, "What is this?", None)
    next(answer)  # words come with the space behind them
    answer.close()
    monkeypatch.setattr(model[0].generation_config, "eos_token_id", 2)
    assert list(desk.ask(PICTURE, "How many objects are there?", None))[-1].text == "6"
    assert len(made) == 2 and made[0] < 400


def test_an_error_reaches_who_asked_and_the_next_is_answered(desk):
    with pytest.raises(ValueError, match="question is empty"):
        list(desk.ask(PICTURE, " ", None))
    assert list(desk.ask(PICTURE, "What?", None))[-1].numbers


@pytest.mark.parametrize("command", ["chat", "web", "serve"])
def test_a_model_that_is_not_there_ends_the_command_with_a_reason(command, capsys):
    port = [] if command == "chat" else ["--port", "0"]
    assert main([command, "--model", "/nowhere/at/all", *port]) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err
