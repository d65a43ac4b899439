"""Chat: what is asked, remembered, refused and shown, in a conversation and in the terminal."""

import io
import json
import re

import pytest
import torch
from PIL import Image

from llava_pitome import MergeConfig, apply, load, merge_tokens
from llava_pitome.cli.chat import command
from llava_pitome.cli.chat import terminal as terminals
from llava_pitome.cli.chat.conversation import Conversation
from llava_pitome.cli.chat.terminal import Terminal
from llava_pitome.cli.main import main
from llava_pitome.embedded import render, scenes
from llava_pitome.embedded.questions import HINT, ask

RATIO = MergeConfig(ratio=0.9)


@pytest.fixture(scope="module")
def embedded():
    return load("embedded")


@pytest.fixture
def talk(embedded):
    model, processor = embedded
    with merge_tokens(model, RATIO, processor):
        yield Conversation(model, processor, max_new_tokens=8)


def scene(seed: int) -> Image.Image:
    return Image.fromarray(render.render(scenes.scene(seed)))


def offline(embedded, question: str, picture: Image.Image, config: MergeConfig | None) -> str:
    model, processor = embedded
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with merge_tokens(model, config or MergeConfig(ratio=1.0), processor), torch.no_grad():
        inputs = processor(text=prompt, images=picture, return_tensors="pt").to(model.device, model.dtype)
        said = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.tokenizer.decode(
        said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


def test_streamed_answers_are_those_of_generate(embedded, talk):
    for seed in range(4):
        question = ask(scenes.scene(seed), 1)[0].text + HINT
        talk.reset()
        talk.show(scene(seed))
        assert "".join(talk.ask(question)).strip() == offline(embedded, question, scene(seed), RATIO)


def test_the_numbers_are_those_of_the_prompt(talk):
    talk.show(scene(0))
    talk.show(scene(1))
    answer = "".join(talk.ask("Which colors are there?"))
    found = talk.numbers
    assert found.patches == 2 * 196 and found.image_tokens == 2 * 65
    assert found.image_tokens < found.prompt_tokens < found.image_tokens + 60
    assert 1 <= found.answer_tokens <= 8 and found.first_token > 0 and found.memory > 0
    assert (found.tokens_per_second is None) == (found.answer_tokens == 1), answer


def test_every_turn_reads_what_came_before(talk):
    talk.show(scene(0))
    first = "".join(talk.ask("Is there a circle?"))
    one = talk.numbers.prompt_tokens
    talk.show(scene(1))
    "".join(talk.ask("And here?"))
    assert talk.numbers.image_tokens == 2 * 65 and talk.numbers.prompt_tokens > one + 65
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2
    assert talk.turns[1]["content"][0]["text"] == first.strip()


def test_an_answer_that_is_left_early_is_kept_as_far_as_it_was_read(embedded):
    model, processor = embedded
    talk = Conversation(model, processor, max_new_tokens=400)
    model.generation_config.eos_token_id, before = None, model.generation_config.eos_token_id
    try:
        answer = talk.ask("What is this?")
        piece = next(answer)
        answer.close()  # returns once generation has stopped
    finally:
        model.generation_config.eos_token_id = before
    assert talk.turns[1]["content"][0]["text"] == piece.strip()
    assert talk.numbers.answer_tokens < 400


def test_an_answer_that_is_interrupted_is_kept_as_far_as_it_was_read(held, monkeypatch):
    def interrupted(text):
        held.out.write(text)
        raise KeyboardInterrupt

    monkeypatch.setattr(held, "say", interrupted)
    with pytest.raises(KeyboardInterrupt):
        held.take("Is there a circle?")
    assert len(held.conversation.turns) == 2 and len(held.record) == 1
    assert held.record[0]["answer"] == held.conversation.turns[1]["content"][0]["text"] != ""


def test_a_saved_way_to_merge_stays_when_only_the_amount_changes():
    saved = MergeConfig(ratio=0.8, method="tome", llm_proportional=True)
    changed = command._changed(saved, tokens=20)
    assert changed == MergeConfig(tokens=20, method="tome", llm_proportional=True)
    assert command._changed(None, ratio=0.7) == MergeConfig(ratio=0.7)


def test_an_error_in_generation_reaches_who_reads_and_changes_nothing(talk, monkeypatch):
    def fails(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(talk.model, "generate", fails)
    talk.show(scene(0))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(talk.ask("What is this?"))
    assert talk.turns == [] and talk.pictures == []
    monkeypatch.undo()
    "".join(talk.ask("What is this?"))
    assert talk.numbers.patches == 196  # the picture waited for its question


@pytest.mark.parametrize("question, reason", [(" ", "empty"), ("a <image> b", "cannot hold <image>")])
def test_questions_that_cannot_be_asked_are_refused(talk, question, reason):
    with pytest.raises(ValueError, match=reason):
        next(talk.ask(question))
    assert talk.turns == []


def test_a_conversation_that_is_too_long_is_refused(talk):
    for _ in range(32):
        talk.show(scene(0))
    with pytest.raises(ValueError, match=r"has 2\d+ tokens, .* reads 2048"):
        next(talk.ask("What is this?"))


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}]
)
def test_settings_out_of_range_are_refused(embedded, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        Conversation(*embedded, **options)


@pytest.fixture
def held(talk):
    def change(**amount):
        return MergeConfig(**amount)

    return Terminal(talk, RATIO, change, io.StringIO())


def test_lines_ask_and_commands_change_what_merges(held, tmp_path, embedded):
    scene(0).save(tmp_path / "a.png")
    saved = tmp_path / "said.json"
    lines = [f"/image {tmp_path / 'a.png'}", "Is there a circle?", "/tokens 20", "Why?", "/plain", "So?",
             f"/save {saved}", "/reset", "Is it?", "/quit", "never asked"]  # fmt: skip
    held.hold(lines, interactive=False)
    shown = held.out.getvalue()
    numbers = re.findall(r"\[(\d+) image tokens of (\d+) · first token [\d.]+ s · .* · [\d.]+ GB\]", shown)
    assert numbers == [("65", "196"), ("20", "196"), ("196", "196"), ("0", "0")]
    said = json.loads(saved.read_text())
    assert [s["question"] for s in said] == ["Is there a circle?", "Why?", "So?"]
    assert [s["token_merging"] and s["token_merging"]["tokens"] for s in said] == [None, 20, None]
    assert said[0]["token_merging"]["ratio"] == 0.9 and said[2]["token_merging"] is None
    assert "never asked" not in shown


@pytest.mark.parametrize(
    "line, reason",
    [
        ("/ratio 2", "ratio=2"), ("/ratio x", "'x' is not allowed"), ("/tokens 0", "tokens=0"),
        ("/tokens 500", "does not fit"), ("/image nothing.png", "nothing.png is not there"),
        ("/image", "needs the name"),
        ("/imag a.png", "/imag is no command"),
        ("/save", "needs the name"), ("/save /none/x", "cannot be written"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_done_say_why_and_change_nothing(held, line, reason):
    with pytest.raises(ValueError, match=reason):
        held.hold([line], interactive=False)
    held.hold([line, "Is there a circle?"], interactive=True)
    assert reason in held.out.getvalue() and held.config == RATIO and len(held.record) == 1


def test_an_answer_that_is_stopped_before_it_begins_has_no_numbers(held, monkeypatch):
    def stopped(_):
        raise KeyboardInterrupt
        yield

    held.hold(["Is there a circle?"], interactive=True)
    monkeypatch.setattr("llava_pitome.cli.chat.streaming.Stream.pieces", stopped)
    held.hold(["Is there a square?"], interactive=True)
    assert [said["numbers"] is None for said in held.record] == [False, True]


def test_help_names_every_command(held):
    held.take("/help")
    assert all(name in held.out.getvalue() for name in terminals.COMMANDS)


def test_the_command_answers_piped_questions(monkeypatch, capsys, tmp_path):
    scene(3).save(tmp_path / "a.png")
    question = ask(scenes.scene(3), 1)[0].text
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n"))
    assert main(["chat", "--ratio", "0.9", "--image", str(tmp_path / "a.png")]) == 0
    shown = capsys.readouterr().out
    assert "[65 image tokens of 196 · " in shown
    assert shown.split("\n")[0] == offline(load("embedded"), question, scene(3), RATIO)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--ratio", "0"], "0"), (["--image", "no.png"], "no.png is not there"),
        (["--max-new-tokens", "0"], "whole number from 1"), (["--recipe", "best"], "not how far"),
        (["--device", "cuda:9"], "cuda:9"), (["--temperature", "-1"], "a number from 0"),
        (["--temperature", "inf"], "a number from 0"),
    ],
)  # fmt: skip
def test_the_command_refuses_before_it_talks(monkeypatch, capsys, words, reason):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    try:
        code = main(["chat", *words])
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2 and reason in capsys.readouterr().err


def test_what_was_applied_is_known(embedded):
    from llava_pitome import remove
    from llava_pitome.api import applied

    model, processor = embedded
    assert applied(model) is None
    apply(model, RATIO, processor)
    assert applied(model) == RATIO
    remove(model)
    assert applied(model) is None
