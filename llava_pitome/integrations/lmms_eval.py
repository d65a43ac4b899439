"""The lmms-eval model: batches, one shard of the questions per process, answers streamed, errors fatal.

The only file that depends on lmms-eval. The entry point `lmms_eval.models` registers it, so that
`python -m lmms_eval --model llava_pitome --model_args pretrained=...,ratio=0.9` works like eval.run.
"""

import dataclasses
import difflib
import inspect
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import ImageFile
from tqdm import tqdm

from llava_pitome.api import load, remove
from llava_pitome.config import MergeConfig, requested
from llava_pitome.flops import counted, literature
from llava_pitome.integrations.lmms_eval_questions import Question, QuestionReader, as_rgb, sums
from llava_pitome.models.checkpoints import DTYPES, HUB
from llava_pitome.models.hf_llava import find
from llava_pitome.models.image_dedup import encode_once

MANIFEST = ModelManifest("llava_pitome", simple_class_path="llava_pitome.integrations.lmms_eval.LlavaPitome")
IGNORED = ("image_aspect_ratio",)  # preprocessing of the original LLaVA package; the processor decides here
SAMPLING = ("temperature", "top_p", "top_k")
BATCH_LIMIT = "max_batch_size"
FIELDS = tuple(field.name for field in dataclasses.fields(MergeConfig))
LOADING = (  # what `load` passes to `from_pretrained`
    *HUB, "attn_implementation", "device_map", "max_memory", "offload_folder", "offload_buffers", "variant",
    "use_safetensors", "trust_remote_code", "use_kernels",
)  # fmt: skip
PLANNED = ("auto", "balanced", "balanced_low_0", "sequential")  # values of device_map that plan a placement
MAPPED = ("max_memory", "offload_folder", "offload_buffers")  # read for such a placement only
UNSUPPORTED = "llava_pitome answers generate_until tasks only; this task needs {}"


class LlavaPitome(lmms):
    """A LLaVA that merges visual tokens, as a model of lmms-eval."""

    def __init__(
        self,
        pretrained: str = "embedded",
        ratio: float | None = None,
        tokens: int | None = None,
        recipe: str = "paper",
        method: str | None = None,
        merging: dict | str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        blank: bool = False,
        thumbnail: bool = False,
        frames: int | None = None,
        journal: str | None = None,
        **options: Any,
    ):
        """Loads the model.

        Args:
            pretrained: a folder, a hub id, or "embedded".
            ratio: share of the patches that each tower layer keeps; where neither it nor `tokens` nor
                `merging` says how far to merge, nothing merges.
            tokens: image tokens at the input of the language model, instead of a ratio.
            recipe: a named recipe, which `method` and `merging` change.
            method: which tokens merge into which, a name in METHODS.
            merging: further fields of MergeConfig, as a dict or as JSON.
            batch_size: questions per batch.
            device: "cpu", "cuda", "cuda:1", ...; by default the process's own GPU where there is one. With
                device_map, which is given instead, inputs go to the model's first device.
            dtype: a key of DTYPES; "auto" is that of the checkpoint.
            quantization: "4bit", "8bit" or None.
            blank: replace each image by a grey one, to measure what the questions alone reveal.
            thumbnail: reduce each image to the detail of its thumbnail, to measure what the tiles add. The
                size stays, and with it the number of tiles and tokens.
            frames: that are read of each video, evenly spaced; where it is given, several images of a
                question are the frames of a video.
            journal: a file for JSON lines: the FLOPs of the first prompt of a task, then the samples and
                seconds of every batch; where images are cut into tiles, what each batch costs by formula
                instead. The process's rank is appended to its name.
            **options: further fields of MergeConfig and names in LOADING; a dict or list may be JSON. None is
                as not given.

        Raises:
            ValueError: an unknown key (the nearest one is named), or a value that is not allowed; before
                anything is loaded.
        """
        super().__init__()
        _check_keys(options)
        options = {k: _from_json(k, v) for k, v in options.items() if v is not None}
        fields = {k: options.pop(k) for k in FIELDS if k in options}
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval sets it, and so scores half-grey images
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; allowed are {', '.join(DTYPES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} is not allowed: it must be a whole number from 1")
        options.pop(BATCH_LIMIT, None)  # lmms-eval passes it to every model; it only applies to "auto"
        if frames is not None and (not str(frames).isdecimal() or int(frames) < 1):
            raise ValueError(f"frames={frames!r} is not allowed: it must be a whole number from 1")
        self.batch_size = int(batch_size)
        fields |= {"ratio": _from_json("ratio", ratio), "tokens": tokens, "method": method}
        self.merging = requested(recipe, fields, _from_json("merging", merging))
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        _check_placement(device, options)
        self.device = torch.device(device or gpu)
        has_map = options.setdefault("device_map", str(self.device)) != str(self.device)
        self.model, self.processor = load(
            pretrained,
            self.merging or MergeConfig(ratio=1.0),  # however it was saved to merge
            quantization=quantization,
            dtype=dtype,
            **options,
        )
        if has_map and self.model.device.type != "meta":  # as where the first weights are offloaded
            self.device = self.model.device
        if self.merging is None:
            remove(self.model)
        self.journal = Path(f"{journal}.{self._rank}") if journal else None
        self.reader = QuestionReader(
            self.processor, None if frames is None else int(frames), blank, thumbnail
        )
        self._counted: set[str] = set()

    def __str__(self) -> str:
        """The name under which lmms-eval caches responses; model_args distinguish models."""
        return MANIFEST.model_id

    def generate_until(self, requests: list[Instance]) -> Iterator[str]:
        """Answers in the order of the questions, each yielded as soon as its batch is generated.

        lmms-eval's response cache stores them one by one, so that a run that is killed loses one batch.
        """
        with tqdm(total=len(requests), desc="Questions", unit="q", disable=self.rank != 0) as bar:
            for (task, _), group in groupby(requests, key=_task_and_settings):
                group = list(group)
                for first in range(0, len(group), self.batch_size):
                    batch = group[first : first + self.batch_size]
                    with _NameSamples(batch):
                        self._count_flops(task, batch[:1])
                        start = time.perf_counter()
                        answers, cost = self._answer(batch)
                    seconds = time.perf_counter() - start
                    entry = {"task": task, "samples": len(batch), "seconds": seconds}
                    self._write_journal(entry | ({"sums": cost} if cost else {}))
                    bar.update(len(batch))
                    yield from answers

    def questions(self, batch: list[Instance]) -> list[Question]:
        """The questions of a batch, with their images and the frames of their videos."""
        questions = []
        for request in batch:
            context, _, doc_to_visual, doc_id, task, split = request.args
            name = f"an image of {task} {split} {doc_id}"
            document = as_rgb(self.task_dict[task][split][doc_id], name)
            questions.append(self.reader.read(context, doc_to_visual(document) or (), name))
        return questions

    def inputs(self, questions: list[Question]) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch of questions."""
        return self.reader.inputs(questions).to(self.device, self.model.dtype)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: no task that LLaVA-1.5 is evaluated on needs it."""
        raise NotImplementedError(UNSUPPORTED.format("log-likelihoods"))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: no task that LLaVA-1.5 is evaluated on needs it."""
        raise NotImplementedError(UNSUPPORTED.format("several rounds"))

    def _answer(self, batch: list[Instance]) -> tuple[list[str], dict[str, float]]:
        """The answers to a batch of questions with the same generation settings, and `sums` of them.

        Videos of different numbers of frames are generated apart: they do not fit one batch.
        """
        questions, cost = self.questions(batch), Counter()
        answers = [""] * len(batch)
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, question in enumerate(questions):
            groups.setdefault(question.frames, []).append(i)
        for members in groups.values():
            part = [questions[i] for i in members]
            inputs = self.inputs(part)
            for i, answer in zip(members, self._generate(inputs, batch[0].args[1]), strict=True):
                answers[i] = answer
            cost.update(sums(self.model, self.merging, part, inputs))
        return answers, dict(cost)

    @torch.inference_mode()
    def _generate(self, inputs: dict[str, torch.Tensor], settings: dict[str, Any]) -> list[str]:
        """The answers to prompts, generated as a task says."""
        settings = dict(settings)
        until = settings.pop("until", [])
        sample = bool(settings.pop("do_sample", settings.get("temperature") or False))
        unused = IGNORED if sample else IGNORED + SAMPLING
        settings = {k: v for k, v in settings.items() if k not in unused}
        tokenizer = self.processor.tokenizer
        generated = self.model.generate(
            **encode_once(self.model, inputs),
            **({"max_new_tokens": 1024} | settings),
            do_sample=sample,
            pad_token_id=tokenizer.pad_token_id,
        )
        new_tokens = generated[:, inputs["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        for stop in [until] if isinstance(until, str) else until:
            answers = [a.split(stop)[0] if stop else a for a in answers]
        return [a.strip() for a in answers]

    def _count_flops(self, task: str, first: list[Instance]) -> None:
        """Records the FLOPs of the first prompt of a task, where `sums` says nothing of every prompt."""
        if self.journal is None or task in self._counted or find(self.model).llava.tiling is not None:
            return
        self._counted.add(task)
        inputs = self.inputs(self.questions(first))
        tokens = inputs["input_ids"].shape[1]
        cost = {f"{part}_gflops": n / 1e9 for part, n in counted(self.model, inputs)._asdict().items()}
        cost |= {"prompt_tokens": tokens, "literature_gmacs": literature(self.model, tokens) / 1e9}
        self._write_journal({"task": task, "cost": cost})

    def _write_journal(self, entry: dict) -> None:
        """Appends a line; its newline comes first, since a run that was killed may have left half a line."""
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write("\n" + json.dumps(entry))


def _check_keys(options: dict[str, Any]) -> None:
    """Raises ValueError for a key that neither `LlavaPitome`, nor MergeConfig, nor `from_pretrained` has."""
    own = [name for name in inspect.signature(LlavaPitome).parameters if name != "options"]
    known = list(dict.fromkeys([*own, *FIELDS, *LOADING, BATCH_LIMIT]))
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"model_args has no key {key!r}; the nearest is {near!r}. Keys: {', '.join(known)}"
            )


def _check_placement(device: str | None, options: dict[str, Any]) -> None:
    """Checks the options that place the model on devices, and makes indices of the keys of `max_memory`.

    Raises:
        ValueError: device and device_map are both given, or an option that only applies to a device_map.
    """
    device_map = options.get("device_map")
    if device_map is not None and device is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r} both place the model: give one")
    if isinstance(device_map, str) and device_map in PLANNED:
        known = MAPPED
    else:
        known = [key for key in MAPPED if key != "max_memory" and isinstance(device_map, dict)]
    if unused := [key for key in MAPPED if key in options and key not in known]:
        raise ValueError(
            f"{unused[0]}={options[unused[0]]!r} has no effect with device_map={device_map!r}; allowed are "
            f"{', '.join(PLANNED)}" + ("" if unused[0] == "max_memory" else ", or a dict")
        )
    if "max_memory" in options:
        limits = options["max_memory"]
        if not isinstance(limits, dict):
            raise ValueError(f"max_memory={limits!r} is not allowed: it must be a dict, device to limit")
        options["max_memory"] = {int(k) if str(k).isdecimal() else k: v for k, v in limits.items()}


def _from_json(key: str, value: Any) -> Any:
    """A value of model_args, decoded where it is text that begins as a dict or list of JSON does.

    Raises:
        ValueError: it is not JSON, or `merging` is no dict.
    """
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{key}={value!r} is not JSON: {error}") from error
    if key == "merging" and not isinstance(value, dict | None):
        raise ValueError(f"merging={value!r} is not allowed: it must be a dict of fields of MergeConfig")
    return value


def _task_and_settings(request: Instance) -> tuple[str, str]:
    """What the requests of one batch share: the task and the generation settings."""
    return request.args[4], json.dumps(request.args[1], sort_keys=True, default=str)


class _NameSamples:
    """Adds the samples' ids to any error raised inside."""

    def __init__(self, batch: list[Instance]):
        self.names = ", ".join(f"{r.args[4]} {r.args[5]} {r.args[3]}" for r in batch)

    def __enter__(self) -> None:
        """Does nothing."""

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: Any) -> None:
        if error is not None:
            error.add_note(f"while answering (task, split, sample id): {self.names}")
