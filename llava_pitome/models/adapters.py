"""Adapters of merging LLaVAs: the base model and the merge config saved in an adapter's folder.

`PeftModel.save_pretrained` writes the tags of its base model (`PreTrainedModel.model_tags`) into the model
card. A model that merges has its config among them, so that adapters that peft, the Trainer or TRL save say
how they merged.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from llava_pitome.config import MergeConfig, saved
from llava_pitome.saved_config import ADAPTER_CONFIG, CARD, FILE, hub_file, read_dict, without_configs

BASE = "base_model_name_or_path"  # peft's key
DEFAULT = "default"  # the name of the adapter that peft saves in the folder itself


def add_tag(model: nn.Module, config: MergeConfig) -> None:
    """Adds the tag of a config to a model's own."""
    model.model_tags = [*without_configs(getattr(model, "model_tags", None)), config.tag()]


def remove_tag(model: nn.Module) -> None:
    """Takes the tag of a config from a model's own."""
    others = without_configs(getattr(model, "model_tags", None))
    if others:
        model.model_tags = others
    else:
        vars(model).pop("model_tags", None)  # the class's is None


def save_merge_config(model: nn.Module, config: MergeConfig, folder: Path) -> None:
    """Writes how a model merges into the folder of its adapters, or of its own checkpoint.

    Args:
        model: without wrappers.
        config: how it merges.
        folder: where peft saved the model's adapters; those with a name of their own are in subfolders.
    """
    config.save_pretrained(folder)
    for name in getattr(model, "peft_config", {}):
        if name != DEFAULT and (folder / name / ADAPTER_CONFIG).is_file():
            config.save_pretrained(folder / name)


def save_base_model(folder: Path, base: str) -> None:
    """Writes into an adapter's folder its base model as `load` takes it."""
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(read_dict(file) | {BASE: base}, indent=1) + "\n")


def base_model(path: str, **hub: Any) -> str | None:
    """The base model of an adapter, as peft recorded it; None where the path holds no adapter.

    Args:
        path: a folder or a hub id.
        **hub: hub arguments for its files: revision, token, ...

    Raises:
        ValueError: the adapter does not record its base model, or its config cannot be read.
    """
    file = hub_file(path, ADAPTER_CONFIG, **hub)
    if file is None:
        return None
    base = read_dict(file).get(BASE)
    if not base:
        raise ValueError(f"{ADAPTER_CONFIG} of the adapter {path} has no {BASE}")
    return base


def merge_config(path: str, **hub: Any) -> MergeConfig | None:
    """How an adapter merged, or a full model was saved to; None where a full model does not say.

    A full model without a config is a plain one. The weights of an adapter are wrong under another config
    than they were trained with, so that one without a config is not taken for an unmerged one.

    Args:
        path: a folder or a hub id.
        **hub: hub arguments for its files: revision, token, ...

    Raises:
        ValueError: an adapter that does not say how it merged, or a config that cannot be read.
    """
    config = saved(path, **hub)
    if config is None and hub_file(path, ADAPTER_CONFIG, **hub) is not None:
        raise ValueError(
            f"the adapter {path} does not say how it merged: it has no {FILE}, and its {CARD} no tag with a "
            "merge config. Give the config that it was trained with, ratio=1.0 if it was trained without "
            "merging, as in load(path, MergeConfig(ratio=1.0)); its save_pretrained(path) saves it there"
        )
    return config
