"""LLaVA's data: rows decoded one at a time, broken ones left out, labels on the assistant's turns alone."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.embedded.questions import ask
from llava_pitome.embedded.scenes import scene
from train import export
from train.collator import Collator, expand
from train.conversation import IGNORE_INDEX, BrokenRow, encode, parse_row, render
from train.data import ConversationDataset
from train.embedded.data import TURNS, encode_conversations
from train.image_counts import UNMERGED, ImageCounts
from train.rows import BrokenRows, JsonRows

PATCHES = 196
COUNTS = ImageCounts(PATCHES, layers=11)
AWKWARD = [
    {"id": 1, "conversations": [{"from": "human", "value": 'a "quoted" ] } [ { \\ word\n'}]},
    {"id": "ü €", "image": None, "conversations": []},
    {"id": "nested", "more": [[1, {"x": []}], "]"], "conversations": [{}]},
]


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def row(*texts: str, **fields) -> dict:
    return {"conversations": turns(*texts)} | fields


@pytest.fixture(scope="module")
def embedded():
    return load("embedded", dtype=torch.float32)


@pytest.fixture
def folder(tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (50, 40), color).save(tmp_path / name)
    return tmp_path


def json_rows(folder: Path, rows: list) -> JsonRows:
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    return JsonRows(file)


def dataset(
    folder: Path, rows: list, processor, max_length=2048, allowed=0, configs=(UNMERGED,)
) -> ConversationDataset:
    broken = BrokenRows(allowed, folder / "broken.jsonl")
    return ConversationDataset(
        json_rows(folder, rows), folder, processor, COUNTS, max_length, broken, configs
    )


# Rows of a file


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(AWKWARD, ensure_ascii=False),
        json.dumps(AWKWARD, indent=2),
        "\n\n".join(map(json.dumps, AWKWARD)),
        "\n".join(json.dumps(found, ensure_ascii=False) for found in AWKWARD) + "\n",
    ],
    ids=["array", "indented array", "lines", "unicode lines"],
)
def test_rows_are_those_of_json(tmp_path, text):
    (tmp_path / "rows").write_text(text, encoding="utf-8")
    rows = JsonRows(tmp_path / "rows")
    assert list(rows) == AWKWARD
    assert list(pickle.loads(pickle.dumps(rows))) == AWKWARD  # for worker processes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a file"),
        ("", "is empty"),
        ("[]", "has no rows"),
        ("[{}, {", "ends within its array"),
        ("[{}, 3, {}]", "is not an array of objects: at byte 5 is '3, '"),
        ("[{}] more", "is 'more'"),
    ],
)
def test_malformed_file_raises(tmp_path, text, message):
    file = tmp_path / "rows.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match="data=") as error:
        JsonRows(file)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], 'it has no list "conversations"'),
        ({"conversations": []}, 'it has no list "conversations"'),
        ({"conversations": ["hello"]}, "a turn is from None"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "a turn is from 'cat'; allowed are human, user"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "a turn is from ['human']"),
        ({"conversations": [{"from": "human", "value": 3}]}, "the value of a turn is 3, which is not text"),
        ({"conversations": turns("x") + turns("y", "z")}, "two consecutive turns of the user"),
        (row("x"), "it has no answer of the assistant"),
        (row("x", "<image> y", image="a.png"), "<image> in a turn of the assistant"),
        (row("<image> x", "y", image=["a.png"] * 2), "1 <image> in its text, but 2 images"),
        (row("x", "y", image="a.png"), "0 <image> in its text, but 1 images"),
        (row("<image> x", "y", image="none.png"), "none.png is missing"),
        (row("<image> x", "y", image=3), '"image" is 3; it must be a name or a list'),
        (row("x", "\ud83d"), "half of a surrogate pair"),
        (row("<image> x", "y", image="data:" + "a" * 5000), "is missing"),
        (row("<image> x", "y", image="\ud83d.png"), "is missing"),
        (
            row("<video> x", "y", video="a.mp4"),
            "\"video\" is 'a.mp4'; train.run trains on images and text alone",
        ),
    ],
)
def test_broken_row_raises(folder, broken, message):
    with pytest.raises(BrokenRow) as error:
        parse_row(broken, folder)
    assert message in str(error.value)


def test_row_is_parsed_as_llava_does(folder):
    texts = ("What is\n<image>", " A cat. ", "And <image>?", "A dog.", "So?")
    found = {"image": ["a.png", "b.png"], "conversations": [{"from": "gpt", "value": "Hi!"}, *turns(*texts)]}
    conversation = parse_row(found, folder)
    assert conversation.images == (folder / "a.png", folder / "b.png")
    image = {"type": "image"}
    assert [(m["role"], m["content"]) for m in conversation.messages] == [
        ("user", [image, {"type": "text", "text": "What is"}]),
        ("assistant", [{"type": "text", "text": "A cat."}]),
        ("user", [image, {"type": "text", "text": "And ?"}]),
        ("assistant", [{"type": "text", "text": "A dog."}]),
    ]


def test_placeholder_in_a_row_without_images_is_text(folder, embedded):
    """As in LLaVA: such rows are about HTML."""
    item = dataset(folder, [row("what is <image>?", "a tag, <image>")], embedded[1])[0]
    assert embedded[1].image_token_id not in item["input_ids"] and "pixel_values" not in item


@pytest.mark.parametrize("images", [[], ["a.png"]])
def test_a_placeholder_of_videos_is_text(folder, images):
    found = row("<image> " * len(images) + "what is <video>?", "a tag, <video>", image=images)
    texts = [message["content"][-1]["text"] for message in parse_row(found, folder).messages]
    assert texts == ["what is < video >?", "a tag, < video >"]


# Broken rows


def test_broken_rows_are_recorded_and_left_out_up_to_a_limit(folder, embedded, caplog):
    good, missing = row("<image>\nx", "red", image="a.png"), row("<image>\nx", "red", image="none.png")
    rows = [good, {"conversations": []}, good, missing]
    found = dataset(folder, rows, embedded[1], allowed=2)
    assert found.indices == [0, 2] and len(found.broken) == 2
    assert "row 1 is left out" in caplog.text and "row 3 is left out: image" in caplog.text
    recorded = [json.loads(line) for line in (folder / "broken.jsonl").read_text().splitlines()]
    assert [line["row"] for line in recorded] == [1, 3] and "none.png is missing" in recorded[1]["why"]
    with pytest.raises(ValueError, match=r"2 rows are broken, skip_broken=1 are allowed: row 1: it has no"):
        dataset(folder, rows, embedded[1], allowed=1)
    (folder / "broken.jsonl").unlink()
    with pytest.raises(ValueError, match=r"every row of data=.* is broken: row 0"):
        dataset(folder, rows[1:2], embedded[1], allowed=5)


def test_malformed_line_is_one_broken_row(folder, embedded):
    file = folder / "rows.jsonl"
    file.write_text(f'{json.dumps(row("x", "y"))}\n{{"conversations": \n')
    broken = BrokenRows(1, folder / "broken.jsonl")
    found = ConversationDataset(JsonRows(file), folder, embedded[1], COUNTS, 100, broken)
    assert found.indices == [0] and "row 1: it is not JSON" in str(broken)


def test_unreadable_image_is_found_when_its_row_is_read(folder, embedded):
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    rows = [row("<image>\nx", "red", image=f"{name}.png") for name in ("a", "cut", "b")]
    found = dataset(folder, rows, embedded[1], allowed=1)
    assert torch.equal(found[1]["pixel_values"], found[2]["pixel_values"])  # the next row replaces it
    assert 1 in found.broken and "cannot be read" in str(found.broken)
    (folder / "broken.jsonl").unlink()
    with pytest.raises(ValueError, match=r"row 1: image .*cut.png cannot be read"):
        dataset(folder, rows, embedded[1])[1]


def test_broken_rows_that_every_process_finds_are_recorded_once(folder, embedded):
    for _ in range(3):
        found = dataset(folder, [{"conversations": []}, row("x", "y")], embedded[1], allowed=1)
        assert found.indices == [1] and len(found.broken) == 1
    assert len((folder / "broken.jsonl").read_text().splitlines()) == 1


def test_processes_share_the_limit_of_broken_rows(tmp_path):
    one, two = BrokenRows(2, tmp_path / "broken.jsonl"), BrokenRows(2, tmp_path / "broken.jsonl")
    one.add(4, BrokenRow("x"))
    two.add(4, BrokenRow("x"))
    two.add(9, BrokenRow("y"))
    one.check()
    assert len(one) == 2
    one.add(5, BrokenRow("z"))
    with pytest.raises(ValueError, match=r"3 rows .* allowed: row 4: x; row 5: z; row 9: y"):
        two.check()


def test_lengths_count_text_and_merged_images(folder, embedded):
    rows = [
        row("x" * 50, "y" * 30),
        row("\N{CJK UNIFIED IDEOGRAPH-732B}" * 20, "y" * 20),
        row("<image> x", "yyy", image="a.png"),
    ]
    assert dataset(folder, rows, embedded[1]).lengths == [20, 20, PATCHES + 1]
    assert dataset(
        folder, rows, embedded[1], configs=[MergeConfig(tokens=5), MergeConfig(tokens=9)]
    ).lengths == [20, 20, 8]


# Labels


def labelled(labels: torch.Tensor, tokenizer) -> list[str]:
    """The text of every run of labels."""
    runs: list[list[int]] = [[]]
    for label in labels.tolist():
        if label == IGNORE_INDEX:
            runs += [[]] if runs[-1] else []
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


def test_labels_are_answers_with_their_end_of_sequence(folder, embedded):
    processor = embedded[1]
    rows = [
        row("<image>\nwhat color is the circle?", "red", "how many?", "two", image="a.png"),
        row("is there a square?", "yes"),
        row("<image> left of <image>?", "no", image=["a.png", "b.png"]),
    ]
    found = dataset(folder, rows, processor)
    batch = Collator(processor)([found[i] for i in range(3)])
    eos = processor.tokenizer.eos_token
    answers = [[a.strip() for a in labelled(labels, processor.tokenizer)] for labels in batch["labels"]]
    assert answers == [[f"red{eos}", f"two{eos}"], [f"yes{eos}"], [f"no{eos}"]]
    assert batch["pixel_values"].shape == (3, 3, 112, 112)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [1, 0, 2]


def test_tokens_are_those_the_embedded_model_was_trained_on(tmp_path, embedded):
    processor = embedded[1]
    file = export.write(tmp_path, scenes=3, turns=TURNS)
    found = dataset(tmp_path, json.loads(file.read_text()), processor, max_length=4096)
    batch = Collator(processor)([found[i] for i in range(3)])
    expanded = expand(batch, processor.image_token_id, PATCHES, processor.tokenizer.pad_token_id)
    questions = [ask(scene(export.FIRST_SEED + i), TURNS) for i in range(3)]
    for key, expected in encode_conversations(questions, processor.tokenizer).items():
        assert torch.equal(expanded[key], expected), key


class WithoutEos:
    """A processor whose template omits the end of sequence, as that of llava-hf/llava-1.5-7b-hf."""

    def __init__(self, processor):
        self.tokenizer, self.image_token_id = processor.tokenizer, processor.image_token_id

    def apply_chat_template(self, messages, add_generation_prompt=False):
        text = ""
        for message in messages:
            parts = ("<image>\n" if c["type"] == "image" else c["text"] for c in message["content"])
            text += f"{message['role'].upper()}: {''.join(parts)} "
        return text + ("ASSISTANT:" if add_generation_prompt else "")


class CountingTurns(WithoutEos):
    """A processor whose template starts with the number of turns."""

    def apply_chat_template(self, messages, add_generation_prompt=False):
        return f"{len(messages)} turns " + super().apply_chat_template(messages, add_generation_prompt)


def test_answers_end_with_eos_where_the_template_omits_it(folder, embedded):
    conversation = parse_row(row("one?", "yes", "two?", "no"), folder)
    text, answers = render(WithoutEos(embedded[1]), conversation)
    assert text == "USER: one? ASSISTANT: yes</s>USER: two? ASSISTANT: no</s>"
    assert [text[start:end] for start, end in answers] == [" yes</s>", " no</s>"]


def test_unusable_chat_template_raises_before_training(folder, embedded):
    conversation = parse_row(row("one?", "yes", "two?", "no"), folder)
    with pytest.raises(ValueError, match="renders earlier turns differently"):
        render(CountingTurns(embedded[1]), conversation)
    processor = copy.copy(embedded[1])
    processor.chat_template = None
    with pytest.raises(ValueError, match="template"):
        dataset(folder, [row("x", "y")], processor)


def test_long_rows_are_cut_off_with_their_images(folder, embedded):
    processor = embedded[1]
    found = row("<image>\nx", "red", "y <image>", "blue", image=["a.png", "b.png"])
    conversation = parse_row(found, folder)
    ids, labels = encode(processor, conversation, 2048, [PATCHES] * 2)
    length = len(ids) + 2 * (PATCHES - 1)
    assert encode(processor, conversation, length, [PATCHES] * 2) == (ids, labels)
    assert encode(processor, conversation, length - 1, [PATCHES] * 2) == (ids[:-1], labels[:-1])
    cut = dataset(folder, [found], processor, max_length=300)[0]
    assert len(cut["pixel_values"]) == 1 and (cut["input_ids"] == processor.image_token_id).sum() == 1
    assert labelled(cut["labels"], processor.tokenizer) == [" red</s>"]
    assert "pixel_values" not in dataset(folder, [found], processor, max_length=100)[0]


# Batches


@pytest.mark.parametrize("config", [MergeConfig(ratio=0.9), MergeConfig(ratio=1.0), MergeConfig(tokens=20)])
def test_expanded_batch_is_that_of_the_processor(folder, embedded, config):
    model, processor = embedded
    tokenizer = processor.tokenizer
    prompts = ["<image>\nUSER: a", "b", "<image> c <image> d"]
    images = [Image.open(folder / name) for name in ("a.png", "b.png")]
    with merge_tokens(model, config, processor):
        tokenizer.padding_side = "right"
        expected = processor(text=prompts, images=[images[:1], [], images], padding=True, return_tensors="pt")
        tokenizer.padding_side = "left"
    pixels = torch.zeros(1, 3, 2, 2)
    rows = [torch.tensor(ids) for ids in tokenizer(prompts)["input_ids"]]
    batch = Collator(processor)([{"input_ids": r, "labels": r, "pixel_values": pixels} for r in rows])
    tokens = config.tokens_at(PATCHES, 11)
    expanded = expand(batch, processor.image_token_id, tokens, tokenizer.pad_token_id)
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(expanded[key], expected[key])
    mask = expected["attention_mask"].bool()
    assert torch.equal(expanded["labels"][mask], expected["input_ids"][mask])


@pytest.mark.parametrize("config", [None, MergeConfig(ratio=0.9), MergeConfig.recipe("best", tokens=20)])
def test_grey_image_of_a_text_batch_changes_nothing(folder, embedded, config):
    model, processor = embedded
    item = dataset(folder, [row("is there a square?", "yes")], processor)[0]
    batch, config = Collator(processor)([item]), config or MergeConfig(ratio=1.0)
    assert batch["pixel_values"].shape[0] == 1
    tokens = config.tokens_at(PATCHES, 11)
    expanded = expand(batch, processor.image_token_id, tokens, processor.tokenizer.pad_token_id)
    labels, length = expanded.pop("labels"), len(item["labels"])
    with torch.no_grad():
        with merge_tokens(model, config):
            logits = model(**expanded).logits
        plain = model(input_ids=item["input_ids"][None]).logits
    torch.testing.assert_close(logits[:, :length], plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(labels[0, :length], item["labels"]) and (labels[0, length:] == IGNORE_INDEX).all()
