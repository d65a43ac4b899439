"""Trains the embedded model from scratch: python -m train.embedded [key=value ...].

In three stages, since a language model cannot learn from features without content. "tower": the vision tower
learns to classify the content of every patch, which CLIP's training would have taught it. "language":
projector and language model learn to answer questions about frozen features. "together": everything is
trained, with the patch labels as an auxiliary loss. Merging is off, as in training any other LLaVA.

A run that was stopped continues from `output`.ckpt when it is started again. With
`OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m train.embedded` two processes share each batch, which on two
cores is 1.5 times as fast as one process of two threads.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration

from llava_pitome.cli.options import Option, helped, number, parse, whole
from train.embedded import data
from train.embedded import model as embedded
from train.embedded.losses import Losses

log = logging.getLogger("train.embedded")
COUNT, RATE = (whole(1), "a whole number from 1"), (number(0, above=True), "a number above 0")
WEIGHT = (number(0), "a number from 0")
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
    "seed": Option(0, whole(0), "a whole number from 0", "of weights and scenes"),
    "output": Option("output/embedded", str, "a folder", "of model and log"),
    "validate": Option(256, *COUNT, "held-out images, evaluated every 250 steps"),
    "device": Option(
        "cuda" if torch.cuda.is_available() else "cpu", str, "cpu | cuda", "where it is trained"
    ),
}
STAGES = ("tower", "language", "together")
REPORT_STEPS, SAVE_STEPS = 50, 250  # steps between logged rows, and between checkpoints


def main(words: Sequence[str]) -> int:
    """Trains, writes the model, its processor and a log; returns the command's exit status."""
    if helped(words, __doc__, OPTIONS):
        return 0
    try:
        train(parse(words, OPTIONS))
    except ValueError as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    return 0


def train(options: dict[str, Any]) -> None:
    """Runs the stages, and writes the model, its processor and a log.

    Raises:
        ValueError: a checkpoint of other options is in the way.
    """
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo" if options["device"] == "cpu" else "nccl")
    torch.manual_seed(options["seed"])
    device = torch.device(options["device"])
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    tokenizer = embedded.make_tokenizer()
    model = embedded.make_model(tokenizer).to(device)
    losses = Losses(model, tokenizer, options)
    language = nn.ModuleList([model.model.multi_modal_projector, model.model.language_model])
    run = Run(options, tokenizer, model, losses)
    run.train_stage("tower", nn.ModuleList([model.model.vision_tower, losses.heads]), losses.tower)
    run.train_stage("language", language, losses.answers)
    run.train_stage("together", nn.ModuleList([model, losses.heads]), losses.answers)
    if run.rank == 0:
        output = Path(options["output"])
        embedded.save(model, tokenizer, output)
        (output / "training.json").write_text(json.dumps({"options": options, "log": run.history}, indent=1))


class Run:
    """A training run: its stages, checkpoints and log."""

    def __init__(
        self, options: dict[str, Any], tokenizer: Any, model: LlavaForConditionalGeneration, losses: Losses
    ):
        """Loads the last checkpoint, if there is one.

        Raises:
            ValueError: it was made with other options.
        """
        self.options, self.tokenizer, self.model = options, tokenizer, model
        self.losses, self.heads = losses, losses.heads
        self.history: list[dict[str, Any]] = []
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.path = Path(f"{options['output']}.ckpt")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.saved = torch.load(self.path, weights_only=True) if self.path.exists() else None
        if self.saved:
            before = self.saved["options"]
            changed = [f"{k}={v} (was {before[k]})" for k, v in options.items() if before[k] != v]
            if changed:
                raise ValueError(
                    f"{self.path} was made with other options: {', '.join(changed)}; use those, or another "
                    "output="
                )
            model.load_state_dict(self.saved["model"])
            self.heads.load_state_dict(self.saved["heads"])
            self.history = json.loads(self.saved["history"])

    def train_stage(
        self, stage: str, modules: nn.Module, compute_loss: Callable[[dict[str, Tensor]], tuple[Tensor, dict]]
    ) -> None:
        """Trains `modules` alone, on new scenes: linear warm-up, then cosine decay."""
        if self.saved and STAGES.index(stage) < STAGES.index(self.saved["stage"]):
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
        for step, batch in enumerate(self.batches(stage, first, steps), first + 1):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * _schedule(step, steps, is_last=stage == STAGES[-1])
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
        if stage != "tower" and step % SAVE_STEPS == 0:
            row["held_out"] = self.validate()
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

    def batches(self, stage: str, first: int, steps: int) -> DataLoader:
        """This process's share of every batch of new scenes; no image is used twice."""
        seed = data.TRAIN_SEEDS + (STAGES.index(stage) + 10 * self.options["seed"]) * data.STAGE_SEEDS
        batch, share = self.options["batch_size"], self.options["batch_size"] // self.ranks
        seeds = [seed + step * batch + self.rank * share for step in range(first, steps)]
        scenes = data.SceneBatches(seeds, share, self.tokenizer)
        workers = 1 if self.options["device"] == "cpu" else min(os.cpu_count() or 1, 12)
        return DataLoader(scenes, batch_size=None, num_workers=workers, prefetch_factor=8)

    @torch.no_grad()
    def validate(self) -> float:
        """Share of held-out questions whose every answer token is predicted, given the tokens before it."""
        seeds = range(data.HELD_OUT_SEEDS, data.HELD_OUT_SEEDS + self.options["validate"], 32)
        correct = total = 0
        for batch in data.SceneBatches(seeds, 32, self.tokenizer):
            logits, targets = self.losses.answer_logits(batch)
            hits, first = logits.argmax(-1) == targets, 0
            for end in (targets == self.tokenizer.eos_token_id).nonzero().flatten().tolist():
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
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=lr / 4, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return [muon, adamw]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    sys.exit(main(sys.argv[1:]))
