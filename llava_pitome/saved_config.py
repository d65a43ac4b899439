"""Merge configs in folders and hub repositories: where they are saved, as plain dicts."""

import json
from pathlib import Path
from typing import Any

FILE = "token_merging.json"  # where `MergeConfig.save_pretrained` writes a config
KEY = "token_merging"  # the attribute of a model's config that holds one


def saved_config(path: str | Path, **hub: Any) -> dict[str, Any] | None:
    """The dict of the merge config saved in a folder or hub repository; None where there is none.

    Args:
        path: a folder or a hub id.
        **hub: as for `MergeConfig.from_pretrained`.
    """
    own = hub_file(path, FILE, **hub)
    if own is not None:
        return json.loads(own.read_text())
    model = hub_file(path, "config.json", **hub)
    return None if model is None else json.loads(model.read_text()).get(KEY)


def hub_file(path: str | Path, name: str, **hub: Any) -> Path | None:
    """The local path of a file in a folder or hub repository; None where it, or the repository, is not there.

    Args:
        path: a folder or a hub id.
        name: of the file.
        **hub: revision, token, cache_dir, subfolder, local_files_only, ...
    """
    if Path(path).is_dir():
        file = Path(path) / hub.get("subfolder", "") / name
        return file if file.exists() else None
    from transformers.utils import cached_file

    try:
        file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError:  # loading the model raises with the reason
        return None
    return None if file is None else Path(file)
