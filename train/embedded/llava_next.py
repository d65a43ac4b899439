"""The embedded LLaVA-NeXT, grown from the embedded LLaVA-1.5: options, data and stages."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from llava_pitome.cli.options import Option
from train.embedded import next_data as data
from train.embedded import next_model as model
from train.embedded.next_losses import NextLosses
from train.embedded.run import COUNT, RATE, WEIGHT, Run, common_options, loader, share_right

CROWD = 4  # times as many objects where nothing but patches is learned
VALIDATION_BATCH = 8  # pictures of one size
OPTIONS = {
    "heads_steps": Option(60, *COUNT, "steps of the first stage"),
    "tower_steps": Option(800, *COUNT, "steps of the second"),
    "together_steps": Option(4200, *COUNT, "steps of the third"),
    "batch_size": Option(16, *COUNT, "pictures per step, over all processes"),
    "turns": Option(16, *COUNT, "questions about a picture"),
    "heads_lr": Option(2e-2, *RATE, "peak learning rate of the first stage"),
    "tower_lr": Option(3e-3, *RATE, "of the second"),
    "together_lr": Option(2.5e-3, *RATE, "of the third"),
    "point_loss": Option(0.3, *WEIGHT, "weight of the attention from nouns to patches; third stage"),
    "place_loss": Option(0.3, *WEIGHT, "weight of the place of every image token; third stage"),
    "align_loss": Option(0.3, *WEIGHT, "weight of the words for each patch; third stage"),
    "patches_loss": Option(0.3, *WEIGHT, "weight of the patch labels; third stage"),
    **common_options("output/embedded-next", validate=128),
}


def train(options: dict[str, Any]) -> None:
    """Runs the stages, and writes the model, its processor and a log.

    Raises:
        ValueError: a checkpoint of other options is in the way.
    """
    recipe = Recipe(options)
    run, trained, heads = Run(options, recipe), recipe.model, recipe.heads
    run.train_stage("heads", heads["patches"], recipe.losses.tower)
    run.train_stage(
        "tower", nn.ModuleList([trained.model.vision_tower, heads["patches"]]), recipe.losses.tower
    )
    run.train_stage("together", nn.ModuleList([trained, heads]), recipe.losses.answers)
    if run.rank == 0:
        model.save(trained, recipe.processor, Path(options["output"]))
        run.write_history()


class Recipe:
    """Model, data and losses of a run; see `train.embedded.run.Recipe`."""

    stages = ("heads", "tower", "together")
    validated = stages[2:]

    def __init__(self, options: dict[str, Any]):
        """Makes the model from the embedded LLaVA-1.5."""
        self.options = options
        tokenizer = model.make_tokenizer()
        self.processor = model.make_processor(tokenizer)
        self.model = model.grow(tokenizer).to(options["device"])
        self.losses = NextLosses(self.model, tokenizer, options)
        self.heads = self.losses.heads

    def batches(self, stage: str, first: int, steps: int, rank: int, ranks: int) -> DataLoader:
        """This process's share of every batch of new scenes; a batch has pictures of one size."""
        seed = data.TRAIN_SEEDS + (self.stages.index(stage) + 10 * self.options["seed"]) * data.STAGE_SEEDS
        batch, share = self.options["batch_size"], self.options["batch_size"] // ranks
        starts = [seed + step * batch for step in range(first, steps)]
        seeds = [(start + rank * share, start) for start in starts]
        turns, crowd = (self.options["turns"], 1) if stage in self.validated else (1, CROWD)
        batches = data.PictureBatches(seeds, share, turns, self.processor, crowd)
        return loader(batches, self.options["device"])

    @torch.no_grad()
    def validate(self) -> float:
        """Share of held-out questions whose every answer token is predicted, given the tokens before it."""
        first, n = data.HELD_OUT_SEEDS, VALIDATION_BATCH
        seeds = [(seed, seed) for seed in range(first, first + self.options["validate"], n)]
        batches = data.PictureBatches(seeds, n, self.options["turns"], self.processor)
        return share_right(self.losses.answer_logits, batches, self.processor.tokenizer.eos_token_id)
