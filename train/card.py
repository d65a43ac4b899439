"""What is written beside an adapter: a model card for people, and training.json for programs."""

import json
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from llava_pitome import MergeConfig
from llava_pitome.cli.bench.environment import machine
from train import settings

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")
CARD = """---
base_model: {base}
library_name: peft
tags: [llava, token-merging, pitome, lora]
---

# A LLaVA adapter trained with merged visual tokens

{lines}

## Accuracy

{accuracy}

## Use

```python
from llava_pitome import load

model, processor = load("path/of/this/folder")  # merges as it was trained
model.merge_and_unload().save_pretrained("plain")  # a checkpoint without adapters, to be loaded again
processor.save_pretrained("plain")
```

The loss by step is in loss.png, every number in training.json.
"""


def facts(options: dict[str, Any], merging: Sequence[MergeConfig], trainer: Any) -> dict[str, Any]:
    """What is told of a run that has ended, but for its accuracy.

    Args:
        options: of the run.
        merging: how its steps merged.
        trainer: what ran it.
    """
    last = trainer.state.max_steps  # one more is made where a run goes on from the very last
    log = [row for row in trainer.state.log_history if row["step"] <= last]
    logged = [row for row in log if "loss" in row]
    taken = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(logged)]
    rows = trainer.train_dataset
    return {
        "model": options["model"],
        "data": settings.described(options),
        "rows": len(rows),
        "broken": len(rows.broken),
        "merging": [config.to_dict() for config in merging],
        "options": options,
        "steps": min(trainer.state.global_step, last),
        "batch": options["batch_size"] * options["accumulate"] * trainer.args.world_size,
        "log": log,
        "machine": machine(),
        "seconds": log[-1]["seconds"],
        "step_seconds": statistics.median(taken) if taken else None,
        "bytes_before": trainer.memory.before,
        "bytes_most": trainer.memory.most(),
        "accuracy": [],
    }


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Writes README.md and training.json.

    Args:
        folder: of the adapter.
        facts: as the function `facts` gives them, accuracy filled in where it was measured.
    """
    facts = {"packages": {name: found for name in PACKAGES if (found := _version(name))}} | facts
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "README.md").write_text(_card(facts))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _card(facts: dict[str, Any]) -> str:
    o = facts["options"]
    learnt = ["adapters on the language model"]
    learnt += ["adapters on the vision tower"] if o["tower"] == "lora" else []
    learnt += ["the projector"] if o["projector"] == "train" else []
    left_out = f" ({facts['broken']} left out)" if facts["broken"] else ""
    told = {
        "Model": facts["model"],
        "Data": f"{facts['data']}, {facts['rows']} rows{left_out}",
        "Merged while training": "; ".join(map(_told, facts["merging"])),
        "Learnt": f"{', '.join(learnt)}; rank {o['lora_rank']}, alpha {o['lora_alpha']:g}",
        "Also learnt from": f"the unmerged model's answers, weight {o['distill_weight'] or 1.0:g}",
        "Steps": f"{facts['steps']} of {facts['batch']} rows, learning rate {o['lr']:g}, seed {o['seed']}",
        "Took": f"{facts['seconds']:.0f} s{_step(facts)} on "
        + ", ".join(f"{k} {v}" for k, v in facts["machine"].items()),
        "With": ", ".join(f"{k} {v}" for k, v in facts["packages"].items()),
    }
    if not o["distill"]:
        del told["Also learnt from"]
    lines = "\n".join(f"- {name}: {words}" for name, words in told.items())
    return CARD.format(base=facts["model"], lines=lines, accuracy=_accuracy(facts))


def _step(facts: dict[str, Any]) -> str:
    taken, most = facts["step_seconds"], facts["bytes_most"] / 1e9
    return "" if taken is None else f" ({taken:.2f} s a step, {most:.1f} GB at most)"


def _told(config: dict[str, Any]) -> str:
    return json.dumps(MergeConfig.from_dict(config).changes(), sort_keys=True)


def _accuracy(facts: dict[str, Any]) -> str:
    measured = facts["accuracy"]
    if not measured:
        return "Not measured. `bash scripts/eval_vqav2.sh model=path/of/this/folder` does."
    head = "| image tokens | before | after |\n|---|---|---|\n"
    cells = [f"| {row['tokens']} | {_cell(row['before'])} | {_cell(row['after'])} |" for row in measured]
    how = "In per cent ± standard error, by eval/run.py with model= and this folder, and each way to merge."
    return head + "\n".join(cells) + f"\n\n{how}"


def _cell(accuracy: dict[str, float]) -> str:
    return f"{accuracy['mean']:.1f} ± {accuracy['stderr']:.1f}"
