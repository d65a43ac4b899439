"""The embedded LLaVA-1.5, trained from scratch: options, data and stages."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from llava_pitome.cli.options import Option
from train.embedded import data, model
from train.embedded.losses import Losses
from train.embedded.run import COUNT, RATE, WEIGHT, Run, common_options, loader, share_right

OPTIONS = {
    "tower_steps": Option(1000, *COUNT, "steps of the first stage"),
    "language_steps": Option(1250, *COUNT, "steps of the second"),
    "together_steps": Option(2000, *COUNT, "steps of the third"),
    "batch_size": Option(48, *COUNT, "images per step, over all processes"),
    "tower_lr": Option(8e-3, *RATE, "peak learning rate of the first stage"),
    "language_lr": Option(4e-3, *RATE, "of the second"),
    "together_lr": Option(3e-3, *RATE, "of the third"),
    "point_loss": Option(0.3, *WEIGHT, "weight of the attention from nouns to patches; later stages"),
    "align_loss": Option(0.3, *WEIGHT, "weight of the words for each patch; later stages"),
    "patches_loss": Option(0.3, *WEIGHT, "weight of the patch labels; later stages"),
    **common_options("output/embedded", validate=256),
}


def train(options: dict[str, Any]) -> None:
    """Runs the stages, and writes the model, its processor and a log.

    Raises:
        ValueError: a checkpoint of other options is in the way.
    """
    recipe = Recipe(options)
    run, trained, heads = Run(options, recipe), recipe.model, recipe.heads
    language = nn.ModuleList([trained.model.multi_modal_projector, trained.model.language_model])
    run.train_stage("tower", nn.ModuleList([trained.model.vision_tower, heads]), recipe.losses.tower)
    run.train_stage("language", language, recipe.losses.answers)
    run.train_stage("together", nn.ModuleList([trained, heads]), recipe.losses.answers)
    if run.rank == 0:
        model.save(trained, recipe.tokenizer, Path(options["output"]))
        run.write_history()


class Recipe:
    """Model, data and losses of a run; see `train.embedded.run.Recipe`."""

    stages = ("tower", "language", "together")
    validated = stages[1:]

    def __init__(self, options: dict[str, Any]):
        """Makes the model."""
        self.options = options
        self.tokenizer = model.make_tokenizer()
        self.model = model.make_model(self.tokenizer).to(options["device"])
        self.losses = Losses(self.model, self.tokenizer, options)
        self.heads = self.losses.heads

    def batches(self, stage: str, first: int, steps: int, rank: int, ranks: int) -> DataLoader:
        """This process's share of every batch of new scenes; no image is used twice."""
        seed = data.TRAIN_SEEDS + (self.stages.index(stage) + 10 * self.options["seed"]) * data.STAGE_SEEDS
        batch, share = self.options["batch_size"], self.options["batch_size"] // ranks
        seeds = [seed + step * batch + rank * share for step in range(first, steps)]
        return loader(data.SceneBatches(seeds, share, self.tokenizer), self.options["device"])

    @torch.no_grad()
    def validate(self) -> float:
        """Share of held-out questions whose every answer token is predicted, given the tokens before it."""
        seeds = range(data.HELD_OUT_SEEDS, data.HELD_OUT_SEEDS + self.options["validate"], 32)
        batches = data.SceneBatches(seeds, 32, self.tokenizer)
        return share_right(self.losses.answer_logits, batches, self.tokenizer.eos_token_id)
