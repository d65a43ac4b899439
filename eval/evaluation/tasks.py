"""Which of lmms-eval's tasks an evaluation runs, and where their questions come from."""

import difflib
import sys
from functools import cache
from pathlib import Path
from string import Template

from llava_pitome import embedded

TEMPLATES = Path(__file__).parents[1] / "tasks"
EMBEDDED_TASKS = {embedded.NAME: "embedded_vqa", embedded.NAME_NEXT: "embedded_next_vqa"}  # by data
FOLDER_TASK = "vqav2_val_folder"


def tasks_for(names: tuple[str, ...], data: str) -> tuple[str, ...]:
    """The tasks that read this data.

    Raises:
        ValueError: a task that lmms-eval does not have, or that cannot read the data.
    """
    if data == "hub":
        if unknown := [n for n in names if n != "vqav2_val" and n not in known_tasks()]:
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


@cache
def known_tasks() -> tuple[str, ...]:
    """The names of lmms-eval's single tasks and of those in eval/tasks."""
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    return (*TaskManager("ERROR").all_subtasks, *(t.stem for t in TEMPLATES.glob("*.yaml")))


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
