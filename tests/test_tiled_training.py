"""Training kin of LLaVA-1.5 with train.run: placeholders, labels, losses, budgets that do not fit."""

import math
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from tiled import noise
from tiled_runs import (
    ALL,
    ROWS,
    SIZES,
    SOME,
    VIP,
    batch_of,
    loss_of,
    randomize,
    row,
    save_all,
    trained,
    trainer_of,
    words_of,
)

from llava_pitome import MergeConfig, load, merge_tokens
from train.conversation import IGNORE_INDEX, parse_row, render
from train.run import main
from train.trainer import MergingTrainer, answer_logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with images and a checkpoint of every kind."""
    return save_all(tmp_path_factory.mktemp("tiled"))


OTHERS = (
    "ratio=0.7",
    'merging={"ratio": 0.9, "decoder": {"1": 0.5}}',
    'merging={"prefix": 0.6, "llm_proportional": true, "positions": "original"}',
)

# Placeholders and labels


@pytest.mark.parametrize("kind", ALL)
def test_placeholders_are_those_of_the_processor_and_labels_are_answers(kind, folder, tmp_path):
    trainer = trainer_of(words_of(folder, kind, tmp_path, "tokens=30"))
    batch, processor = batch_of(trainer), trainer.processing_class
    names = [[name.removesuffix(".png") for name in r["image"]] for r in ROWS]
    images = [[noise(*SIZES[n], list(SIZES).index(n)) for n in found] for found in names]
    texts = [render(processor, parse_row(r, folder))[0] for r in ROWS]
    processor.tokenizer.padding_side = "right"
    tiled = [MergeConfig(tokens_per_tile=9), MergeConfig(tokens=30, newlines="none")]
    shared = [MergeConfig(ratio=0.8), MergeConfig(tokens=30), MergeConfig(ratio=1.0)]
    for config in shared if kind == VIP else shared + tiled:
        trainer.set_merging(None)
        expanded = trainer.expand(batch, config)
        labels = expanded.pop("labels")
        with merge_tokens(trainer.model, config, processor), torch.no_grad():
            expected = processor(
                text=texts, images=[x for x in images if x], padding=True, return_tensors="pt",
                add_special_tokens=False,
            )  # fmt: skip
            assert torch.equal(expanded["input_ids"], expected["input_ids"])
            assert torch.equal(expanded["attention_mask"], expected["attention_mask"])
            assert torch.equal(trainer.model(**expanded).logits, trainer.model(**expected).logits)
        found = [[WORDS[i] for i in line.tolist() if i != IGNORE_INDEX] for line in labels]
        assert found == [[*r["conversations"][1]["value"].split(), "</s>"] for r in ROWS]


@pytest.mark.parametrize("kind", SOME)
def test_a_grey_image_of_text_alone_fits_every_budget_and_changes_nothing(kind, folder, tmp_path):
    for i, rows in enumerate(([ROWS[2]], [ROWS[2], ROWS[0]])):
        amount = "tokens=33" if kind == VIP else f"tokens={(60, 90)[i]}"
        trainer = trainer_of(words_of(folder, kind, tmp_path / str(i), amount, rows=rows))
        item = trainer.train_dataset[0]
        batch = trainer.data_collator([item])
        expanded = trainer.expand(batch, trainer.config_at(0))
        labels, length = expanded.pop("labels"), len(item["labels"])
        plain = {"input_ids": item["input_ids"][None]}
        with torch.no_grad():
            expected = trainer.model(**plain).logits
            trainer.set_merging(trainer.config_at(0))
            found = trainer.model(**expanded).logits[:, :length]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert torch.equal(labels[0, :length], item["labels"])
        assert (labels[0, length:] == IGNORE_INDEX).all()
        assert expanded["input_ids"].shape[1] == length + trainer.config_at(0).tokens


@pytest.mark.parametrize("kind", SOME)
def test_lengths_are_means_over_budgets_and_images_count_by_their_size(kind, folder, tmp_path):
    plain = trainer_of(words_of(folder, kind, tmp_path / "a", "ratio=1.0")).train_dataset
    fewer = trainer_of(words_of(folder, kind, tmp_path / "b", "tokens=24,30")).train_dataset
    text = [len(f"{turns[0]['value']}{turns[1]['value']}".replace("<image>", "")) // 4
            for turns in (r["conversations"] for r in ROWS)]  # fmt: skip
    assert fewer.lengths == [n + 27 * len(r["image"]) for n, r in zip(text, ROWS)]
    placeholders = [int((plain[i]["input_ids"] == 4).sum()) for i in range(4)]
    assert placeholders == [1, 2, 0, 1]
    if kind == VIP:
        assert plain.lengths == [n + 36 * count for n, count in zip(text, placeholders)]
    else:
        assert plain.lengths[0] != plain.lengths[3] and plain.lengths[2] == text[2]


@pytest.mark.parametrize("kind", ["next-vicuna", "onevision"])
def test_long_rows_are_cut_off_with_their_images(kind, folder, tmp_path):
    """OneVision's images become tiles where they are alone: a row does not end between two."""
    given = [row("two", "red dog", "tall", "square")]
    whole = trainer_of(words_of(folder, kind, tmp_path / "a", "ratio=1.0", rows=given))
    item, batch = whole.train_dataset[0], whole.expand(batch_of(whole), MergeConfig(ratio=1.0))
    length = batch["input_ids"].shape[1]
    first = item["input_ids"].tolist().index(4)
    images = whole._counts.of_batch(MergeConfig(ratio=1.0), batch)
    for i, (most, left) in enumerate(
        [(length, 2), (length - 1, 2), (first + sum(images) - 1, 1), (first + images[0] - 1, 0)]
    ):
        cut = trainer_of(
            words_of(folder, kind, tmp_path / f"b{i}", "ratio=0.9", f"max_length={most}", rows=given)
        )
        found = cut.train_dataset[0]
        left = 0 if kind == "onevision" and left == 1 else left
        assert (found["input_ids"] == 4).sum() == left == len(found.get("image_sizes", []))
        assert cut.expand(cut.data_collator([found]), MergeConfig(ratio=1.0))["input_ids"].shape[1] <= (
            most if left else 10**6
        )
        assert torch.isfinite(loss_of(cut, cut.data_collator([found])))


# Losses


@pytest.mark.parametrize(
    ("kind", "words"),
    [(kind, ("tokens=30",)) for kind in ALL]
    + [(kind, ("ratio=0.8", "distill=true", "checkpointing=true")) for kind in SOME],
)
def test_the_loss_of_one_row_falls_and_is_finite(kind, words, folder, tmp_path):
    words = (*words, "batch_size=1", "lr=0.003", "warmup=0")
    trainer = trainer_of(words_of(folder, kind, tmp_path / "out", *words, rows=[ROWS[1]]))
    trainer.train()
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(found) == 3 and all(map(math.isfinite, found)) and found[2] < found[1] < found[0]


@pytest.mark.parametrize("kind", SOME)
def test_training_at_ratio_1_is_stock_training_bit_for_bit(kind, folder, tmp_path, monkeypatch):
    weights = []
    for name in ("merging", "stock"):
        if name == "stock":
            monkeypatch.setattr(MergingTrainer, "set_merging", lambda *_: None)
        trainer = trainer_of(words_of(folder, kind, tmp_path / name, "ratio=1.0", "max_steps=2"))
        trainer.train()
        weights.append(trained(trainer))
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


@pytest.mark.parametrize(
    ("kind", "amount"),
    [(kind, "tokens=30") for kind in ALL] + [(kind, words) for kind in SOME for words in OTHERS],
)
def test_the_loss_of_a_batch_is_the_mean_of_its_rows(kind, amount, folder, tmp_path):
    trainer = trainer_of(words_of(folder, kind, tmp_path, amount))
    randomize(trainer)
    items = [trainer.train_dataset[i] for i in range(len(ROWS))]
    together = loss_of(trainer, trainer.data_collator(items))
    alone = torch.stack([loss_of(trainer, trainer.data_collator([item])) for item in items])
    counts = torch.tensor([float((item["labels"] != IGNORE_INDEX).sum()) for item in items])
    torch.testing.assert_close(together, (alone * counts).sum() / counts.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SOME)
def test_the_teacher_is_the_unmerged_model_and_its_placeholders_are_its_own(kind, folder, tmp_path):
    trainer = trainer_of(words_of(folder, kind, tmp_path, "tokens=24,30", "distill=true"))
    randomize(trainer)
    batch = batch_of(trainer)
    trainer.set_merging(trainer.config_at(0))
    taught = trainer.teacher_log_probs(batch)
    plain, _ = load(str(folder / kind))
    expanded = trainer.expand(batch, MergeConfig(ratio=1.0))
    labels = expanded.pop("labels")
    with torch.no_grad():
        expected = answer_logits(plain(**expanded).logits, labels)[0].log_softmax(-1)
    assert torch.equal(taught, expected)
    trainer.set_merging(None)
    counts = {trainer.config_at(step).tokens for step in range(20)}
    assert counts == {24, 30}
    for step in range(4):
        trainer.state.global_step = step
        tokens = trainer.config_at(step).tokens
        assert (trainer.expand(batch, trainer.config_at(step))["input_ids"] == 4).sum() == 4 * tokens
        assert torch.isfinite(loss_of(trainer, batch))


@pytest.mark.parametrize("kind", SOME)
def test_gradient_checkpointing_changes_no_weight(kind, folder, tmp_path):
    weights = []
    for words in ((), ("checkpointing=true",)):
        output = tmp_path / str(len(weights))
        trainer = trainer_of(words_of(folder, kind, output, "tokens=30", "max_steps=1", "warmup=0", *words))
        trainer.train()
        weights.append(trained(trainer))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-4, msg=name)


# Budgets


@pytest.mark.parametrize("kind", ["next-vicuna", "next-video", "onevision"])
@pytest.mark.parametrize(
    ("words", "image", "message"),
    [
        (["tokens=30,2"], "wide.png of 100 x 50 pixels: tokens=2 does not fit", "allowed is"),
        (["tokens=30,99"], ".png of ", "pixels: tokens=99 does not fit: this image has"),
        (['merging={"tokens_per_tile": 60}'], "wide.png of 100 x 50 pixels: tokens_per_tile=60", "1 to"),
        (['merging={"prefix": 900}'], "wide.png of 100 x 50 pixels: prefix=900 does not fit", "allowed is"),
    ],
)
def test_a_budget_that_does_not_fit_names_the_image_before_the_first_step(
    kind, words, image, message, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(MergingTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    assert main(words_of(folder, kind, tmp_path, *words)) == 2
    error = capsys.readouterr().err
    assert image in error and message in error
