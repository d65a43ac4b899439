"""A checkpoint whose tower has the names that vLLM's own LLaVA reads.

Newer versions of transformers save a tower as `vision_tower.encoder...`; vLLM 0.32 knows
`vision_tower.vision_model.encoder...` alone. The merging LLaVA of this package reads both. For vLLM's own, to
compare with it, such a checkpoint is copied.
"""

import json
import os
import shutil
from pathlib import Path

NEW, OLD = "vision_tower.", "vision_tower.vision_model."
INDEX = "model.safetensors.index.json"


def is_new(folder: Path) -> bool:
    """Whether the weights in a folder have names that vLLM's own LLaVA does not know."""
    return any(_old(name) != name for file in _weights(folder) for name in _names(file))


def write(folder: Path, into: Path) -> Path:
    """Copies a checkpoint with a tower's weights under the older names, and returns the copy.

    Raises:
        ValueError: the copy would lie where the checkpoint does.
    """
    from safetensors.torch import load_file, save_file

    if folder.resolve() == into.resolve():
        raise ValueError(f"{into} is the checkpoint itself; the copy needs a folder of its own")
    into.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            weights = {_old(name): x for name, x in load_file(file).items()}
            partial = into / f"{file.name}.{os.getpid()}.part"
            save_file(weights, partial, metadata={"format": "pt"})
            partial.replace(into / file.name)  # a server that reads an older copy keeps it
        elif file.name == INDEX:
            index = json.loads(file.read_text())
            index["weight_map"] = {_old(name): part for name, part in index["weight_map"].items()}
            (into / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        elif file.is_file():
            shutil.copy(file, into / file.name)
    return into


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return list(weights.keys())


def _old(name: str) -> str:
    """The older name of a weight: its own, where it has that already or is not the tower's."""
    start = name.find(NEW)
    if start not in (0, len("model.")) or name.startswith(OLD, start):
        return name
    return name[:start] + OLD + name[start + len(NEW) :]
