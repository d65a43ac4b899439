"""Runs an evaluation through lmms-eval: answers are cached as they are generated, results come at the end."""

import argparse
import errno
import logging
import os
import shutil
import sqlite3
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from eval.evaluation import results
from eval.evaluation.plan import EvaluationPlan
from eval.evaluation.tasks import FOLDER_TASK, write_tasks
from llava_pitome.config import MergeConfig

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def evaluate(plan: EvaluationPlan) -> None:
    """Evaluates every model of the plan, prints the table and writes the results."""
    is_main = os.environ.get("RANK", "0") == "0"
    _configure_logging()
    rows = []
    with _ExplainDiskErrors(plan.output):
        plan.output.mkdir(parents=True, exist_ok=True)
        tasks = plan.output / "tasks"
        if is_main:  # of several processes, the others wait and read
            write_tasks(tasks, Path(plan.options["data"]), plan.embedded_folder)
            plan.write_embedded_data()
        if _is_local(plan):  # the cache of the hub's data sets is shared, that of local ones is not
            import datasets

            datasets.config.HF_DATASETS_CACHE = plan.data_folder / "datasets"
        _wait_for_all_processes()
        for label, merging in plan.runs().items():
            if is_main:
                print(f"{label}: {plan.cost(merging).tokens} image tokens", flush=True)
            found = _run_lmms_eval(plan, label, merging, tasks)
            if is_main:
                rows += results.make_rows(plan, label, merging, found)
                results.write_answers(plan.output, label, found)
        if is_main:
            results.print_table(rows)
            print(f"written to {results.write(plan, rows)}")


def _run_lmms_eval(plan: EvaluationPlan, label: str, merging: MergeConfig | None, tasks: Path) -> dict | None:
    """lmms-eval's results for one model; None on every process but the first.

    Args:
        plan: of the evaluation.
        label: of the model.
        merging: how it merges; None for the unmerged model.
        tasks: the folder with the task files.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from llava_pitome.integrations.lmms_eval import LlavaPitome

    arguments, journal = plan.model_args(merging), plan.journal(merging)
    journal.parent.mkdir(parents=True, exist_ok=True)
    os.environ["LMMS_CACHE_RUN_ID"] = plan.cache_key(merging)  # a resumed run finds its own answers
    loading = {k: v for k, v in arguments.items() if k not in ("merging", "fingerprint")}
    fields = {} if merging is None else {k: v for k, v in merging.to_dict().items() if k != "version"}
    task_manager = TaskManager(
        "ERROR",
        include_path=str(tasks),
        include_defaults=not _is_local(plan),  # hundreds of files, which take seconds to read
        model_name="llava_pitome",
    )
    found = simple_evaluate(
        model=LlavaPitome(**loading, merging=fields, journal=str(journal)),
        model_args=arguments,
        tasks=list(plan.tasks),
        batch_size=plan.options["batch_size"],
        limit=plan.options["limit"],
        use_cache=str(plan.output / "cache"),
        task_manager=task_manager,
        bootstrap_iters=0,
        distributed_executor_backend="torchrun",
        cli_args=argparse.Namespace(
            output_path=str(plan.output), process_with_media=False, reasoning_tags=None
        ),
        verbosity="ERROR",
    )
    if found is not None and any(not found["samples"].get(task) for task in plan.tasks):
        raise RuntimeError(f"lmms-eval returned no samples for {label}")
    return found


def _wait_for_all_processes() -> None:
    """Of several processes, waits until the first one has written tasks and questions."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(backend)
        torch.distributed.barrier()


def _is_local(plan: EvaluationPlan) -> bool:
    """Whether all questions are on this machine, in tasks of eval/tasks."""
    return plan.embedded_data is not None or plan.tasks == (FOLDER_TASK,)


def _configure_logging() -> None:
    """Logs warnings only; an image of a suspicious size is an error."""
    from loguru import logger
    from PIL import Image

    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class _ExplainDiskErrors:
    """Exits with the cause where writing fails, however deep inside a library; answers so far are kept."""

    def __init__(self, output: Path):
        self.output = output

    def __enter__(self) -> None:
        """Does nothing."""

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: Any) -> None:
        cause = _disk_error(error)
        if cause is None:
            return
        free = shutil.disk_usage(self.output if self.output.exists() else Path.cwd()).free // 2**20
        print(
            f"eval: cannot write: {cause}. {free} MiB are free on that disk. Answers so far are kept in "
            f"{self.output / 'cache'}; the same command resumes from them.",
            file=sys.stderr,
        )
        raise SystemExit(1) from error


def _disk_error(error: BaseException | None) -> BaseException | None:
    """The operating system's or SQLite's error in a chain of causes; None where there is none."""
    while error is not None:
        is_sqlite = isinstance(error, sqlite3.OperationalError)
        if is_sqlite or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
            return error
        error = error.__cause__ or error.__context__
    return None
