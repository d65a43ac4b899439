"""Copies of checkpoints with the weight names of older transformers versions, which vLLM's own LLaVA needs.

Newer versions save a vision tower's weights as `vision_tower.encoder...`; vLLM 0.32 knows
`vision_tower.vision_model.encoder...` alone. The merging class of this package reads both.
"""

import json
import os
import shutil
from pathlib import Path

NEW, OLD = "vision_tower.", "vision_tower.vision_model."
INDEX = "model.safetensors.index.json"


def has_new_names(folder: Path) -> bool:
    """Whether a folder's weights have names that vLLM's own LLaVA does not know."""
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            if any(_old_name(name) != name for name in weights.keys()):  # noqa: SIM118  # not a dict
                return True
    return False


def copy_with_old_names(folder: Path, output: Path) -> Path:
    """Copies a checkpoint into `output`, with old names for the vision tower's weights; returns `output`.

    Raises:
        ValueError: `output` is the checkpoint's own folder.
    """
    from safetensors.torch import load_file, save_file

    if folder.resolve() == output.resolve():
        raise ValueError(f"{output} is the checkpoint itself; the copy needs a folder of its own")
    output.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            weights = {_old_name(name): x for name, x in load_file(file).items()}
            partial = output / f"{file.name}.{os.getpid()}.part"
            save_file(weights, partial, metadata={"format": "pt"})
            partial.replace(output / file.name)  # a server that has mapped an older copy keeps it
        elif file.name == INDEX:
            index = json.loads(file.read_text())
            index["weight_map"] = {_old_name(name): shard for name, shard in index["weight_map"].items()}
            (output / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        elif file.is_file():
            shutil.copy(file, output / file.name)
    return output


def _old_name(name: str) -> str:
    """A weight's old name; the name itself where it is old already or not of a vision tower."""
    start = name.find(NEW)
    if start not in (0, len("model.")) or name.startswith(OLD, start):
        return name
    return name[:start] + OLD + name[start + len(NEW) :]
