"""Chat: the conversation, its streamed answers, the terminal and the command."""

import io
import json
import re

import pytest
import torch
from PIL import Image

from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.api import applied
from llava_pitome.cli.chat import terminal as terminals
from llava_pitome.cli.chat.conversation import Conversation
from llava_pitome.cli.chat.terminal import Terminal, with_fields
from llava_pitome.cli.main import main
from llava_pitome.embedded import render, scenes
from llava_pitome.embedded.questions import HINT, ask

CONFIG = MergeConfig(ratio=0.9)  # 65 tokens of 196 patches


@pytest.fixture(scope="module")
def embedded():
    return load("embedded")


@pytest.fixture
def conversation(embedded):
    model, processor = embedded
    with merge_tokens(model, CONFIG, processor):
        yield Conversation(model, processor, max_new_tokens=8)


@pytest.fixture
def terminal(conversation):
    return Terminal(conversation, CONFIG, io.StringIO())


def scene(seed: int) -> Image.Image:
    return Image.fromarray(render.render(scenes.scene(seed)))


def generate(embedded, question: str, image: Image.Image, config: MergeConfig) -> str:
    """The answer of plain `generate`."""
    model, processor = embedded
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = processor(text=prompt, images=image, return_tensors="pt").to(model.device, model.dtype)
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_streamed_answers_equal_those_of_generate(embedded, conversation):
    for seed in range(4):
        question = ask(scenes.scene(seed), 1)[0].text + HINT
        conversation.reset()
        conversation.add_image(scene(seed))
        assert "".join(conversation.ask(question)).strip() == generate(
            embedded, question, scene(seed), CONFIG
        )


def test_stats_count_the_tokens_of_the_prompt(conversation):
    conversation.add_image(scene(0))
    conversation.add_image(scene(1))
    answer = "".join(conversation.ask("Which colors are there?"))
    stats = conversation.stats
    assert stats.patches == 2 * 196 and stats.image_tokens == 2 * 65
    assert stats.image_tokens < stats.prompt_tokens < stats.image_tokens + 60
    assert 1 <= stats.answer_tokens <= 8 and stats.first_token > 0 and stats.memory > 0
    assert (stats.tokens_per_second is None) == (stats.answer_tokens == 1), answer


def test_every_prompt_contains_the_turns_before_it(conversation):
    conversation.add_image(scene(0))
    first = "".join(conversation.ask("Is there a circle?"))
    length = conversation.stats.prompt_tokens
    conversation.add_image(scene(1))
    "".join(conversation.ask("And here?"))
    assert conversation.stats.image_tokens == 2 * 65 and conversation.stats.prompt_tokens > length + 65
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * 2
    assert conversation.turns[1]["content"][0]["text"] == first.strip()


def test_an_answer_that_is_closed_early_stops_generation_and_is_kept(embedded, monkeypatch):
    conversation = Conversation(*embedded, max_new_tokens=400)
    monkeypatch.setattr(conversation.model.generation_config, "eos_token_id", None)
    answer = conversation.ask("What is this?")
    piece = next(answer)
    answer.close()  # returns once generation has stopped
    assert conversation.turns[1]["content"][0]["text"] == piece.strip()
    assert conversation.stats.answer_tokens < 400


def test_a_failure_of_generate_reaches_the_caller_and_changes_nothing(conversation, monkeypatch):
    def fails(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(conversation.model, "generate", fails)
    conversation.add_image(scene(0))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(conversation.ask("What is this?"))
    assert conversation.turns == [] and conversation.images == []
    monkeypatch.undo()
    "".join(conversation.ask("What is this?"))
    assert conversation.stats.patches == 196  # the image stays with the next question


@pytest.mark.parametrize(
    "question, images, reason",
    [
        (" ", 0, "empty"), ("a <image> b", 0, "cannot contain <image>"),
        ("What is this?", 32, r"has 2\d+ tokens, .* context is 2048"),
    ],
)  # fmt: skip
def test_questions_that_cannot_be_answered_are_refused(conversation, question, images, reason):
    for _ in range(images):
        conversation.add_image(scene(0))
    with pytest.raises(ValueError, match=reason):
        next(conversation.ask(question))
    assert conversation.turns == []


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}]
)
def test_settings_out_of_range_are_refused(embedded, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        Conversation(*embedded, **settings)


def test_lines_ask_questions_and_change_the_config(terminal, tmp_path):
    scene(0).save(tmp_path / "a.png")
    saved = tmp_path / "record.json"
    lines = [f"/image {tmp_path / 'a.png'}", "Is there a circle?", "/tokens 20", "Why?", "/plain", "So?",
             f"/save {saved}", "/reset", "Is it?", "/quit", "never read"]  # fmt: skip
    terminal.run(lines, interactive=False)
    written = terminal.out.getvalue()
    stats = re.findall(r"\[(\d+) image tokens of (\d+) · first token [\d.]+ s · .* · [\d.]+ GB\]", written)
    assert stats == [("65", "196"), ("20", "196"), ("196", "196"), ("0", "0")]
    record = json.loads(saved.read_text())
    assert [entry["question"] for entry in record] == ["Is there a circle?", "Why?", "So?"]
    configs = [MergeConfig.from_dict(c) if (c := entry["token_merging"]) else None for entry in record]
    assert configs == [CONFIG, MergeConfig(tokens=20), None]
    assert record[0]["numbers"]["image_tokens"] == 65
    assert "never read" not in written


@pytest.mark.parametrize(
    "line, reason",
    [
        ("/ratio 2", "ratio='2' is not allowed"), ("/ratio x", "'x' is not allowed"),
        ("/tokens 0", "tokens='0' is not allowed"), ("/tokens 500", "does not fit"),
        ("/image nothing.png", "nothing.png does not exist"), ("/image", "/image needs FILE"),
        ("/ratio", "/ratio needs R"), ("/imag a.png", "/imag is no command; allowed are /image, /video"),
        ("/save", "/save needs FILE"), ("/save /none/x", "cannot be written"),
    ],
)  # fmt: skip
def test_lines_that_are_not_allowed_give_the_reason_and_change_nothing(terminal, line, reason):
    with pytest.raises(ValueError, match=reason):
        terminal.run([line], interactive=False)
    terminal.run([line, "Is there a circle?"], interactive=True)
    assert reason in terminal.out.getvalue() and terminal.config == CONFIG and len(terminal.record) == 1


def test_an_interrupted_answer_is_kept_as_far_as_it_was_written(terminal, monkeypatch):
    def interrupted(text):
        terminal.out.write(text)
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        terminal.handle("Is there a circle?")
    assert len(terminal.conversation.turns) == 2 and len(terminal.record) == 1
    assert terminal.record[0]["answer"] == terminal.conversation.turns[1]["content"][0]["text"] != ""


def test_an_answer_that_is_interrupted_before_its_first_token_has_no_stats(terminal, monkeypatch):
    def interrupted(_, **__):
        raise KeyboardInterrupt
        yield

    terminal.run(["Is there a circle?"], interactive=True)
    monkeypatch.setattr("llava_pitome.cli.chat.streaming.AnswerStream.generate", interrupted)
    terminal.run(["Is there a square?"], interactive=True)
    assert [entry["numbers"] is None for entry in terminal.record] == [False, True]
    assert "(stopped)" in terminal.out.getvalue()


def test_another_amount_keeps_the_rest_of_the_config():
    config = MergeConfig(ratio=0.8, method="tome", llm_proportional=True)
    changed = MergeConfig(tokens=20, method="tome", llm_proportional=True)
    assert with_fields(config, {"tokens": 20}) == changed
    assert with_fields(None, {"ratio": 0.7}) == MergeConfig(ratio=0.7)


def test_help_lists_every_command(terminal):
    terminal.handle("/help")
    assert all(name in terminal.out.getvalue() for name in terminals.COMMANDS)


def test_the_command_answers_piped_questions(embedded, monkeypatch, capsys, tmp_path):
    scene(3).save(tmp_path / "a.png")
    question = ask(scenes.scene(3), 1)[0].text
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n"))
    assert main(["chat", "--ratio", "0.9", "--image", str(tmp_path / "a.png")]) == 0
    written = capsys.readouterr().out
    assert "[65 image tokens of 196 · " in written
    assert written.split("\n")[0] == generate(embedded, question, scene(3), CONFIG)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--ratio", "0"], "0"), (["--image", "no.png"], "no.png does not exist"),
        (["--max-new-tokens", "0"], "whole number from 1"), (["--recipe", "best"], "not how far"),
        (["--device", "cuda:9"], "cuda:9"), (["--temperature", "-1"], "a number from 0"),
        (["--temperature", "inf"], "a number from 0"), (["--prefix", "1"], "number of tokens from 2"),
    ],
)  # fmt: skip
def test_the_command_refuses_before_a_model_is_loaded(monkeypatch, capsys, words, reason):
    monkeypatch.setattr("llava_pitome.cli.chat.command.load", lambda *_: pytest.fail("a model was loaded"))
    try:
        status = main(["chat", *words])
    except SystemExit as error:  # argparse
        status = error.code
    assert status == 2 and reason in capsys.readouterr().err


def test_applied_is_the_config_of_a_merging_model_alone(embedded):
    assert applied(embedded[0]) is None
    with merge_tokens(embedded[0], CONFIG, embedded[1]):
        assert applied(embedded[0]) == CONFIG
    assert applied(embedded[0]) is None
