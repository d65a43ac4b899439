"""What one command will evaluate: which model, on which questions, with and without merging."""

import difflib
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from string import Template

import torch

from llava_pitome import embedded, llava
from llava_pitome.config import MergeConfig
from llava_pitome.embedded import dataset

HUB_MODEL = "llava-hf/llava-1.5-7b-hf"
TASKS = Path(__file__).parent / "tasks"
EMBEDDED_TASK, FOLDER_TASK = "embedded_vqa", "vqav2_val_folder"


@dataclass(frozen=True)
class Plan:
    """A command, resolved.

    Attributes:
        options: every option's value.
        merging: how the merged model merges.
        model: a hub id or folder.
        tasks: names of lmms-eval tasks.
        output: folder for results.
        patches: image tokens of the unmerged model.
        tokens: image tokens of the merged model.
        announcement: one line that says which model and questions were taken, and how to choose.
        fingerprint: changes with the code, the libraries, the device, the model and the data.
    """

    options: dict
    merging: MergeConfig
    model: str
    tasks: tuple[str, ...]
    output: Path
    patches: int
    tokens: int
    announcement: str
    fingerprint: str

    @classmethod
    def make(cls, options: dict, merging: MergeConfig) -> "Plan":
        """Resolves `auto`, and checks model, data and token counts from their configs alone.

        Raises:
            ValueError: whatever does not fit together.
        """
        cuda = torch.cuda.is_available()
        if cuda and options["processes"] > torch.cuda.device_count():
            raise ValueError(
                f"processes={options['processes']} is not allowed: 1 to {torch.cuda.device_count()} GPUs"
            )
        if options["dtype"] == "float16" and not cuda:
            raise ValueError(
                "dtype='float16' is not allowed without CUDA: CPUs take hundreds of times longer; bfloat16"
            )
        small = options["model"] == "embedded" or (options["model"] == "auto" and not cuda)
        model = str(embedded.PATH) if small else HUB_MODEL if options["model"] == "auto" else options["model"]
        data = options["data"] if options["data"] != "auto" else "embedded" if small else "hub"
        tasks = _tasks(options["tasks"], data)
        choice = "choose with model=embedded or model=<hub id or path>"
        try:
            patches, layers = llava.counts(model)
        except ValueError as error:
            raise ValueError(f"{error}\n{choice}") from error
        tokens = merging.lengths(patches, layers)[-1]
        why = (
            "" if options["model"] != "auto" else f"model=auto, CUDA {'is' if cuda else 'is not'} available: "
        )
        name = "the embedded model" if small else model
        announcement = f"{why}{name} on {', '.join(tasks)} ({data}); {choice}"
        output = Path(options["output"]).resolve()
        mark = fingerprint(Path(model), Path(data), "cuda" if cuda else "cpu")
        return cls(options, merging, model, tasks, output, patches, tokens, announcement, mark)

    def runs(self) -> dict[str, MergeConfig | None]:
        """Label to config of every model to evaluate, the unmerged one first."""
        o = self.options
        amount = f"tokens {o['tokens']}" if o["tokens"] is not None else f"ratio {o['ratio']}"
        plain = {"dtype": "auto", "quantization": None, "blank": False}
        extra = "".join(f", {k} {o[k]}" for k, v in plain.items() if o[k] != v)
        merged = f"{o['method'] or self.merging.method} ({o['recipe']}), {amount}{extra}"
        runs = {f"unmerged{extra}": None} if o["baseline"] or self.tokens == self.patches else {}
        return runs if self.tokens == self.patches else runs | {merged: self.merging}

    def model_args(self, merging: MergeConfig | None) -> dict:
        """What LlavaPitome is made with, by value: lmms-eval caches answers under it."""
        o = self.options
        return {
            "pretrained": self.model,
            "merging": None if merging is None else merging.to_dict(),
            "dtype": o["dtype"], "quantization": o["quantization"], "batch_size": o["batch_size"],
            "attn_implementation": o["attention"], "blank": o["blank"], "fingerprint": self.fingerprint,
        }  # fmt: skip

    def describe(self) -> str:
        """What would run, for people."""
        lines = [
            f"{label}: {self.patches if c is None else self.tokens} image tokens"
            for label, c in self.runs().items()
        ]
        return "\n".join([*lines, json.dumps(self.merging.to_dict())])

    def embedded_folder(self) -> Path:
        """Where the embedded questions are written, by their version."""
        return self.output / "cache" / f"embedded-{dataset.version()}"

    def task_folder(self) -> Path:
        """Writes the task wrappers of eval/tasks with their paths filled in, and returns their folder."""
        import lmms_eval.tasks

        folder = self.output / "tasks"
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "LMMS_EVAL_TASKS": str(Path(lmms_eval.tasks.__file__).parent),
            "DATA": str(Path(self.options["data"]).resolve()),
            "EMBEDDED": str(self.embedded_folder()),
        }
        for template in TASKS.glob("*.yaml"):
            (folder / template.name).write_text(Template(template.read_text()).substitute(values))
        return folder


def fingerprint(model: Path, data: Path, device: str) -> str:
    """Eight bytes of everything outside the options that answers depend on, as hex."""
    digest = hashlib.sha256(device.encode())
    for package in ("torch", "transformers", "lmms-eval"):
        digest.update(f"{package} {version(package)}".encode())
    code = Path(llava.__file__).parent
    for file in sorted([*code.glob("**/*.py"), *model.glob("*.*"), *data.glob("**/*.parquet")]):
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _tasks(names: tuple[str, ...], data: str) -> tuple[str, ...]:
    """The tasks by the name under which they read the data that was asked for."""
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
    if data == "embedded":
        return (EMBEDDED_TASK,)
    check_folder(Path(data))
    return (FOLDER_TASK,)


@cache
def known_tasks() -> tuple[str, ...]:
    """The names of lmms-eval's single tasks and of the wrappers in eval/tasks."""
    from lmms_eval.tasks import TaskManager

    return (*TaskManager("ERROR").all_subtasks, *(t.stem for t in TASKS.glob("*.yaml")))


def check_folder(folder: Path) -> None:
    """Raises ValueError unless the folder holds a whole validation split in parquet files."""
    import pyarrow
    from pyarrow import parquet

    files = sorted(folder.glob("**/validation*.parquet"))
    if not files:
        raise ValueError(
            f"data={folder} holds no validation*.parquet; allowed: auto | hub | embedded | such a folder"
        )
    for file in files:
        try:
            parquet.ParquetFile(file).close()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{file} is damaged or only half written: {error}") from error
