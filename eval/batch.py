"""Runs of eval/run.py in processes of their own, side by side; what is finished is not run again."""

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
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG, LOCK = "log.txt", "lock"
IDLE = ("output", "questions", "dry_run", "processes", "text", "baseline")  # options that change no answer
DAY = 86400.0  # seconds
TOLD = 25  # lines of a log


class Job(NamedTuple):
    """One process.

    Attributes:
        name: what it is called.
        command: a Python file and its words.
        result: the JSON file that it writes at its end; log and lock go beside it.
        mark: what that file then says of itself, see `mark`.
    """

    name: str
    command: tuple[str, ...]
    result: Path
    mark: dict

    @property
    def finished(self) -> bool:
        """Whether its result is there, and is what it would write."""
        try:
            found = json.loads(self.result.read_text())
            return mark(found["options"], found["fingerprint"]) == self.mark
        except (OSError, json.JSONDecodeError, KeyError):
            return False


def mark(options: dict, fingerprint: str) -> dict:
    """What tells the result of one command from another's."""
    told = {k: v for k, v in options.items() if k not in IDLE}
    return json.loads(json.dumps({"options": told, "fingerprint": fingerprint}, default=str))


def slots(count: int | None) -> list[dict[str, str]]:
    """The environment of each process that may run at a time: one a GPU, or one a core.

    Raises:
        ValueError: more processes than GPUs.
    """
    if torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
        if count is not None and count > len(names):
            raise ValueError(f"jobs={count} is not allowed: there are {len(names)} GPUs, and each takes one")
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names[:count]]
    cores = os.cpu_count() or 1
    count = count or cores
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(cores // count, 1)))}] * count


def run(jobs: Sequence[Job], environments: Sequence[dict[str, str]]) -> dict[str, str]:
    """Runs what is not finished, with a bar; the end of the log of each job that failed, by name."""
    left = [job for job in jobs if not job.finished]
    failed: dict[str, str] = {}
    free: queue.SimpleQueue = queue.SimpleQueue()
    for environment in environments:
        free.put(environment)
    with _bar() as bar:
        before = f" ({len(jobs) - len(left)} were finished before)" if len(left) < len(jobs) else ""
        task = bar.add_task(f"{len(left)} to run{before}", total=len(left))
        pool = ThreadPoolExecutor(len(environments))
        try:
            running = {pool.submit(_one, job, free): job for job in left}
            for future in as_completed(running):
                job, said = running[future], future.result()
                if said is not None:
                    failed[job.name] = said
                bar.advance(task)
                seconds = bar.tasks[0].time_remaining
                more = f", about {_spoken(seconds)} left" if seconds else ""
                bar.console.print(f"{job.name}: {'FAILED' if said else 'done'}{more}", highlight=False)
        finally:
            pool.shutdown(cancel_futures=True)
    return failed


def _spoken(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def _bar() -> Progress:
    """A bar with the time that has passed and, once two runs are through, the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), speed_estimate_period=DAY, console=Console()
    )


def _one(job: Job, free: queue.SimpleQueue) -> str | None:
    """Runs a job; what it said at its end where it failed."""
    folder = job.result.parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process whose sweep was killed may be at it, and holds the lock
        if job.finished:
            return None
        environment = free.get()
        try:
            with (folder / LOG).open("w") as log:
                ran = subprocess.run(
                    [sys.executable, *job.command],
                    env=os.environ | environment,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=(lock.fileno(),),
                    check=False,
                )
        finally:
            free.put(environment)
    if ran.returncode:
        return f"exit status {ran.returncode}\n{_end(folder / LOG)}"
    if not job.finished:
        return "it ended well, but not with what was asked for: code, data or options changed meanwhile"
    return None


def _end(log: Path) -> str:
    """The last lines of a log, without what bars have written over."""
    text = log.read_bytes().decode(errors="replace")
    lines = [line.rsplit("\r", 1)[-1] for line in text.split("\n")]
    return "\n".join([line for line in lines if line.strip()][-TOLD:])
