"""The MergingTrainer: draws of ratios, the teacher, the loss, the order of rows."""

import random
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
from training_runs import arguments

from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.cli.options import parse
from train import export, options
from train.data import json_rows
from train.run import make_trainer
from train.trainer import MergingTrainer, NonFiniteLoss, SeededLengthGroupedSampler, answer_logits


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Path:
    return export.write(tmp_path_factory.mktemp("scenes"), 6, turns=3)


@pytest.fixture
def make(conversations, tmp_path):
    """Makes a trainer whose adapters are randomly initialized, so that they change the model."""

    def made(*words: str) -> MergingTrainer:
        usual = ("lora_dropout=0", "batch_size=3", "dtype=float32", "tower=lora", "max_steps=4")
        given = parse(arguments(tmp_path / "out", f"data={conversations}", *usual, *words), options.OPTIONS)
        trainer = make_trainer(given, options.check(given), *json_rows(given))
        torch.manual_seed(3)
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.05)
        return trainer

    return made


def batch(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(3)])


def test_teacher_is_the_unmerged_model_without_adapters(make):
    trainer = make("distill=true", "recipe=best", "ratio=0.9")
    rows = batch(trainer)
    trainer.set_merging(trainer.config_at(0))
    taught = trainer.teacher_log_probs(rows)
    plain, _ = load("embedded", dtype=torch.float32)
    expanded = trainer.expand(rows, MergeConfig(ratio=1.0))
    labels = expanded.pop("labels")
    with torch.no_grad():
        expected = torch.log_softmax(answer_logits(plain(**expanded).logits, labels)[0], -1)
        adapted = torch.log_softmax(answer_logits(trainer.model(**expanded).logits, labels)[0], -1)
    assert torch.equal(taught, expected)
    assert (adapted - expected).abs().max() > 0.1


def test_loss_is_cross_entropy_and_divergence_under_the_config_of_the_step(make):
    """Against the loss written out, on a model that merges through the public API."""
    trainer = make("distill=true", "distill_weight=0.5", "tokens=20,39")
    rows = batch(trainer)
    for step in range(4):
        trainer.state.global_step = step
        config = trainer.config_at(step)
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, dict(rows))
        trainer.set_merging(None)
        expanded = trainer.expand(rows, config)
        labels = expanded.pop("labels")
        assert (expanded["input_ids"] == 4).sum() == 3 * config.tokens
        taught = trainer.teacher_log_probs(rows)
        with merge_tokens(trainer.model, config), torch.no_grad():
            logits, targets = answer_logits(trainer.model(**expanded).logits, labels)
        log_p = torch.log_softmax(logits, -1)
        cross_entropy = -log_p[torch.arange(len(targets)), targets].mean()
        divergence = (taught.exp() * (taught - log_p)).sum(-1).mean()
        torch.testing.assert_close(loss, cross_entropy + 0.5 * divergence, rtol=1e-4, atol=1e-5)
        assert divergence > 0.01


def test_repeated_token_counts_are_drawn_more_often(make):
    trainer = make("tokens=20,20,39,196")
    drawn = [trainer.config_at(step).tokens for step in range(2000)]
    assert drawn[:50] == [trainer.config_at(step).tokens for step in range(50)]
    counts = Counter(drawn)
    assert set(counts) == {20, 39, 196}
    assert abs(counts[20] - 1000) < 100 and abs(counts[39] - 500) < 80 and abs(counts[196] - 500) < 80


def test_nonfinite_loss_ends_training_before_weights_change(make):
    trainer = make("ratio=0.9")
    weights = dict(trainer.model.named_parameters())
    next(w for n, w in weights.items() if "lora_B" in n and "language" in n).data[0] = float("nan")
    before = {name: weight.clone() for name, weight in weights.items()}
    with pytest.raises(NonFiniteLoss, match=r"loss of step 1 is nan: try a lower lr="):
        trainer.train()
    for name, weight in weights.items():
        assert torch.equal(weight.nan_to_num(9), before[name].nan_to_num(9)), name


def test_length_groups_cover_all_rows_in_an_order_of_seed_and_epoch():
    lengths = [random.Random(i).randrange(1, 1000) for i in range(640)]
    sampler, orders = SeededLengthGroupedSampler(8, lengths, seed=1), []
    for epoch in (0, 0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert all(sorted(order) == list(range(640)) for order in orders)
    assert orders[0] == orders[1] != orders[2]

    def spread(order):
        groups = [[lengths[i] for i in order[k : k + 8]] for k in range(0, 640, 8)]
        return statistics.mean(max(group) - min(group) for group in groups)

    assert spread(orders[0]) < spread(range(640)) / 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (['merging={"decoder": {"1": 0.5}}'], MergeConfig(decoder={1: 0.5})),
        (['merging={"resize": [7, 7]}'], MergeConfig(resize=(7, 7))),
        (['merging={"method": "tome", "prefix": 64}'], MergeConfig(method="tome", prefix=64)),
        ([], MergeConfig(ratio=0.9)),
    ],
)
def test_amounts_in_merging_replace_the_default_ratio(words, expected):
    assert options.check(parse(words, options.OPTIONS)) == (expected,)
