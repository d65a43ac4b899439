"""What the Trainer of train/ makes of a batch: draws, teacher, weights of the loss, order of rows."""

import random
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from training_runs import ROOT

from llava_pitome import MergeConfig, load, merge_tokens

sys.path.insert(0, str(ROOT / "train"))

import export
import fit
import lora
import settings
from data import Collate
from records import Records
from stops import Diverged
from trainer import Grouped, MergingTrainer, at_answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("scenes")
    export.write(found, 6, turns=3)
    return found


@pytest.fixture
def make(folder, tmp_path):
    """A trainer in this process, its adapters moved away from where they start."""

    def made(distill: float = 0.0, **given) -> MergingTrainer:
        options = {key: option.default for key, option in settings.OPTIONS.items()} | {
            "lora_dropout": 0.0, "batch_size": 3, "dtype": "float32", "tower": "lora", "max_steps": 4,
            "output": str(tmp_path / "out"), "ratio": (0.9,),
        } | given  # fmt: skip
        merging = settings.check(options)
        (tmp_path / "out").mkdir(exist_ok=True)
        arguments = fit.arguments(options, tmp_path / "out")
        model, processor = fit.model(options, merging, arguments)
        model = lora.wrap(model, options)
        rows = fit.rows(
            options, merging, Records(folder / "conversations.json"), folder, processor, model, arguments
        )
        torch.manual_seed(3)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.05)
        return MergingTrainer(
            model, arguments, Collate(processor), rows, processing_class=processor, merging=merging,
            base="embedded", distill=distill, lengths=rows.lengths,
        )  # fmt: skip

    return made


def batch(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(3)])


def test_the_teacher_is_the_plain_model_unmerged(make):
    trainer = make(distill=1.0, recipe="best")
    rows = batch(trainer)
    trainer._merge(trainer.config_at(0))
    taught = trainer._teach(rows)
    plain, _ = load("embedded", dtype=torch.float32)
    longer = trainer._expanded(rows, MergeConfig(ratio=1.0))
    labels = longer.pop("labels")
    with torch.no_grad():
        said = plain(**longer).logits
    expected = torch.log_softmax(at_answers(said, labels)[0], -1)
    assert torch.equal(taught, expected)
    with torch.no_grad():
        moved = trainer.model(**longer).logits
    assert (torch.log_softmax(at_answers(moved, labels)[0], -1) - expected).abs().max() > 0.1


def test_a_step_merges_as_its_number_says_and_learns_from_answers_and_teacher(make):
    """Against the loss written out, with a model that merges by the public verbs."""
    trainer = make(distill=0.5, ratio=None, tokens=(20, 39))
    rows = batch(trainer)
    for step in (0, 1, 2, 3):
        trainer.state.global_step = step
        config = trainer.config_at(step)
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, dict(rows))
        trainer._merge(None)
        longer = trainer._expanded(rows, config)
        labels = longer.pop("labels")
        assert (longer["input_ids"] == 4).sum() == 3 * config.tokens
        taught = trainer._teach(rows)
        with merge_tokens(trainer.model, config), torch.no_grad():
            logits, said = at_answers(trainer.model(**longer).logits, labels)
        log = torch.log_softmax(logits, -1)
        plain = -log[torch.arange(len(said)), said].mean()
        apart = (taught.exp() * (taught - log)).sum(-1).mean()
        torch.testing.assert_close(loss, plain + 0.5 * apart, rtol=1e-4, atol=1e-5)
        assert apart > 0.01


def test_every_budget_is_drawn_as_often_as_it_is_said(make):
    trainer = make(ratio=None, tokens=(20, 20, 39, 196))
    drawn = [trainer.config_at(step).tokens for step in range(2000)]
    assert drawn[:50] == [trainer.config_at(step).tokens for step in range(50)]
    counts = Counter(drawn)
    assert set(counts) == {20, 39, 196}
    assert abs(counts[20] - 1000) < 100 and abs(counts[39] - 500) < 80 and abs(counts[196] - 500) < 80


def test_a_loss_that_is_no_number_ends_training_before_weights_take_it_up(make):
    trainer = make()
    model = trainer.model
    next(w for n, w in model.named_parameters() if "lora_B" in n and "language" in n).data[0] = float("nan")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(Diverged, match=r"loss of step 1 is nan: try a lower lr="):
        trainer.train()
    for name, weight in model.named_parameters():
        assert torch.equal(weight.nan_to_num(9), before[name].nan_to_num(9)), name


def test_rows_of_like_length_stand_together_and_all_of_them_are_there():
    lengths = [random.Random(i).randrange(1, 1000) for i in range(640)]
    epochs = [list(Grouped(lengths, 8, seed=1, epoch=lambda e=e: float(e))) for e in (0, 0, 1)]
    assert all(sorted(order) == list(range(640)) for order in epochs)
    assert epochs[0] == epochs[1] != epochs[2]

    def spread(order):
        parts = [order[i : i + 8] for i in range(0, 640, 8)]
        return statistics.mean(max(lengths[i] for i in p) - min(lengths[i] for i in p) for p in parts)

    assert spread(epochs[0]) < spread(range(640)) / 5


@pytest.mark.parametrize(
    ("merging", "expected"),
    [
        ({"decoder": {"1": 0.5}}, MergeConfig(decoder={1: 0.5})),
        ({"resize": [7, 7]}, MergeConfig(resize=(7, 7))),
        ({"method": "tome", "prefix": 64}, MergeConfig(method="tome", prefix=64)),
        (None, MergeConfig(ratio=0.9)),
    ],
)
def test_merging_alone_says_how_far(merging, expected):
    options = {key: option.default for key, option in settings.OPTIONS.items()} | {"merging": merging}
    assert settings.check(options) == (expected,)
