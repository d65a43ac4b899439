"""Runs a plan through lmms-eval and reports it: answers cached as they come, then the table and the files."""

import argparse
import errno
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from eval import results
from eval.plan import Plan
from eval.questions import EMBEDDED_TASK, FOLDER_TASK
from llava_pitome.embedded import dataset

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # what a disk says no with


def run(plan: Plan) -> int:
    """Evaluates every model of the plan; returns the command's exit status."""
    first = os.environ.get("RANK", "0") == "0"
    _quiet()
    rows = []
    with _Writing(plan.output):
        plan.output.mkdir(parents=True, exist_ok=True)
        if plan.tasks == (EMBEDDED_TASK,) and first:
            dataset.write(plan.embedded_folder())
        _offline(plan)
        _meet()
        for label, merging in plan.runs().items():
            if first:
                print(f"{label}: {plan.cost(merging).tokens} image tokens", flush=True)
            found = _evaluate(plan, label, merging)
            if first:
                rows += results.rows(plan, label, merging, found, _journal(plan, merging))
                results.write_answers(plan.output, label, found)
        if first:
            results.show(rows)
            print(f"written to {results.write(plan, rows)}")
    return 0


def _evaluate(plan: Plan, label: str, merging) -> dict | None:
    """lmms-eval's own result for one model; None on every process but the first."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from llava_pitome.integrations.lmms_eval import LlavaPitome

    arguments = plan.model_args(merging)
    cache, journal = plan.output / "cache", _journal(plan, merging)
    journal.parent.mkdir(parents=True, exist_ok=True)
    os.environ["LMMS_CACHE_RUN_ID"] = _name(
        plan, merging
    )  # so that a stopped run finds its own answers again
    load = {k: v for k, v in arguments.items() if k not in ("merging", "fingerprint")}
    fields = {} if merging is None else {k: v for k, v in merging.to_dict().items() if k != "version"}
    model = LlavaPitome(**load, merging=fields, journal=str(journal))
    extra = argparse.Namespace(output_path=str(plan.output), process_with_media=False, reasoning_tags=None)
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(plan.tasks),
        batch_size=plan.options["batch_size"],
        limit=plan.options["limit"],
        use_cache=str(cache),
        task_manager=TaskManager(
            "ERROR",
            include_path=str(plan.task_folder()),
            include_defaults=not _local(plan),  # hundreds of files, which take seconds to read
            model_name="llava_pitome",
        ),
        bootstrap_iters=0,
        distributed_executor_backend="torchrun",
        cli_args=extra,
        verbosity="ERROR",
    )
    if found is not None and any(not found["samples"].get(task) for task in plan.tasks):
        raise RuntimeError(f"lmms-eval returned no samples for {label}")
    return found


def _name(plan: Plan, merging) -> str:
    """One name for the same work: model, config, tasks."""
    work = json.dumps([plan.model_args(merging), plan.tasks], sort_keys=True)
    return hashlib.sha256(work.encode()).hexdigest()[:16]


def _journal(plan: Plan, merging) -> Path:
    """Where this work's timings go; a process adds its rank."""
    return plan.output / "cache" / "journals" / _name(plan, merging)


def _meet() -> None:
    """Where several processes share the questions: waits until the first has written them."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(backend)
        torch.distributed.barrier()


def _offline(plan: Plan) -> None:
    """Copies of local data lie beside it or in this run's folder; those of the hub's belong to everybody."""
    if _local(plan):
        os.environ["HF_DATASETS_CACHE"] = str(plan.local / "datasets")


def _local(plan: Plan) -> bool:
    """Whether all questions are on this machine, in tasks of eval/tasks."""
    return plan.tasks in ((EMBEDDED_TASK,), (FOLDER_TASK,))


def _quiet() -> None:
    """Leaves warnings that matter; a picture that is suspiciously large is an error."""
    from loguru import logger
    from PIL import Image

    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class _Writing:
    """Names the cause where the disk refuses, however deep inside a library; the answers so far are kept."""

    def __init__(self, output: Path):
        self.output = output

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: Any) -> None:
        refusal = _refusal(error)
        if refusal is None:
            return
        free = shutil.disk_usage(self.output if self.output.exists() else Path.cwd()).free // 2**20
        print(
            f"eval: cannot write: {refusal}. {free} MiB are free there. Answers so far are kept in "
            f"{self.output / 'cache'}; the same command goes on from them.",
            file=sys.stderr,
        )
        raise SystemExit(1) from error


def _refusal(error: BaseException | None) -> BaseException | None:
    """The disk's own error among an error and its causes."""
    while error is not None:
        if isinstance(error, sqlite3.OperationalError) or (
            isinstance(error, OSError) and error.errno in REFUSED
        ):
            return error
        error = error.__cause__ or error.__context__
    return None
