"""The lmms-eval model: batches, one shard of the questions per process, answers streamed, errors fatal.

The only file that depends on lmms-eval. The entry point `lmms_eval.models` registers it, so that
`python -m lmms_eval --model llava_pitome --model_args pretrained=...,ratio=0.9` works like eval.run.
"""

import json
import os
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image, ImageFile
from tqdm import tqdm

from llava_pitome.api import load, remove
from llava_pitome.config import MergeConfig, requested
from llava_pitome.flops import counted, literature
from llava_pitome.models.checkpoints import DTYPES
from llava_pitome.models.image_dedup import encode_once

MANIFEST = ModelManifest("llava_pitome", simple_class_path="llava_pitome.integrations.lmms_eval.LlavaPitome")
IGNORED = ("image_aspect_ratio",)  # preprocessing of the original LLaVA package; the processor decides here
SAMPLING = ("temperature", "top_p", "top_k")
GREY = (122, 116, 104)  # CLIP's mean colour: all zeros after preprocessing
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
        merging: dict | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        blank: bool = False,
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
            merging: further fields of MergeConfig.
            batch_size: questions per batch.
            device: "cpu", "cuda", "cuda:1", ...; by default the process's own GPU where there is one.
            dtype: a key of DTYPES; "auto" is that of the checkpoint.
            quantization: "4bit", "8bit" or None.
            blank: replace each image by a grey one, to measure what the questions alone reveal.
            journal: a file for JSON lines: the FLOPs of the first prompt of a task, then the samples and
                seconds of every batch. The process's rank is appended to its name.
            **options: as for `from_pretrained`, such as attn_implementation.

        Raises:
            ValueError: a value that is not allowed.
        """
        super().__init__()
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval sets it, and so scores half-grey images
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; allowed are {', '.join(DTYPES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} is not allowed: it must be a whole number from 1")
        options.pop("max_batch_size", None)  # lmms-eval passes it to every model; it only applies to "auto"
        self.batch_size = int(batch_size)
        self.merging = requested(recipe, {"ratio": ratio, "tokens": tokens, "method": method}, merging)
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or gpu)
        if quantization is None or self.device.type == "cuda":
            options["device_map"] = str(self.device)
        self.model, self.processor = load(
            pretrained,
            self.merging or MergeConfig(ratio=1.0),  # however it was saved to merge
            quantization=quantization,
            dtype=dtype,
            **options,
        )
        if self.merging is None:
            remove(self.model)
        self.blank, self.journal = blank, Path(f"{journal}.{self._rank}") if journal else None
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
                        answers = self._answer(batch)
                    seconds = time.perf_counter() - start
                    self._write_journal({"task": task, "samples": len(batch), "seconds": seconds})
                    bar.update(len(batch))
                    yield from answers

    def inputs(self, batch: list[Instance]) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch of questions."""
        prompts, images = [], []
        for request in batch:
            context, _, doc_to_visual, doc_id, task, split = request.args
            own = doc_to_visual(self.task_dict[task][split][doc_id])
            images += [Image.new("RGB", image.size, GREY) for image in own] if self.blank else own
            prompts.append(self._prompt(context, len(own)))
        inputs = self.processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
        return inputs.to(self.device, self.model.dtype)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: no task that LLaVA-1.5 is evaluated on needs it."""
        raise NotImplementedError(UNSUPPORTED.format("log-likelihoods"))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: no task that LLaVA-1.5 is evaluated on needs it."""
        raise NotImplementedError(UNSUPPORTED.format("several rounds"))

    def _prompt(self, context: str, images: int) -> str:
        """The prompt of a question: placeholders come first unless the question has its own.

        Raises:
            ValueError: the question has another number of placeholders than of images.
        """
        placeholder = self.processor.image_token
        content = [{"type": "text", "text": context}]
        if placeholder not in context:
            content = [{"type": "image"}] * images + content
        elif context.count(placeholder) != images:
            raise ValueError(
                f"the question has {context.count(placeholder)} {placeholder} but comes with {images} images"
            )
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    @torch.inference_mode()
    def _answer(self, batch: list[Instance]) -> list[str]:
        """The answers to a batch of questions with the same generation settings."""
        inputs, settings = self.inputs(batch), dict(batch[0].args[1])
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
        """Records the FLOPs of the first prompt of a task."""
        if self.journal is None or task in self._counted:
            return
        self._counted.add(task)
        inputs = self.inputs(first)
        tokens = inputs["input_ids"].shape[1]
        cost = {f"{part}_gflops": n / 1e9 for part, n in counted(self.model, inputs)._asdict().items()}
        cost |= {"prompt_tokens": tokens, "literature_gmacs": literature(self.model, tokens) / 1e9}
        self._write_journal({"task": task, "cost": cost})

    def _write_journal(self, entry: dict) -> None:
        """Appends a line; its newline comes first, since a run that was killed may have left half a line."""
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write("\n" + json.dumps(entry))


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
