"""Chat with models that cut images into tiles and take videos."""

import io
import re

import pytest
import torch
from PIL import Image
from test_tiled_loading import processor_of
from tiled import KINDS, TILED_WORDS, make_tiled, noise, takes_videos

from llava_pitome import MergeConfig, apply, merge_tokens
from llava_pitome.api import image_tokens
from llava_pitome.cli.chat.conversation import Conversation
from llava_pitome.cli.chat.terminal import Terminal
from llava_pitome.cli.main import main
from llava_pitome.models import hf_llava
from llava_pitome.models.image_counts import counts_of, counts_of_checkpoint

TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }} {% else %}"
    "<{{ c.type }}> {% endif %}{% endfor %}{% endfor %}"
)
SIZES = [(60, 100), (130, 40), (1, 1), (2000, 300)]
OF_VIDEOS = [kind for kind in KINDS if takes_videos(kind)]


def make(kind, config=None):
    """A model, merging or not, and its processor with a chat template."""
    model, processor = make_tiled(kind), processor_of(kind)
    processor.chat_template = TEMPLATE
    if config is not None:
        apply(model, config, processor)
    return model, processor


def clip(count=3):
    return [noise(50, 90, seed) for seed in range(count)]


def written(model, processor, **given):
    """Placeholders in a prompt of the model's processor."""
    mark, count = ("<video>", len(given.get("videos", ()))) if "videos" in given else ("<image>", 0)
    text = f"{mark} " * (count or len(given["images"][0])) + "what"
    ids = processor(text=[text], return_tensors="pt", **given)["input_ids"]
    return int(
        torch.isin(ids, torch.tensor([TILED_WORDS.index("<image>"), TILED_WORDS.index("<video>")])).sum()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config", [None, MergeConfig(ratio=0.8), MergeConfig(tokens_per_tile=9), MergeConfig(prefix=0.3)]
)
def test_counts_are_those_of_the_processor(kind, config):
    model, processor = make(kind, config)
    counts = counts_of(hf_llava.find(model))
    for size in SIZES:
        assert image_tokens(model, size) == written(model, processor, images=[[noise(*size)]])
    sizes = SIZES[:3]
    assert sum(counts.images(config, sizes)) == written(model, processor, images=[[noise(*s) for s in sizes]])
    if takes_videos(kind) and (config is None or not config.tokens_per_tile):
        assert sum(counts.videos(config, [3, 3])) == written(model, processor, videos=[clip(), clip()])
    assert image_tokens(model) == image_tokens(model, counts.tiling.nominal_size)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_of_a_checkpoint_are_those_of_its_model(kind, tmp_path):
    model = make_tiled(kind)
    model.config.save_pretrained(tmp_path)
    assert counts_of_checkpoint(str(tmp_path)) == counts_of(hf_llava.find(model))


def test_an_image_without_tiles_has_one_count(model, processor):
    with merge_tokens(model, MergeConfig(tokens=5), processor):
        assert image_tokens(model) == image_tokens(model, (2000, 300)) == 5
    assert image_tokens(model) == image_tokens(model, (1, 1)) == 36


@pytest.mark.parametrize("kind", KINDS)
def test_stats_count_the_tokens_of_every_image(kind):
    config = MergeConfig(ratio=0.8)
    model, processor = make(kind, config)
    conversation, counts, sizes = Conversation(model, processor, 2), counts_of(hf_llava.find(model)), []
    for size in SIZES[:3]:
        conversation.add_image(noise(*size))
        sizes.append(size)
        list(conversation.ask("what is this"))
        assert conversation.stats.image_tokens == sum(counts.images(config, sizes))
        assert conversation.stats.patches == sum(counts.images(None, sizes))


@pytest.mark.parametrize("kind", OF_VIDEOS)
def test_a_video_is_answered_as_by_generate(kind):
    config = MergeConfig(tokens_per_frame=4)
    model, processor = make(kind, config)
    conversation = Conversation(model, processor, max_new_tokens=4)
    conversation.add_video(clip())
    answer = "".join(conversation.ask("what is this"))
    inputs = processor(text=["<video> what is this "], videos=[clip()], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    counts = counts_of(hf_llava.find(model))
    assert conversation.stats.image_tokens == sum(counts.videos(config, [3]))
    assert conversation.stats.patches == sum(counts.videos(None, [3]))
    conversation.add_video(clip())
    list(conversation.ask("and this"))
    assert conversation.stats.image_tokens == sum(counts.videos(config, [3, 3]))


@pytest.mark.parametrize(
    "kind, added, reason",
    [
        ("next-vicuna", ["video"], "a LlavaNextForConditionalGeneration takes no videos"),
        ("onevision", ["image", "video"], "has an image, beside which no video is possible"),
        ("onevision", ["video", "image"], "has a video, beside which no image is possible"),
        ("next-video", ["video", 5], "the video has 5 frames, and those before it 3"),
        ("next-video", [0], "a video has 0 frames"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("asked", [False, True])
def test_what_cannot_be_in_one_conversation_is_refused_when_it_is_added(kind, added, reason, asked):
    conversation = Conversation(*make(kind), max_new_tokens=1)

    def add(what):
        if what == "image":
            conversation.add_image(noise(40, 40))
        else:
            conversation.add_video(clip(3 if what == "video" else what))

    for what in added[:-1]:
        add(what)
        if asked:
            list(conversation.ask("what"))
    with pytest.raises(ValueError, match=reason):
        add(added[-1])
    list(conversation.ask("is this"))  # goes on


def test_a_question_holds_no_placeholder():
    conversation = Conversation(*make("onevision"))
    for token in ("<image>", "<video>"):
        with pytest.raises(ValueError, match=f"cannot contain {token}"):
            next(conversation.ask(f"what is {token}"))


def lines(terminal, *words):
    """What the terminal writes, line by line."""
    terminal.run(words, interactive=False)
    return terminal.out.getvalue().splitlines()


def test_lines_change_every_field(tmp_path):
    config = MergeConfig(ratio=0.8, across_tiles=False)
    model, processor = make("next-llama3", config)
    noise(60, 100).save(tmp_path / "a.png")
    terminal = Terminal(Conversation(model, processor, 2), config, io.StringIO())
    unmerged = counts_of(hf_llava.find(model)).images(None, [(60, 100)])[0]
    typed = (
        "/tokens 40", f"/image {tmp_path / 'a.png'}", "/tokens 41", "/merge newlines=none tile_shares=equal",
        "what is this", "/merge tokens_per_tile=4", "/plain", "what",
    )  # fmt: skip
    out = lines(terminal, *typed)
    assert out[0] == "tokens=40 from the next answer on"
    assert out[2] == out[3] == f"41 image tokens of {unmerged} from the next answer on"
    assert re.search(rf"\[41 image tokens of {unmerged} ·", out[5])
    assert re.fullmatch(rf"\d+ image tokens of {unmerged} from the next answer on", out[6])
    assert re.search(rf"\[{unmerged} image tokens of {unmerged} ·", out[-1])
    kept = MergeConfig(tokens=41, across_tiles=False, newlines="none", tile_shares="equal")
    assert MergeConfig.from_dict(terminal.record[0]["token_merging"]) == kept


@pytest.mark.parametrize(
    "line, reason",
    [
        ("/tokens 3", r"tokens=3 does not fit: this image has \d+ tokens of \d+ tiles"),
        ("/merge tokens=9999", "tokens=9999 does not fit"),
        ("/merge tokens=40 newline=none", "unknown key 'newline' .did you mean 'newlines'"),
        ("/merge newlines=some", "newlines='some' is not allowed"), ("/merge 40", "'40' is not key=value"),
        ("/merge temporal=true", "temporal=True is not allowed: a LlavaNext"), ("/merge", "/merge needs K=V"),
        ("/video none.mp4", "none.mp4 does not exist|videos need PyAV"), ("/video", "/video needs FILE"),
    ],
)  # fmt: skip
def test_lines_that_do_not_fit_change_nothing(line, reason):
    config = MergeConfig(ratio=0.8)
    model, processor = make("next-llama3", config)
    terminal = Terminal(Conversation(model, processor, 2), config, io.StringIO())
    terminal.conversation.add_image(noise(60, 100))
    with pytest.raises(ValueError, match=reason):
        terminal.run([line], interactive=False)
    assert terminal.config == config and MergeConfig.from_dict(model.config.token_merging) == config
    terminal.run(["what is this"], interactive=False)
    assert len(terminal.record) == 1


@pytest.fixture
def film(tmp_path):
    """A video file of ten frames."""
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'llava-pitome[video]'")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(10):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (25 * i, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return tmp_path / "a.mp4"


@pytest.mark.parametrize("kind", OF_VIDEOS)
def test_the_command_answers_about_a_video(kind, film, tmp_path, monkeypatch, capsys):
    model, processor = make(kind)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"what is this\n/reset\n/video {film}\nwhat\n"))
    words = ["--model", str(tmp_path / "model"), "--video", str(film), "--frames", "4", "--dtype", "float32"]
    assert main(["chat", *words, "--tokens-per-frame", "3", "--max-new-tokens", "2"]) == 0
    config = MergeConfig(tokens_per_frame=3)
    count, unmerged = (sum(counts_of(hf_llava.find(model)).videos(c, [4])) for c in (config, None))
    out = capsys.readouterr().out
    assert out.count(f"[{count} image tokens of {unmerged} · ") == 2
    assert f"{film}: 4 frames of 64 x 48 pixels, for the next question" in out


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--video", "VIDEO"], "which takes no videos; LLaVA-NeXT-Video"),
        (["--video", "VIDEO", "--image", "a.png"], "--image and --video are not allowed together"),
        (["--video", "VIDEO", "--frames", "0"], "a whole number from 1"),
    ],
)
def test_the_command_refuses_before_a_model_is_loaded(film, monkeypatch, capsys, words, reason):
    monkeypatch.setattr("llava_pitome.cli.chat.command.load", lambda *_: pytest.fail("a model was loaded"))
    try:
        status = main(["chat", *(word.replace("VIDEO", str(film)) for word in words)])
    except SystemExit as error:  # argparse
        status = error.code
    assert status == 2 and reason in capsys.readouterr().err
