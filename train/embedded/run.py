"""A training run of an embedded model: its stages, optimizers, checkpoints and log."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from llava_pitome.cli.options import Option, number, whole

log = logging.getLogger("train.embedded")
REPORT_STEPS, SAVE_STEPS = 50, 250  # steps between logged rows, and between checkpoints
COUNT, RATE = (whole(1), "a whole number from 1"), (number(0, above=True), "a number above 0")
WEIGHT = (number(0), "a number from 0")


def common_options(output: str, validate: int) -> dict[str, Option]:
    """The options that every model has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "seed": Option(0, whole(0), "a whole number from 0", "of weights and scenes"),
        "output": Option(output, str, "a folder", "of model and log"),
        "validate": Option(validate, *COUNT, "held-out images, evaluated every 250 steps"),
        "device": Option(device, str, "cpu | cuda", "where it is trained"),
    }


class Recipe(Protocol):
    """What a run trains, and with which data.

    Attributes:
        model: a LLaVA.
        heads: modules that only training needs.
        stages: names of the stages, in order.
        validated: those in which the model answers questions.
    """

    model: nn.Module
    heads: nn.Module
    stages: tuple[str, ...]
    validated: tuple[str, ...]

    def batches(self, stage: str, first: int, steps: int, rank: int, ranks: int) -> Iterable[dict]:
        """A process's share of the batches of the steps from `first` to `steps`, counted from 0."""
        ...

    def validate(self) -> float:
        """Accuracy on held-out questions."""
        ...


class Run:
    """A training run: its stages, checkpoints and log."""

    def __init__(self, options: dict[str, Any], recipe: Recipe):
        """Loads the last checkpoint, if there is one.

        Raises:
            ValueError: it was made with other options.
        """
        self.options, self.recipe = options, recipe
        self.model, self.heads, self.stages = recipe.model, recipe.heads, recipe.stages
        self.history: list[dict[str, Any]] = []
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.path = Path(f"{options['output']}.ckpt")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.saved = torch.load(self.path, weights_only=True) if self.path.exists() else None
        if self.saved:
            before = self.saved["options"]
            changed = [f"{k}={v} (was {before.get(k)})" for k, v in options.items() if before.get(k) != v]
            if changed:
                raise ValueError(
                    f"{self.path} was made with other options: {', '.join(changed)}; use those, or another "
                    "output="
                )
            self.model.load_state_dict(self.saved["model"])
            self.heads.load_state_dict(self.saved["heads"])
            self.history = json.loads(self.saved["history"])

    def train_stage(
        self, stage: str, modules: nn.Module, compute_loss: Callable[[dict[str, Tensor]], tuple[Tensor, dict]]
    ) -> None:
        """Trains `modules` alone, on new scenes: linear warm-up, then cosine decay."""
        if self.saved and self.stages.index(stage) < self.stages.index(self.saved["stage"]):
            return  # completed before the run was stopped
        steps = self.options[f"{stage}_steps"]
        for parameter in (*self.model.parameters(), *self.heads.parameters()):
            parameter.requires_grad, parameter.grad = False, None
        modules.requires_grad_(True)
        optimizers = _make_optimizers(modules, self.options[f"{stage}_lr"])
        first = 0
        if self.saved and self.saved["stage"] == stage:
            first = self.saved["step"]
            for optimizer, state in zip(optimizers, self.saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        started = time.time()
        for step, batch in enumerate(
            self.recipe.batches(stage, first, steps, self.rank, self.ranks), first + 1
        ):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * _schedule(step, steps, is_last=stage == self.stages[-1])
            loss, facts = compute_loss(batch)
            loss.backward()
            self.average_gradients(modules)
            nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if self.rank == 0 and (step % REPORT_STEPS == 0 or step == steps):
                self.report(stage, step, facts, started)
            if self.rank == 0 and (step % SAVE_STEPS == 0 or step == steps):
                self.save_checkpoint(stage, step, optimizers)

    def average_gradients(self, modules: nn.Module) -> None:
        """Averages gradients over all processes, in one message."""
        if self.ranks > 1:
            grads = [p.grad for p in modules.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for grad, mean in zip(grads, (flat / self.ranks).split([g.numel() for g in grads]), strict=True):
                grad.copy_(mean.view_as(grad))

    def report(self, stage: str, step: int, facts: dict[str, float], started: float) -> None:
        """Logs a step, with accuracy on held-out images at every checkpoint of the later stages."""
        row = {"stage": stage, "step": step, "seconds": round(time.time() - started)} | facts
        if stage in self.recipe.validated and step % SAVE_STEPS == 0:
            row["held_out"] = self.recipe.validate()
        self.history.append(row)
        log.info(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))

    def save_checkpoint(self, stage: str, step: int, optimizers: list[torch.optim.Optimizer]) -> None:
        """Writes what is needed to continue after `step`."""
        state = {
            "stage": stage,
            "step": step,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "options": self.options,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "history": json.dumps(self.history),
        }
        partial = self.path.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.path)

    def write_history(self) -> None:
        """Writes the options and the log beside the model."""
        text = json.dumps({"options": self.options, "log": self.history}, indent=1)
        (Path(self.options["output"]) / "training.json").write_text(text)


def loader(batches: IterableDataset, device: str) -> DataLoader:
    """Makes batches in the background."""
    workers = 1 if device == "cpu" else min(os.cpu_count() or 1, 12)
    return DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=8)


def share_right(answer_logits: Callable, batches: Iterable[dict[str, Tensor]], eos: int) -> float:
    """The share of questions whose every answer token is predicted, given the tokens before it.

    Args:
        answer_logits: the logits (A, vocabulary) and tokens (A,) of a batch's answers.
        batches: with questions.
        eos: the token at the end of every answer.
    """
    correct = total = 0
    for batch in batches:
        logits, targets = answer_logits(batch)
        hits, first = logits.argmax(-1) == targets, 0
        for end in (targets == eos).nonzero().flatten().tolist():
            correct, first = correct + int(hits[first : end + 1].all()), end + 1
            total += 1
    return correct / total


def _schedule(step: int, steps: int, *, is_last: bool) -> float:
    """The share of the peak learning rate at a step, counted from 1; all stages but the last end at 0.2."""
    warmup, floor = min(200, max(steps // 10, 1)), 0.0 if is_last else 0.2
    progress = min(max((step - 1 - warmup) / max(steps - warmup, 1), 0.0), 1.0)
    cosine = torch.cos(torch.tensor(progress * torch.pi, device="cpu")).item()
    return min(step / warmup, floor + (1 - floor) * 0.5 * (1 + cosine))


def _make_optimizers(modules: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW at a quarter of its rate for all other weights."""
    matrices, others = [], []
    for name, parameter in modules.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    adamw = torch.optim.AdamW(others, lr=lr / 4, betas=(0.9, 0.98), weight_decay=0.0)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        optimizers = [muon, adamw]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return optimizers
