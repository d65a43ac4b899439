"""LLaVA's data: rows read one at a time, broken ones told, and loss on the assistant's words alone."""

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.embedded.questions import ask
from llava_pitome.embedded.scenes import scene

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "train"))

import embedded_data  # noqa: E402
import encoding  # noqa: E402
import export  # noqa: E402
from broken import Broken  # noqa: E402
from conversations import BrokenRow, read  # noqa: E402
from data import Collate, Conversations  # noqa: E402
from expand import expand  # noqa: E402
from records import Records  # noqa: E402

PATCHES = 196
AWKWARD = [
    {"id": 1, "conversations": [{"from": "human", "value": 'a "quoted" ] } [ { \\ word\n'}]},
    {"id": "ü €", "image": None, "conversations": []},
    {"id": "nested", "more": [[1, {"x": []}], "]"], "conversations": [{}]},
]


def said(*words: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": w} for i, w in enumerate(words)]


@pytest.fixture(scope="module")
def embedded():
    return load("embedded", dtype=torch.float32)


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (50, 40), colour).save(tmp_path / name)
    return tmp_path


def written(folder: Path, rows: list, lines: bool = False) -> Records:
    file = folder / "rows.json"
    file.write_text("\n\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1))
    return Records(file)


def dataset(folder: Path, rows: list, processor, longest: int = 2048, tolerated: int = 0) -> Conversations:
    broken = Broken(tolerated, folder / "broken.jsonl")
    return Conversations(written(folder, rows), folder, processor, PATCHES, longest, broken)


# Records


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_of_an_array_are_those_of_json(tmp_path, indent, ascii_only):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(AWKWARD, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    found = Records(file)
    assert [found[i] for i in range(len(found))] == AWKWARD
    again = pickle.loads(pickle.dumps(found))  # as a loading process gets it
    assert [again[i] for i in range(len(again))] == AWKWARD


def test_rows_of_lines_are_those_of_json(tmp_path):
    found = written(tmp_path, AWKWARD, lines=True)
    assert [found[i] for i in range(len(found))] == AWKWARD


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("[]", "holds no rows"),
        ("[{}, {", "ends within its array"),
        ("[{}, 3, {}]", "is no array of objects: byte 5 begins '3, '"),
        ("[{}] more", "begins 'more'"),
    ],
)
def test_a_file_that_is_not_whole_raises(tmp_path, text, why):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="data=") as error:
        Records(file)
    assert why in str(error.value)


def test_a_file_that_is_not_there_raises(tmp_path):
    with pytest.raises(ValueError, match="is no file"):
        Records(tmp_path / "none.json")


# Rows


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([], 'it has no list "conversations"'),
        ({"conversations": []}, 'it has no list "conversations"'),
        ({"conversations": ["hello"]}, "a turn is from None"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "a turn is from 'cat'; allowed are human, user"),
        ({"conversations": [{"from": "human", "value": 3}]}, "a turn says 3, which is no text"),
        ({"conversations": said("x")}, "the assistant answers nothing"),
        ({"conversations": said("x") + said("y", "z")}, "two turns of the user after each other"),
        (
            {"image": "a.png", "conversations": said("x", "<image> y")},
            "<image> in the words of the assistant",
        ),
        (
            {"image": ["a.png"] * 2, "conversations": said("<image> x", "y")},
            "1 <image> in its words, but 2 im",
        ),
        ({"image": "a.png", "conversations": said("x", "y")}, "0 <image> in its words, but 1 images"),
        ({"image": "none.png", "conversations": said("<image> x", "y")}, "none.png is missing"),
        ({"image": 3, "conversations": said("<image> x", "y")}, '"image" is 3; it must be a name or a list'),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "a turn is from ['human']"),
        ({"conversations": said("x", "\ud83d")}, "half of a surrogate pair"),
        ({"image": "data:" + "a" * 5000, "conversations": said("<image> x", "y")}, "is missing"),
        ({"image": "\ud83d.png", "conversations": said("<image> x", "y")}, "is missing"),
    ],
)
def test_a_broken_row_says_why(folder, row, why):
    with pytest.raises(BrokenRow) as error:
        read(row, folder)
    assert why in str(error.value)


def test_a_row_is_what_llava_makes_of_it(folder):
    turns = [
        {"from": "gpt", "value": "Hello!"},
        *said("What is\n<image>", " A cat. ", "And <image>?", "A dog.", "So?"),
    ]
    talk = read({"image": ["a.png", "b.png"], "conversations": turns}, folder)
    assert talk.images == (folder / "a.png", folder / "b.png")
    assert talk.turns == (
        ("user", "What is", 1), ("assistant", "A cat.", 0), ("user", "And ?", 1), ("assistant", "A dog.", 0)
    )  # fmt: skip


def test_a_marker_in_a_row_without_pictures_is_a_word(folder, embedded):
    """As in LLaVA: rows about HTML are no rows about pictures."""
    found = dataset(folder, [{"conversations": said("what is <image>?", "a tag, <image>")}], embedded[1])[0]
    assert embedded[1].image_token_id not in found["input_ids"] and "pixel_values" not in found


def test_broken_rows_are_told_with_their_index_and_left_out_up_to_a_limit(folder, embedded, caplog):
    good = {"conversations": said("<image>\nx", "red"), "image": "a.png"}
    rows = [good, {"conversations": []}, good, good | {"image": "none.png"}]
    found = dataset(folder, rows, embedded[1], tolerated=2)
    assert found.sound == [0, 2] and len(found.broken) == 2
    assert "row 1 is left out" in caplog.text and "row 3 is left out: image" in caplog.text
    named = [json.loads(line) for line in (folder / "broken.jsonl").read_text().splitlines()]
    assert [row["row"] for row in named] == [1, 3] and "none.png is missing" in named[1]["why"]
    with pytest.raises(ValueError, match=r"2 rows are broken, skip_broken=1 are allowed: row 1: it has no"):
        dataset(folder, rows, embedded[1], tolerated=1)
    (folder / "broken.jsonl").unlink()
    with pytest.raises(ValueError, match=r"every row of data=.* is broken: row 0"):
        dataset(folder, rows[1:2], embedded[1], tolerated=5)


def test_a_picture_that_cannot_be_read_is_found_when_it_is_reached(folder, embedded):
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    row = {"conversations": said("<image>\nx", "red"), "image": "cut.png"}
    rows = [row | {"image": "a.png"}, row, row | {"image": "b.png"}]
    found = dataset(folder, rows, embedded[1], tolerated=1)
    assert torch.equal(found[1]["pixel_values"], found[2]["pixel_values"])  # the next one stands in
    assert 1 in found.broken and "cannot be read" in found.broken.told()
    (folder / "broken.jsonl").unlink()
    with pytest.raises(ValueError, match=r"row 1: image .*cut.png cannot be read"):
        dataset(folder, rows, embedded[1])[1]


def test_what_every_process_finds_is_named_once(folder, embedded, tmp_path):
    rows = written(folder, [{"conversations": []}, {"conversations": said("x", "y")}])
    for first in (False, True, False):
        broken = Broken(1, tmp_path / "broken.jsonl", first)
        found = Conversations(rows, folder, embedded[1], PATCHES, 100, broken)
        assert found.sound == [1] and len(found.broken) == 1
    assert len((tmp_path / "broken.jsonl").read_text().splitlines()) == 1


def test_rows_are_as_long_as_their_text_and_the_pictures_that_arrive(folder, embedded):
    rows = [
        {"conversations": said("x" * 50, "y" * 30)},
        {"conversations": said("\N{CJK UNIFIED IDEOGRAPH-732B}" * 20, "y" * 20)},
        {"image": "a.png", "conversations": said("<image> x", "yyy")},
    ]
    assert dataset(folder, rows, embedded[1]).lengths == [20, 20, PATCHES + 1]
    broken = Broken(0, folder / "broken.jsonl")
    few = Conversations(written(folder, rows), folder, embedded[1], PATCHES, 100, broken, picture=5)
    assert few.lengths == [20, 20, 6]


def test_a_processor_without_a_chat_template_is_found_before_training(folder, embedded):
    processor = copy.copy(embedded[1])
    processor.chat_template = None
    with pytest.raises(ValueError, match="template"):
        dataset(folder, [{"conversations": said("x", "y")}], processor)


def test_processes_count_broken_rows_together(tmp_path):
    one, two = Broken(2, tmp_path / "broken.jsonl"), Broken(2, tmp_path / "broken.jsonl")
    one.add(4, BrokenRow("x"))
    two.add(4, BrokenRow("x"))
    two.add(9, BrokenRow("y"))
    one.check()
    assert len(one) == 2
    one.add(5, BrokenRow("z"))
    with pytest.raises(ValueError, match=r"3 rows .* allowed: row 4: x; row 5: z; row 9: y"):
        two.check()


# Labels


def spoken(batch: dict, row: int, tokenizer) -> list[str]:
    """The words that carry loss, run by run."""
    runs, labels = [[]], batch["labels"][row].tolist()
    for label in labels:
        if label == encoding.IGNORED:
            runs += [[]] if runs[-1] else []
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


def test_only_the_assistants_words_carry_loss(folder, embedded):
    """And the ends of its turns, without which nobody would stop."""
    processor = embedded[1]
    rows = [
        {
            "image": "a.png",
            "conversations": said("<image>\nwhat color is the circle?", "red", "how many?", "two"),
        },
        {"conversations": said("is there a square?", "yes")},
        {"image": ["a.png", "b.png"], "conversations": said("<image> left of <image>?", "no")},
    ]
    found = dataset(folder, rows, processor)
    batch = Collate(processor)([found[i] for i in range(3)])
    ends = processor.tokenizer.eos_token
    answers = [[a.strip() for a in spoken(batch, i, processor.tokenizer)] for i in range(3)]
    assert answers == [[f"red{ends}", f"two{ends}"], [f"yes{ends}"], [f"no{ends}"]]
    assert batch["pixel_values"].shape == (3, 3, 112, 112)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [1, 0, 2]


def test_tokens_are_those_that_the_embedded_model_was_made_with(tmp_path, embedded):
    processor = embedded[1]
    file = export.write(tmp_path, scenes=3, turns=embedded_data.TURNS)
    found = Conversations(Records(file), tmp_path, processor, PATCHES, 4096, Broken(0, tmp_path / "broken"))
    batch = Collate(processor)([found[i] for i in range(3)])
    longer = expand(batch, processor.image_token_id, PATCHES, processor.tokenizer.pad_token_id)
    asked = [ask(scene(seed), embedded_data.TURNS) for seed in range(export.SEEDS, export.SEEDS + 3)]
    made = embedded_data.conversations(asked, processor.tokenizer)
    assert torch.equal(longer["input_ids"], made["input_ids"])
    assert torch.equal(longer["labels"], made["labels"])


class Forgetful:
    """A processor whose template leaves out the end of sequence, as that of llava-hf/llava-1.5-7b-hf does."""

    def __init__(self, processor):
        self.tokenizer, self.image_token_id = processor.tokenizer, processor.image_token_id

    def apply_chat_template(self, messages, add_generation_prompt=False):
        text = ""
        for message in messages:
            words = "".join("<image>\n" if c["type"] == "image" else c["text"] for c in message["content"])
            text += f"{message['role'].upper()}: {words} "
        return text + ("ASSISTANT:" if add_generation_prompt else "")


class Rewriting(Forgetful):
    """A processor whose template writes how many turns there are."""

    def apply_chat_template(self, messages, add_generation_prompt=False):
        return f"{len(messages)} turns " + super().apply_chat_template(messages, add_generation_prompt)


def test_answers_end_where_a_template_forgets_it(folder, embedded):
    talk = read({"conversations": said("one?", "yes", "two?", "no")}, folder)
    found = encoding.write(Forgetful(embedded[1]), talk)
    assert found.text == "USER: one? ASSISTANT: yes</s>USER: two? ASSISTANT: no</s>"
    assert [found.text[a:b] for a, b in found.answers] == [" yes</s>", " no</s>"]


def test_a_template_that_cannot_be_followed_raises(folder, embedded):
    talk = read({"conversations": said("one?", "yes", "two?", "no")}, folder)
    with pytest.raises(ValueError, match="writes earlier turns anew"):
        encoding.write(Rewriting(embedded[1]), talk)


def test_what_is_too_long_is_cut_with_its_pictures(folder, embedded):
    processor = embedded[1]
    row = {"image": ["a.png", "b.png"], "conversations": said("<image>\nx", "red", "y <image>", "blue")}
    talk = read(row, folder)
    whole, labels = encoding.encode(processor, talk, 2048, PATCHES)
    length = len(whole) + 2 * (PATCHES - 1)
    assert encoding.encode(processor, talk, length, PATCHES) == (whole, labels)
    assert encoding.encode(processor, talk, length - 1, PATCHES) == (whole[:-1], labels[:-1])
    cut = dataset(folder, [row], processor, longest=300)[0]
    assert len(cut["pixel_values"]) == 1 and (cut["input_ids"] == processor.image_token_id).sum() == 1
    assert spoken({"labels": cut["labels"][None]}, 0, processor.tokenizer) == [" red</s>"]
    assert "pixel_values" not in dataset(folder, [row], processor, longest=100)[0]


# Batches


@pytest.mark.parametrize("config", [MergeConfig(ratio=0.9), MergeConfig(ratio=1.0), MergeConfig(tokens=20)])
def test_a_batch_expands_to_what_the_processor_writes(folder, embedded, config):
    model, processor = embedded
    prompts = ["<image>\nUSER: a", "b", "<image> c <image> d"]
    pictures = [Image.open(folder / name) for name in ("a.png", "b.png")]
    with merge_tokens(model, config, processor):
        processor.tokenizer.padding_side = "right"
        made = processor(text=prompts, images=[pictures[:1], [], pictures], padding=True, return_tensors="pt")
        processor.tokenizer.padding_side = "left"
    short = processor.tokenizer(prompts)["input_ids"]
    batch = Collate(processor)(
        [
            {"input_ids": torch.tensor(i), "labels": torch.tensor(i), "pixel_values": torch.zeros(1, 3, 2, 2)}
            for i in short
        ]
    )
    found = expand(
        batch, processor.image_token_id, config.tokens_at(PATCHES, 11), processor.tokenizer.pad_token_id
    )
    assert torch.equal(found["input_ids"], made["input_ids"])
    assert torch.equal(found["attention_mask"], made["attention_mask"])
    assert torch.equal(
        found["labels"][made["attention_mask"].bool()], made["input_ids"][made["attention_mask"].bool()]
    )


@pytest.mark.parametrize("config", [None, MergeConfig(ratio=0.9), MergeConfig.recipe("best", tokens=20)])
def test_the_grey_picture_of_words_alone_changes_nothing(folder, embedded, config):
    model, processor = embedded
    found = dataset(folder, [{"conversations": said("is there a square?", "yes")}], processor)
    item = found[0]
    batch = Collate(processor)([item])
    assert batch["pixel_values"].shape[0] == 1
    with merge_tokens(model, config or MergeConfig(ratio=1.0)), torch.no_grad():
        tokens = (config or MergeConfig(ratio=1.0)).tokens_at(PATCHES, 11)
        longer = expand(batch, processor.image_token_id, tokens, processor.tokenizer.pad_token_id)
        labels = longer.pop("labels")
        logits = model(**longer).logits
    with torch.no_grad():
        plain = model(input_ids=item["input_ids"][None]).logits
    torch.testing.assert_close(logits[:, : plain.shape[1]], plain, rtol=1e-4, atol=1e-4)
    assert (labels[0, len(item["labels"]) :] == encoding.IGNORED).all()
    assert torch.equal(labels[0, : len(item["labels"])], item["labels"])
