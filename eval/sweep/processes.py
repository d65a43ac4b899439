"""Commands run in parallel processes; those that have finished are not run again."""

import fcntl
import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from eval.command import child_environment

LOG, LOCK = "log.txt", "lock"
NEUTRAL = ("output", "questions", "dry_run", "processes", "text", "baseline")  # options that change no answer
DAY = 86400.0  # seconds
LOG_LINES = 25  # of a failed process, to print


class Job(NamedTuple):
    """One process.

    Attributes:
        name: unique, for messages.
        command: the words after `python`.
        result: the JSON file that it writes at its end; its log and its lock are beside it.
        identity: of that result, see `identity`.
    """

    name: str
    command: tuple[str, ...]
    result: Path
    identity: dict

    @property
    def is_finished(self) -> bool:
        """Whether its result exists and belongs to these options, code and data."""
        try:
            found = json.loads(self.result.read_text())
            return identity(found["options"], found["fingerprint"]) == self.identity
        except (OSError, json.JSONDecodeError, KeyError):
            return False


def identity(options: dict, fingerprint: str) -> dict:
    """What distinguishes the result of one command from another's."""
    effective = {k: v for k, v in options.items() if k not in NEUTRAL}
    return json.loads(json.dumps({"options": effective, "fingerprint": fingerprint}, default=str))


def environments(count: int | None) -> list[dict[str, str]]:
    """The environment of each of `count` parallel processes; by default one per GPU, or one per core.

    Raises:
        ValueError: more processes than GPUs.
    """
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        if count is not None and count > len(names):
            raise ValueError(f"jobs={count} is not allowed: there are {len(names)} GPUs, and each takes one")
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names[:count]]
    cores = os.cpu_count() or 1
    count = count or cores
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(cores // count, 1)))}] * count


def run_jobs(jobs: Sequence[Job], environments: Sequence[dict[str, str]]) -> dict[str, str]:
    """Runs every unfinished job with a progress bar; returns the end of each failed job's log by name."""
    left = [job for job in jobs if not job.is_finished]
    failed: dict[str, str] = {}
    free: queue.SimpleQueue = queue.SimpleQueue()
    for environment in environments:
        free.put(environment)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), speed_estimate_period=DAY) as bar:
        before = f" ({len(jobs) - len(left)} were finished before)" if len(left) < len(jobs) else ""
        task = bar.add_task(f"{len(left)} to run{before}", total=len(left))
        pool = ThreadPoolExecutor(len(environments))
        try:
            running = {pool.submit(_run_one, job, free): job for job in left}
            for future in as_completed(running):
                job, error = running[future], future.result()
                if error is not None:
                    failed[job.name] = error
                bar.advance(task)
                seconds = bar.tasks[0].time_remaining
                more = f", about {seconds / 60:.1f} min left" if seconds else ""
                bar.console.print(f"{job.name}: {'FAILED' if error else 'done'}{more}", highlight=False)
        finally:
            pool.shutdown(cancel_futures=True)
    return failed


def _run_one(job: Job, free: queue.SimpleQueue) -> str | None:
    """Runs a job; the end of its log where it failed."""
    folder = job.result.parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held by the job's process, which outlives a sweep that is killed
        if job.is_finished:
            return None
        environment = free.get()
        try:
            with (folder / LOG).open("w") as log:
                process = subprocess.run(
                    [sys.executable, *job.command],
                    env=child_environment(environment),
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=(lock.fileno(),),
                    check=False,
                )
        finally:
            free.put(environment)
    if process.returncode:
        return f"exit status {process.returncode}\n{_log_end(folder / LOG)}"
    if not job.is_finished:
        return "its result is of other code, data or options, which changed while it ran"
    return None


def _log_end(log: Path) -> str:
    """The last lines of a log, without the overwritten states of progress bars."""
    lines = log.read_bytes().decode(errors="replace").split("\n")
    lines = [line.rsplit("\r", 1)[-1] for line in lines]
    return "\n".join([line for line in lines if line.strip()][-LOG_LINES:])
