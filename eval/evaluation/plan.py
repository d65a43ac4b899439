"""What one command evaluates: which model on which questions, merged and unmerged."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

import llava_pitome
from eval.command import FIELDS
from eval.evaluation.model_costs import Cost, ModelShapes, model_shapes
from eval.evaluation.tasks import EMBEDDED_TASKS, check_frames, tasks_for
from eval.naming import config_label
from llava_pitome import embedded
from llava_pitome.config import MergeConfig, combined
from llava_pitome.embedded import dataset
from llava_pitome.models import checkpoints

HUB_MODEL = "llava-hf/llava-1.5-7b-hf"


@dataclass(frozen=True)
class EvaluationPlan:
    """A command with every default resolved.

    Attributes:
        options: every option's value.
        merging: how the merged model merges.
        model: a hub id or folder.
        tasks: names of lmms-eval tasks.
        output: folder for results.
        shapes: the model without weights.
        announcement: one line that names model and questions, and the options that choose them.
        fingerprint: changes with the code, the libraries, the device, the model and the data.
    """

    options: dict
    merging: MergeConfig
    model: str
    tasks: tuple[str, ...]
    output: Path
    shapes: ModelShapes
    announcement: str
    fingerprint: str

    @classmethod
    def make(cls, options: dict, merging: MergeConfig) -> "EvaluationPlan":
        """Resolves `auto`, and checks model, data and token counts from their configs alone.

        Raises:
            ValueError: values that contradict each other, or do not fit the model.
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
        model, reason = options["model"], ""
        if model == "auto":
            model = HUB_MODEL if cuda else embedded.NAME
            reason = f"model=auto, CUDA {'is' if cuda else 'is not'} available: "
        model = embedded.folder(model) if model in embedded.PATHS else model
        own = embedded_name(checkpoints.model_path(model))  # of itself, or of an adapter's base model
        data = options["data"] if options["data"] != "auto" else own or "hub"
        tasks = tasks_for(options["tasks"], data)
        check_frames(tasks, data, options["frames"])
        choice = "choose with model=embedded or model=<hub id or path>"
        try:
            shapes = model_shapes(model, options["attention"], built_in=options["dry_run"])
        except ValueError as error:
            raise ValueError(f"{error}\n{choice}") from error
        shapes.cost(merging, options["text"], options["frames"])  # raises where it cannot merge like this
        names = {embedded.NAME: "the embedded model", embedded.NAME_NEXT: "the embedded LLaVA-NeXT"}
        name = names.get(embedded_name(model), model)
        announcement = f"{reason}{name} on {', '.join(tasks)} ({data}); {choice}"
        if shapes.built_in:
            announcement += f"\nthe hub cannot be reached: the shapes of {model} are those built in"
        device = "cuda" if cuda else "cpu"
        output, digest = Path(options["output"]).resolve(), fingerprint(Path(model), Path(data), device)
        return cls(options, merging, model, tasks, output, shapes, announcement, digest)

    @property
    def is_unmerged(self) -> bool:
        """Whether the config merges nothing and resizes nothing."""
        plain, merged = self.cost(None), self.cost(self.merging)
        return plain[:2] == merged[:2] and self.merging.resize is None

    @property
    def model_name(self) -> str:
        """The model in files that are published: without this machine's paths."""
        return embedded_name(self.model) or self.model

    def cost(self, merging: MergeConfig | None) -> Cost:
        """Tokens and FLOPs of a prompt."""
        return self.shapes.cost(merging, self.options["text"], self.options["frames"])

    @property
    def flops_text(self) -> str:
        """What the FLOPs of a dry run are those of."""
        what, text = self.shapes.describe_input(self.options["frames"]), self.options["text"]
        return f"FLOPs by formula, for {what} and {text} text tokens (text=)"

    def runs(self) -> dict[str, MergeConfig | None]:
        """The config of every model to evaluate by its label, the unmerged one first."""
        o, config = self.options, self.merging
        defaults = {"dtype": "auto", "quantization": None, "blank": False, "thumbnail": False}
        suffix = "".join(f", {k} {o[k]}" for k, v in defaults.items() if o[k] != v)
        runs = {f"unmerged{suffix}": None} if o["baseline"] or self.is_unmerged else {}
        if self.is_unmerged:
            return runs
        merges = config.merges_in_tower or config.merges_in_prefix or config.decoder
        method = f"{config.method} ({o['recipe']})" if merges else "unmerged"
        changes = combined({name: o[name] for name in FIELDS}, o["merging"])
        return runs | {f"{method}, {config_label(config, changes)}{suffix}": config}

    def model_args(self, merging: MergeConfig | None) -> dict:
        """The arguments of LlavaPitome, by value: they are the key of lmms-eval's response cache."""
        o = self.options
        return {
            "pretrained": self.model,
            "merging": None if merging is None else merging.to_dict(),
            "dtype": o["dtype"], "quantization": o["quantization"], "batch_size": o["batch_size"],
            "attn_implementation": o["attention"], "blank": o["blank"], "thumbnail": o["thumbnail"],
            "frames": o["frames"], "fingerprint": self.fingerprint,
        }  # fmt: skip

    def describe(self) -> str:
        """What would run, in words."""
        lines = [f"{label}: {self.cost(config).describe()}" for label, config in self.runs().items()]
        return "\n".join([*lines, self.flops_text, json.dumps(self.merging.to_dict())])

    @property
    def data_folder(self) -> Path:
        """Where questions that do not come from the hub are stored."""
        return Path(self.options["questions"] or self.output / "cache").resolve()

    @property
    def embedded_folder(self) -> Path:
        """Where the embedded questions are stored, by their version."""
        name = self.embedded_data or embedded.NAME
        return self.data_folder / f"{name}-{dataset.VERSIONS[name]}"

    @property
    def embedded_data(self) -> str | None:
        """The embedded model whose questions are evaluated; None for other questions."""
        return next((name for name, task in EMBEDDED_TASKS.items() if self.tasks == (task,)), None)

    def write_embedded_data(self) -> None:
        """Writes the embedded questions, if they are evaluated."""
        if self.embedded_data is not None:
            dataset.write(self.embedded_folder, model=self.embedded_data)

    def journal(self, merging: MergeConfig | None) -> Path:
        """The file for the timings of one model's batches; each process appends its rank to the name."""
        return self.output / "cache" / "journals" / self.cache_key(merging)

    def cache_key(self, merging: MergeConfig | None) -> str:
        """A hash of the model, the config and the tasks."""
        work = json.dumps([self.model_args(merging), self.tasks], sort_keys=True)
        return hashlib.sha256(work.encode()).hexdigest()[:16]


def embedded_name(folder: str) -> str | None:
    """The name of the embedded model in a folder; None for another model."""
    return next((name for name, path in embedded.PATHS.items() if folder == str(path)), None)


@cache
def fingerprint(model: Path, data: Path, device: str) -> str:
    """A hash of everything besides the options that answers depend on, 16 hex digits."""
    digest = hashlib.sha256(device.encode())
    for package in ("torch", "transformers", "lmms-eval"):
        digest.update(f"{package} {version(package)}".encode())
    code = Path(llava_pitome.__file__).parent
    weights = list(model.glob("*.*"))
    base = Path(checkpoints.model_path(str(model)))
    if base != model:  # an adapter, whose folder also holds a model card and training logs
        digest.update(f"peft {version('peft')}".encode())
        weights = [*model.glob("adapter_*"), *model.glob("token_merging.json"), *base.glob("*.*")]
    for file in sorted([*code.glob("**/*.py"), *weights, *data.glob("**/*.parquet")]):
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
