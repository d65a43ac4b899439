"""What one command will evaluate: which model, on which questions, with and without merging."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch

from llava_pitome import embedded, llava
from llava_pitome.config import MergeConfig
from llava_pitome.embedded import dataset

HUB_MODEL = "llava-hf/llava-1.5-7b-hf"
TASKS = Path(__file__).parent / "tasks"
EMBEDDED_TASK = "embedded_vqa"


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
    """

    options: dict
    merging: MergeConfig
    model: str
    tasks: tuple[str, ...]
    output: Path
    patches: int
    tokens: int
    announcement: str

    @classmethod
    def make(cls, options: dict, merging: MergeConfig) -> "Plan":
        """Resolves `auto`, and checks model, data and token counts from their configs alone.

        Raises:
            ValueError: whatever does not fit together.
        """
        cuda = torch.cuda.is_available()
        small = options["model"] == "embedded" or (options["model"] == "auto" and not cuda)
        model = str(embedded.PATH) if small else HUB_MODEL if options["model"] == "auto" else options["model"]
        data = options["data"] if options["data"] != "auto" else "embedded" if small else "hub"
        tasks = _tasks(options["tasks"], data)
        patches, layers = llava.counts(model)
        tokens = merging.lengths(patches, layers)[-1]
        why = (
            "" if options["model"] != "auto" else f"model=auto, CUDA {'is' if cuda else 'is not'} available: "
        )
        name = "the embedded model" if small else model
        choice = "choose with model=embedded or model=<hub id or path>"
        announcement = f"{why}{name} on {', '.join(tasks)} ({data}); {choice}"
        return cls(
            options, merging, model, tasks, Path(options["output"]).resolve(), patches, tokens, announcement
        )

    def runs(self) -> dict[str, MergeConfig | None]:
        """Label to config of every model to evaluate, the unmerged one first."""
        o = self.options
        amount = f"tokens {o['tokens']}" if o["tokens"] is not None else f"ratio {o['ratio']}"
        merged = f"{o['method'] or self.merging.method} ({o['recipe']}), {amount}"
        runs = {"unmerged": None} if o["baseline"] or self.tokens == self.patches else {}
        return runs if self.tokens == self.patches else runs | {merged: self.merging}

    def model_args(self, merging: MergeConfig | None) -> dict:
        """What LlavaPitome is made with, by value: lmms-eval caches answers under it."""
        o = self.options
        weights = Path(self.model) / "model.safetensors"
        return {
            "pretrained": self.model,
            "merging": None if merging is None else merging.to_dict(),
            "dtype": o["dtype"], "quantization": o["quantization"], "batch_size": o["batch_size"],
            "attn_implementation": o["attention"], "blank": o["blank"],
            "weights": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
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


def _tasks(names: tuple[str, ...], data: str) -> tuple[str, ...]:
    """The tasks by the name under which they read the data that was asked for."""
    if data == "hub":
        return names
    if names != ("vqav2_val",):
        raise ValueError(
            f"data={data} holds questions in VQAv2's form; tasks={','.join(names)} needs data=hub"
        )
    if data == "embedded":
        return (EMBEDDED_TASK,)
    check_folder(Path(data))
    return ("vqav2_val_folder",)


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
