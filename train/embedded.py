"""Trains the embedded model from nothing: python train/embedded.py [key=value ...].

Three stages, because a language model cannot learn to read features that do not say anything yet. "tower":
the tower alone learns to name what lies under every patch, as CLIP would have taught it. "language":
projector and language model learn to answer questions about frozen features. "together": all of it learns on,
with the patch labels kept as a small second loss. Merging is never on: the embedded model is to merging what
any off-the-shelf LLaVA is.

Keys and their defaults stand in DEFAULTS.
A run that was stopped goes on from `output`.ckpt when it is started again. Under
`OMP_NUM_THREADS=1 torchrun --nproc_per_node 2` two processes share each batch, which on two cores is half as
fast again as one process of two threads.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration

from llava_pitome.cli.options import Option, parse
from train import embedded_data as data
from train import embedded_model as parts
from train.embedded_losses import Losses

log = logging.getLogger("train.embedded")
DEFAULTS = {
    "tower_steps": 1000,
    "language_steps": 1250,
    "together_steps": 2000,
    "batch_size": 48,  # images a step, over all processes
    "tower_lr": 8e-3,
    "language_lr": 4e-3,
    "together_lr": 3e-3,
    "point_loss": 0.3,  # weight of where the nouns look in the later stages
    "align_loss": 0.3,  # weight of the words for each patch in the later stages
    "patches_loss": 0.3,  # weight of the patch labels in the last stage
    "seed": 0,
    "output": "output/embedded",
    "validate": 256,  # held-out images looked at every 250 steps
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}
STAGES = ("tower", "language", "together")


def main(options: dict) -> None:
    """Runs the stages and writes the model, its processor and a training log."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo" if options["device"] == "cpu" else "nccl")
    torch.manual_seed(options["seed"])
    device = torch.device(options["device"])
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    tokenizer = parts.tokenizer()
    model = parts.training_model(tokenizer).to(device)
    losses = Losses(model, tokenizer, options)
    tower = model.model.vision_tower
    language = nn.ModuleList([model.model.multi_modal_projector, model.model.language_model])
    run = Run(options, tokenizer, model, losses)
    run.stage("tower", nn.ModuleList([tower, losses.heads]), losses.tower)
    run.stage("language", language, losses.answers)
    run.stage("together", nn.ModuleList([model, losses.heads]), losses.answers)
    if run.rank:
        return
    parts.save(model, tokenizer, Path(options["output"]))
    (Path(options["output"]) / "training.json").write_text(
        json.dumps({"options": options, "log": run.history}, indent=1)
    )


class Run:
    """The state of a training run: stages, checkpoints, what was logged."""

    def __init__(self, options: dict, tokenizer, model: LlavaForConditionalGeneration, losses: Losses):
        self.options, self.tokenizer, self.model = options, tokenizer, model
        self.losses, self.heads = losses, losses.heads
        self.history: list[dict] = []
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.path = Path(str(options["output"]) + ".ckpt")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.saved = torch.load(self.path, weights_only=True) if self.path.exists() else None
        if self.saved:
            _same(self.saved["options"], options, self.path)
            model.load_state_dict(self.saved["model"])
            self.heads.load_state_dict(self.saved["heads"])
            self.history = json.loads(self.saved["history"])

    def stage(self, name: str, modules: nn.Module, loss_of) -> None:
        """Trains `modules`, and nothing else, on fresh scenes: linear warm-up, then a cosine down."""
        if self.saved and STAGES.index(name) < STAGES.index(self.saved["stage"]):
            return  # finished before the run was stopped
        steps = self.options[f"{name}_steps"]
        for parameter in (*self.model.parameters(), *self.heads.parameters()):
            parameter.requires_grad, parameter.grad = False, None
        modules.requires_grad_(True)
        optimizers = _optimizers(modules, self.options[f"{name}_lr"])
        first = 0
        if self.saved and self.saved["stage"] == name:
            first = self.saved["step"]
            for optimizer, state in zip(optimizers, self.saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        warm = min(200, max(steps // 10, 1))
        started = time.time()
        for step, batch in enumerate(self.batches(name, first, steps), first):
            floor = 0.0 if name == STAGES[-1] else 0.2
            rate = min((step + 1) / warm, floor + (1 - floor) * _cosine((step - warm) / max(steps - warm, 1)))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * rate
            loss, facts = loss_of(batch)
            loss.backward()
            self.average(modules)
            nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if (step + 1) % 50 == 0 or step + 1 == steps:
                self.report(name, step + 1, facts, started)
            if (step + 1) % 250 == 0 or step + 1 == steps:
                self.checkpoint(name, step + 1, optimizers)

    def average(self, modules: nn.Module) -> None:
        """The mean of all processes' gradients, in one message."""
        if self.ranks > 1:
            grads = [p.grad for p in modules.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for grad, mean in zip(grads, (flat / self.ranks).split([g.numel() for g in grads]), strict=True):
                grad.copy_(mean.view_as(grad))

    def report(self, name: str, step: int, facts: dict, started: float) -> None:
        """Logs how training goes; every now and then, on held-out pictures."""
        if self.rank:
            return
        row = {"stage": name, "step": step, "seconds": round(time.time() - started)} | facts
        if name != "tower" and step % 250 == 0:
            row |= self.validate()
        self.history.append(row)
        log.info(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))

    def checkpoint(self, name: str, step: int, optimizers: list) -> None:
        """Writes what is needed to go on from here."""
        if self.rank:
            return
        state = {
            "stage": name,
            "step": step,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
        }
        state["options"] = self.options
        state |= {"optimizers": [o.state_dict() for o in optimizers], "history": json.dumps(self.history)}
        partial = self.path.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.path)

    def batches(self, stage: str, first: int, steps: int) -> DataLoader:
        """This process's share of every batch of fresh scenes; no image is ever seen twice."""
        seed = data.TRAIN_SEEDS + (STAGES.index(stage) + 10 * self.options["seed"]) * data.STAGE
        share = self.options["batch_size"] // self.ranks
        starts = [
            seed + step * self.options["batch_size"] + self.rank * share for step in range(first, steps)
        ]
        scenes = data.Scenes(starts, share, self.tokenizer)
        workers = 1 if self.options["device"] == "cpu" else min(os.cpu_count() or 1, 12)
        return DataLoader(scenes, batch_size=None, num_workers=workers, prefetch_factor=8)

    @torch.no_grad()
    def validate(self) -> dict:
        """Share of held-out questions whose every answer token is predicted, given the answers before it."""
        right = total = 0
        scenes = data.Scenes(
            range(data.HELD_OUT, data.HELD_OUT + self.options["validate"], 32), 32, self.tokenizer
        )
        for batch in scenes:
            logits, target = self.losses.logits(batch)
            hit, first = logits.argmax(-1) == target, 0
            ends = (target == self.tokenizer.eos_token_id).nonzero().flatten().tolist()
            for end in ends:
                right, first = right + int(hit[first : end + 1].all()), end + 1
            total += len(ends)
        return {"held_out": right / total}


def _same(before: dict, now: dict, path: Path) -> None:
    """Raises ValueError where a run that goes on was started with other options."""
    changed = [k for k in now if before[k] != now[k]]
    if changed:
        told = ", ".join(f"{k}={now[k]} (was {before[k]})" for k in changed)
        raise ValueError(f"{path} was made with other options: {told}; give those, or another output")


def _cosine(t: float) -> float:
    return 0.5 * (1 + torch.cos(torch.tensor(min(max(t, 0.0), 1.0) * torch.pi)).item())


def _optimizers(modules: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW at a quarter of its rate for everything else."""
    matrices, rest = [], []
    for name, parameter in modules.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=lr / 4, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return [muon, adam]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        main(parse(sys.argv[1:], {k: Option(v, type(v), f"like {v}", "") for k, v in DEFAULTS.items()}))
    except ValueError as error:
        sys.exit(f"train: {error}")
