"""Adapters that were trained on a merging LLaVA: which model they belong to, and how they merge."""

import json
from pathlib import Path
from typing import Any

from llava_pitome.config import MergeConfig

FILE = "token_merging.json"  # beside peft's adapter_config.json
BASE = "base_model_name_or_path"  # in the latter


def write(folder: Path, base: str, config: MergeConfig) -> None:
    """Notes in an adapter's folder which model it belongs to, as `load` takes it, and how that merges."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {BASE: base}, indent=1) + "\n")
    (folder / FILE).write_text(json.dumps(config.to_dict(), indent=1) + "\n")


def base(path: str, **hub: Any) -> str | None:
    """The model that an adapter belongs to, as peft has noted it; None where the path holds no adapter.

    Args:
        path: a folder or a hub id.
        **hub: where files come from: revision, token, ...

    Raises:
        ValueError: the adapter does not say.
    """
    file = _find(path, "adapter_config.json", hub)
    if file is None:
        return None
    named = json.loads(file.read_text()).get(BASE)
    if not named:
        raise ValueError(f"the adapter {path} does not say which model it belongs to ({BASE})")
    return named


def merging(path: str, **hub: Any) -> dict[str, Any] | None:
    """How an adapter says to merge, as a config's dict; None where it says nothing."""
    file = _find(path, FILE, hub)
    return None if file is None else json.loads(file.read_text())


def _find(path: str, name: str, hub: dict[str, Any]) -> Path | None:
    """A file of a folder or a hub id; None where it is not there, or the path is neither."""
    if Path(path).is_dir():
        file = Path(path) / hub.get("subfolder", "") / name
        return file if file.exists() else None
    from transformers.utils import cached_file

    try:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError:  # whoever loads the model says what is wrong with the path
        return None
    return None if file is None else Path(file)
