"""Which of lmms-eval's tasks an evaluation runs, and where their questions come from."""

import difflib
import sys
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from llava_pitome import embedded

TEMPLATES = Path(__file__).parents[1] / "tasks"
EMBEDDED_TASKS = {embedded.NAME: "embedded_vqa", embedded.NAME_NEXT: "embedded_next_vqa"}  # by data
FOLDER_TASK = "vqav2_val_folder"


def tasks_for(names: tuple[str, ...], data: str) -> tuple[str, ...]:
    """The tasks that read this data; a group of lmms-eval's stands for its tasks.

    Raises:
        ValueError: a task that lmms-eval does not have, or that cannot read the data.
    """
    if data == "hub":
        if names == ("vqav2_val",):
            return names
        names = tuple(task for name in names for task in _group(name) or (name,))
        if unknown := [n for n in names if n not in known_tasks()]:
            near = [m for n in unknown for m in difflib.get_close_matches(n, known_tasks(), n=1, cutoff=0.0)]
            raise ValueError(
                f"tasks={','.join(unknown)}: lmms-eval has no such task; the nearest is {', '.join(near)}"
            )
        return names
    if names != ("vqav2_val",):
        raise ValueError(
            f"data={data} holds questions in VQAv2's form; tasks={','.join(names)} needs data=hub"
        )
    if data in EMBEDDED_TASKS:
        return (EMBEDDED_TASKS[data],)
    check_folder(Path(data))
    return (FOLDER_TASK,)


def check_frames(names: tuple[str, ...], data: str, frames: int | None) -> None:
    """Raises ValueError where a task has videos and `frames` is not given, or has images and it is."""
    videos = [name for name in names if data == "hub" and _has_videos(name)]
    if videos and frames is None:
        raise ValueError(f"tasks={videos[0]} has videos: say how many frames of each to read, as frames=32")
    if frames is not None and len(videos) < len(names):
        other = next(name for name in names if name not in videos)
        raise ValueError(f"frames={frames} is for tasks with videos; tasks={other} has images")


@cache
def known_tasks() -> tuple[str, ...]:
    """The names of lmms-eval's single tasks and of those in eval/tasks."""
    return (*_task_manager().all_subtasks, *(t.stem for t in TEMPLATES.glob("*.yaml")))


@cache
def _task_manager() -> Any:
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    return TaskManager("ERROR")


@cache
def _group(name: str) -> tuple[str, ...]:
    """The tasks of a group; none for another name, and for groups of groups."""
    config = _config(name)
    members = config.get("task", ()) if "group" in config else ()
    return tuple(members) if all(isinstance(member, str) for member in members) else ()


def _has_videos(name: str) -> bool:
    """Whether the questions of one of lmms-eval's tasks are about videos."""
    return name != "vqav2_val" and bool((_config(name).get("dataset_kwargs") or {}).get("video"))


def _config(name: str) -> dict[str, Any]:
    """The configuration file of one of lmms-eval's tasks or groups, with what it includes; else empty."""
    from lmms_eval.utils import load_yaml_config

    path = _task_manager().task_index.get(name, {}).get("yaml_path", -1)
    return load_yaml_config(path, mode="simple") if isinstance(path, str) else {}


def check_folder(folder: Path) -> None:
    """Raises ValueError unless the folder holds a complete validation split in parquet files."""
    import pyarrow
    from pyarrow import parquet

    files = sorted(folder.glob("**/validation*.parquet"))
    if not files:
        raise ValueError(
            f"data={folder} holds no validation*.parquet; "
            f"allowed: auto | hub | {' | '.join(EMBEDDED_TASKS)} | such a folder"
        )
    for file in files:
        try:
            parquet.ParquetFile(file).close()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{file} is damaged or incomplete: {error}") from error


def write_tasks(folder: Path, data: Path, questions: Path) -> None:
    """Writes the task files of eval/tasks with their paths filled in.

    Args:
        folder: to write to.
        data: the user's folder with questions.
        questions: the folder with the embedded questions of the task that is run.
    """
    import lmms_eval.tasks

    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "LMMS_EVAL_TASKS": Path(lmms_eval.tasks.__file__).parent,
        "DATA": data.resolve(),
        "EMBEDDED": questions,
    }
    for template in TEMPLATES.glob("*.yaml"):
        (folder / template.name).write_text(Template(template.read_text()).substitute(paths))
