"""Merge configs in folders and hub repositories: where they are saved, as plain dicts."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILE = "token_merging.json"  # where `MergeConfig.save_pretrained` writes a config
KEY = "token_merging"  # the attribute of a model's config that holds one
ADAPTER_CONFIG = "adapter_config.json"  # peft's
CARD = "README.md"  # the model card, into which peft writes the tags of the model whose adapter it saves
TAG = "token_merging:"  # begins the tag that holds a config, as JSON


def saved_configs(path: str | Path, **hub: Any) -> list[dict[str, Any]]:
    """The dicts of the merge configs saved in a folder or hub repository.

    An adapter's are in token_merging.json and in a tag of its model card; both are returned, for the caller
    to compare. A full model's is in token_merging.json, or else in config.json.

    Args:
        path: a folder or a hub id.
        **hub: as for `MergeConfig.from_pretrained`.

    Raises:
        ValueError: a file or tag that holds no dict in JSON; the file is named.
    """
    own = hub_file(path, FILE, **hub)
    found = [] if own is None else [read_dict(own)]
    if hub_file(path, ADAPTER_CONFIG, **hub) is not None:
        card = hub_file(path, CARD, **hub)
        return found + ([] if card is None else _from_tags(card))
    model = None if found else hub_file(path, "config.json", **hub)
    if model is not None and (values := read_dict(model).get(KEY)) is not None:
        found.append(_checked(values, f"{KEY} in {model}"))
    return found


def read_dict(file: Path) -> dict[str, Any]:
    """The dict that a JSON file holds.

    Raises:
        ValueError: it is no file, or holds something else; the file is named.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no file")
    return _parsed(file.read_bytes(), str(file))


def _parsed(text: str | bytes, where: str) -> dict[str, Any]:
    """The dict that JSON text holds; ValueError, naming where it was found, if it holds something else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} holds no JSON: {error}") from error
    return _checked(values, where)


def _checked(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds {values!r}; it must be a dict")
    return values


def write_config(folder: Path, values: dict[str, Any], tag: str) -> None:
    """Writes a config to `folder`/token_merging.json, and in place of the one in the folder's model card.

    Args:
        folder: is made where it is not there.
        values: of the config.
        tag: its tag, see `to_tag`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(values, indent=1) + "\n")
    card = folder / CARD
    metadata = _metadata(card)
    if any(map(_is_config, _listed(metadata.get("tags")))):
        from huggingface_hub import metadata_save

        others = [other for other in metadata["tags"] if not _is_config(other)]
        metadata_save(card, metadata | {"tags": [*others, tag]})


def to_tag(values: dict[str, Any]) -> str:
    """The tag of a config's dict."""
    return TAG + json.dumps(values, sort_keys=True)


def _from_tags(card: Path) -> list[dict[str, Any]]:
    """The dicts of the configs among the tags of a model card; ValueError for one that is no dict in JSON."""
    tags = filter(_is_config, _listed(_metadata(card).get("tags")))
    return [_parsed(tag.removeprefix(TAG), f"the tag {tag!r} in {card}") for tag in tags]


def without_configs(tags: Iterable[str] | None) -> list[str]:
    """The other tags."""
    return [tag for tag in _listed(tags) if not _is_config(tag)]


def _is_config(tag: Any) -> bool:
    return isinstance(tag, str) and tag.startswith(TAG)


def _listed(tags: Any) -> list[Any]:
    return tags if isinstance(tags, list) else []


def _metadata(card: Path) -> dict[str, Any]:
    """The metadata of a model card; empty where it has none, or none that can be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    if not card.is_file():
        return {}
    try:
        return metadata_load(card) or {}
    except (YAMLError, ValueError):  # people edit model cards; weights load without them
        return {}


def hub_file(path: str | Path, name: str, **hub: Any) -> Path | None:
    """The local path of a file in a folder or hub repository; None where it, or the repository, is not there.

    Args:
        path: a folder or a hub id.
        name: of the file.
        **hub: revision, token, cache_dir, subfolder, local_files_only, ...
    """
    if Path(path).is_dir():
        file = Path(path) / (hub.get("subfolder") or "") / name
        return file if file.exists() else None
    from transformers.utils import cached_file

    try:
        file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError:  # loading the model raises with the reason
        return None
    return None if file is None else Path(file)
