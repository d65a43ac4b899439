"""Adapters trained on a merging LLaVA: the base model and the merge config saved in an adapter's folder."""

import json
from pathlib import Path
from typing import Any

from llava_pitome.config import MergeConfig
from llava_pitome.saved_config import FILE, hub_file

ADAPTER_CONFIG, BASE = "adapter_config.json", "base_model_name_or_path"  # peft's file, and its key


def save_merge_config(folder: Path, base: str, config: MergeConfig) -> None:
    """Writes into an adapter's folder how it merges, and its base model as `load` takes it."""
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {BASE: base}, indent=1) + "\n")
    config.save_pretrained(folder)


def base_model(path: str, **hub: Any) -> str | None:
    """The base model of an adapter, as peft recorded it; None where the path holds no adapter.

    Args:
        path: a folder or a hub id.
        **hub: hub arguments for its files: revision, token, ...

    Raises:
        ValueError: the adapter does not record its base model.
    """
    file = hub_file(path, ADAPTER_CONFIG, **hub)
    if file is None:
        return None
    base = json.loads(file.read_text()).get(BASE)
    if not base:
        raise ValueError(f"{ADAPTER_CONFIG} of the adapter {path} has no {BASE}")
    return base


def merge_config(path: str, **hub: Any) -> dict[str, Any] | None:
    """The merge config of an adapter as a dict; None where it has none."""
    file = hub_file(path, FILE, **hub)
    return None if file is None else json.loads(file.read_text())
