"""What one command will evaluate: which model, on which questions, with and without merging."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from string import Template

import torch

from eval import questions
from eval.labels import merges, where
from eval.sizes import Cost, Sizes, sizes
from llava_pitome import embedded
from llava_pitome.config import MergeConfig
from llava_pitome.embedded import dataset
from llava_pitome.models import checkpoints
from llava_pitome.models import hf_llava as llava

HUB_MODEL = "llava-hf/llava-1.5-7b-hf"


@dataclass(frozen=True)
class Plan:
    """A command, resolved.

    Attributes:
        options: every option's value.
        merging: how the merged model merges.
        model: a hub id or folder.
        tasks: names of lmms-eval tasks.
        output: folder for results.
        sizes: the model without weights.
        announcement: one line that says which model and questions were taken, and how to choose.
        fingerprint: changes with the code, the libraries, the device, the model and the data.
    """

    options: dict
    merging: MergeConfig
    model: str
    tasks: tuple[str, ...]
    output: Path
    sizes: Sizes
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
        if options["dtype"] == "float16" and not cuda and not options["dry_run"]:
            raise ValueError(
                "dtype='float16' is not allowed without CUDA: CPUs take hundreds of times longer; bfloat16"
            )
        model = options["model"]
        if model == "auto":
            model = HUB_MODEL if cuda else embedded.NAME
        model = str(embedded.PATH) if model == embedded.NAME else model
        small = checkpoints.model_path(model) == str(embedded.PATH)  # it, or an adapter to it
        data = options["data"] if options["data"] != "auto" else "embedded" if small else "hub"
        tasks = questions.tasks(options["tasks"], data)
        choice = "choose with model=embedded or model=<hub id or path>"
        try:
            found = sizes(model, options["attention"], built_in=options["dry_run"])
        except ValueError as error:
            raise ValueError(f"{error}\n{choice}") from error
        found.cost(merging, options["text"])  # raises for what the model cannot do
        why = (
            "" if options["model"] != "auto" else f"model=auto, CUDA {'is' if cuda else 'is not'} available: "
        )
        name = "the embedded model" if model == str(embedded.PATH) else model
        announcement = f"{why}{name} on {', '.join(tasks)} ({data}); {choice}"
        if found.built_in:
            announcement += (
                f"\nthe hub cannot be reached: {model} has the sizes written down in eval/sizes.py"
            )
        output = Path(options["output"]).resolve()
        mark = fingerprint(Path(model), Path(data), "cuda" if cuda else "cpu")
        return cls(options, merging, model, tasks, output, found, announcement, mark)

    @property
    def idle(self) -> bool:
        """Whether the merged model would be the unmerged one."""
        plain, merged = self.cost(None), self.cost(self.merging)
        return plain[:2] == merged[:2] and self.merging.resize is None

    def cost(self, merging: MergeConfig | None) -> Cost:
        """Tokens and FLOPs of a prompt."""
        return self.sizes.cost(merging, self.options["text"])

    def runs(self) -> dict[str, MergeConfig | None]:
        """Label to config of every model to evaluate, the unmerged one first."""
        o = self.options
        plain = {"dtype": "auto", "quantization": None, "blank": False}
        extra = "".join(f", {k} {o[k]}" for k, v in plain.items() if o[k] != v)
        how = f"{self.merging.method} ({o['recipe']})" if merges(self.merging) else "unmerged"
        merged = f"{how}, {where(self.merging, o['merging'] or {})}{extra}"
        runs = {f"unmerged{extra}": None} if o["baseline"] or self.idle else {}
        return runs if self.idle else runs | {merged: self.merging}

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
        lines = [f"{label}: {told(self.cost(c))}" for label, c in self.runs().items()]
        text = f"FLOPs by formula, for one picture and {self.options['text']} further tokens (text=)"
        return "\n".join([*lines, text, json.dumps(self.merging.to_dict())])

    @property
    def local(self) -> Path:
        """Where questions that do not come from the hub are kept."""
        return Path(self.options["questions"] or self.output / "cache").resolve()

    def embedded_folder(self) -> Path:
        """Where the embedded questions are written, by their version."""
        return self.local / f"embedded-{dataset.version()}"

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
        for template in questions.TASKS.glob("*.yaml"):
            (folder / template.name).write_text(Template(template.read_text()).substitute(values))
        return folder


def told(cost: Cost) -> str:
    """Tokens and FLOPs for people."""
    f = cost.flops
    parts = {"tower": f.tower, "projector": f.projector, "LLM": f.llm, "total": f.total}
    flops = ", ".join(f"{name} {n / 1e9:.4g}" for name, n in parts.items())
    return (
        f"{cost.tokens} image tokens, {cost.llm_tokens:.4g} in front of an LLM layer on average; "
        f"GFLOPs: {flops}"
    )


@cache
def fingerprint(model: Path, data: Path, device: str) -> str:
    """Eight bytes of everything outside the options that answers depend on, as hex."""
    digest = hashlib.sha256(device.encode())
    for package in ("torch", "transformers", "lmms-eval"):
        digest.update(f"{package} {version(package)}".encode())
    code = Path(llava.__file__).parent
    weights = list(model.glob("*.*"))
    whole = Path(checkpoints.model_path(str(model)))
    if whole != model:  # an adapter, whose folder also holds a card and what was measured
        digest.update(f"peft {version('peft')}".encode())
        weights = [*model.glob("adapter_*"), *model.glob("token_merging.json"), *whole.glob("*.*")]
    for file in sorted([*code.glob("**/*.py"), *weights, *data.glob("**/*.parquet")]):
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
