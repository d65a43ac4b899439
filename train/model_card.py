"""The files beside an adapter: its model card, training.json with every number, and the plot of the loss."""

import json
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from llava_pitome import MergeConfig
from llava_pitome.cli.bench.environment import machine
from train.checkpoint import RESULT
from train.options import data_description

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")
SMOOTHED = 20  # steps of the moving average in the plot, at most
CARD = """---
base_model: {base}
library_name: peft
tags: [llava, token-merging, pitome, lora]
---

# A LLaVA adapter trained with merged visual tokens

{summary}

## Accuracy

{accuracy}

## Use

```python
from llava_pitome import load

model, processor = load("path/of/this/folder")  # merges as in training
model.merge_and_unload().save_pretrained("plain")  # a checkpoint without adapters
processor.save_pretrained("plain")
```

The loss by step is in loss.png, every number in training.json.
"""


def training_facts(options: dict[str, Any], configs: Sequence[MergeConfig], trainer: Any) -> dict[str, Any]:
    """The contents of training.json for a run that its MergingTrainer has ended; accuracy is empty."""
    last = trainer.state.max_steps  # a run resumed from its last checkpoint makes one step more
    log = [row for row in trainer.state.log_history if row["step"] <= last]
    losses = [row for row in log if "loss" in row]
    step_seconds = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(losses)]
    rows = trainer.train_dataset
    return {
        "packages": {name: version(name) for name in PACKAGES if find_spec(name)},
        "model": options["model"],
        "data": data_description(options),
        "rows": len(rows),
        "broken": len(rows.broken),
        "merging": [config.to_dict() for config in configs],
        "options": options,
        "steps": min(trainer.state.global_step, last),
        "batch": options["batch_size"] * options["accumulate"] * trainer.args.world_size,
        "log": log,
        "machine": machine(),
        "seconds": log[-1]["seconds"],
        "step_seconds": statistics.median(step_seconds) if step_seconds else None,
        "bytes_before": trainer.memory.before,
        "bytes_most": trainer.memory.peak(),
        "accuracy": [],
    }


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Writes README.md, training.json and loss.png from `training_facts`, with accuracy if measured."""
    (folder / RESULT).write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "README.md").write_text(_card(facts))
    plot_loss(facts["log"], folder / "loss.png")


def _card(facts: dict[str, Any]) -> str:
    o, peak = facts["options"], facts["bytes_most"] / 1e9
    trained = ["adapters on the language model"]
    trained += ["adapters on the vision tower"] if o["tower"] == "lora" else []
    trained += ["the projector"] if o["projector"] == "train" else []
    broken = f" ({facts['broken']} left out)" if facts["broken"] else ""
    step = f" ({facts['step_seconds']:.2f} s a step, {peak:.1f} GB at most)" if facts["step_seconds"] else ""
    changes = (MergeConfig.from_dict(config).changes() for config in facts["merging"])
    summary = {
        "Model": facts["model"],
        "Data": f"{facts['data']}, {facts['rows']} rows{broken}",
        "Merging": "; ".join(json.dumps(fields, sort_keys=True) for fields in changes),
        "Trained": f"{', '.join(trained)}; rank {o['lora_rank']}, alpha {o['lora_alpha']:g}",
        "Distillation": f"from the unmerged model, weight {o['distill_weight'] or 1.0:g}",
        "Steps": f"{facts['steps']} of {facts['batch']} rows, learning rate {o['lr']:g}, seed {o['seed']}",
        "Time": f"{facts['seconds']:.0f} s{step} on {_pairs(facts['machine'])}",
        "Packages": _pairs(facts["packages"]),
    }
    if not o["distill"]:
        del summary["Distillation"]
    lines = "\n".join(f"- {name}: {text}" for name, text in summary.items())
    return CARD.format(base=facts["model"], summary=lines, accuracy=_accuracy(facts["accuracy"]))


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _accuracy(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "Not measured. `bash scripts/eval_vqav2.sh model=path/of/this/folder` measures it."
    lines = ["| image tokens | before | after |", "|---|---|---|"]
    for row in rows:
        before, after = (
            f"{row[side]['mean']:.1f} ± {row[side]['stderr']:.1f}" for side in ("before", "after")
        )
        lines.append(f"| {row['tokens']:.6g} | {before} | {after} |")
    method = "In per cent ± standard error, by eval.run with the model and with this folder as model=."
    return "\n".join([*lines, "", method])


def plot_loss(log: list[dict[str, Any]], path: Path) -> None:
    """Plots the Trainer's log: loss, its moving average and learning rate by step."""
    from matplotlib.figure import Figure

    rows = [row for row in log if "loss" in row]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    width = max(1, min(SMOOTHED, len(losses) // 5))
    average = [statistics.fmean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#56B4E9", lw=0.8, label="loss")
    axes.plot(steps, average, color="#0072B2", lw=2, label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="loss per answer token")
    axes.grid(alpha=0.25)
    axes.legend()
    rate = axes.twinx()
    rate.plot(steps, [row["learning_rate"] for row in rows], color="grey", ls=":", lw=1)
    rate.set_ylabel("learning rate")
    figure.savefig(path, dpi=110)
