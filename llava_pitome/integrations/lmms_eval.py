"""The lmms-eval model: batches, one shard a process, answers handed over as they come, errors fatal.

The only file that knows lmms-eval. Registered by the entry point `lmms_eval.models`, so that
`python -m lmms_eval --model llava_pitome --model_args pretrained=...,ratio=0.9` works as well as eval/run.py.
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
from tqdm import tqdm

from llava_pitome.api import load, remove
from llava_pitome.config import requested
from llava_pitome.flops import counted, literature
from llava_pitome.models.checkpoints import DTYPES
from llava_pitome.models.image_dedup import encode_once

MANIFEST = ModelManifest("llava_pitome", simple_class_path="llava_pitome.integrations.lmms_eval.LlavaPitome")
IGNORED = (
    "image_aspect_ratio",
)  # how the original LLaVA package prepares pictures; the processor decides here
GREY = (122, 116, 104)  # CLIP's mean colour: all zeros behind the preprocessing


class LlavaPitome(lmms):
    """A LLaVA that merges its visual tokens, as lmms-eval asks it questions."""

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
            ratio: share of the patches each tower layer keeps; where neither it nor `tokens` nor `merging`
                says how far, nothing merges.
            tokens: image tokens at the language model, instead of a ratio.
            recipe: a named recipe, which `method` and `merging` change.
            method: who joins whom.
            merging: further fields of MergeConfig.
            batch_size: questions at a time.
            device: "cpu", "cuda", "cuda:1", ...; one per process where there are several.
            dtype: a key of DTYPES; "auto" is how the checkpoint was saved.
            quantization: "4bit", "8bit" or None.
            blank: show a grey picture instead of each image, to see what the questions alone give away.
            journal: a file, to whose name the rank is added, that gets a JSON line with the FLOPs of the
                first prompt and one a batch with its samples and seconds.
            **options: as for `from_pretrained`, such as attn_implementation.

        Raises:
            ValueError: a value that is not allowed.
        """
        super().__init__()
        _refuse_truncated()
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; allowed are {', '.join(DTYPES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} is not allowed: it must be a whole number from 1")
        options.pop("max_batch_size", None)  # lmms-eval gives it to every model; it only goes with "auto"
        self.batch_size = int(batch_size)
        self.merging = requested(recipe, {"ratio": ratio, "tokens": tokens, "method": method}, merging)
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
        if quantization is None or self.device.type == "cuda":
            options["device_map"] = str(self.device)
        self.model, self.processor = load(
            pretrained, self.merging, quantization=quantization, dtype=dtype, **options
        )
        if self.merging is None:
            remove(self.model)  # a checkpoint that was saved merging is measured plain when no ratio is given
        self.blank, self.journal = blank, Path(f"{journal}.{self._rank}") if journal else None
        self._counted: set[str] = set()

    def __str__(self) -> str:
        """The name under which lmms-eval caches responses; what distinguishes models is in model_args."""
        return MANIFEST.model_id

    def generate_until(self, requests: list[Instance]) -> Iterator[str]:
        """Answers in the order of the questions, each handed over as soon as its batch is done.

        lmms-eval's response cache stores what it is handed one by one, so that a run that is killed loses a
        batch.
        """
        with tqdm(total=len(requests), desc="Questions", unit="q", disable=self.rank != 0) as bar:
            for (task, _), run in groupby(requests, key=_kind):
                same = list(run)  # neighbours of one task with the same generation settings
                for first in range(0, len(same), self.batch_size):
                    batch = same[first : first + self.batch_size]
                    with _Naming(batch):
                        self._count(task, batch[:1])
                        started = time.perf_counter()
                        answers = self._answer(batch)
                    seconds = time.perf_counter() - started
                    self._note({"task": task, "samples": len(batch), "seconds": seconds})
                    bar.update(len(batch))
                    yield from answers

    def inputs(self, batch: list[Instance]) -> dict[str, torch.Tensor]:
        """What the model is called with for a batch of questions."""
        prompts, pictures = [], []
        for request in batch:
            context, _, doc_to_visual, doc_id, task, split = request.args
            seen = doc_to_visual(self.task_dict[task][split][doc_id])
            pictures += [_blanked(p) for p in seen] if self.blank else seen
            prompts.append(self._prompt(context, len(seen)))
        inputs = self.processor(text=prompts, images=pictures or None, padding=True, return_tensors="pt")
        return inputs.to(self.device, self.model.dtype)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: none of the tasks that LLaVA-1.5 is measured on asks for it."""
        raise NotImplementedError(
            "llava_pitome answers generate_until tasks only; this task asks for log-likelihoods"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: none of the tasks that LLaVA-1.5 is measured on asks for it."""
        raise NotImplementedError(
            "llava_pitome answers generate_until tasks only; this task asks for several rounds"
        )

    def _prompt(self, context: str, images: int) -> str:
        marker = self.processor.image_token
        if marker in context:
            if context.count(marker) != images:
                raise ValueError(
                    f"the question holds {context.count(marker)} {marker} but comes with {images} images"
                )
            content = [{"type": "text", "text": context}]
        else:
            content = [{"type": "image"}] * images + [{"type": "text", "text": context}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    @torch.inference_mode()
    def _answer(self, batch: list[Instance]) -> list[str]:
        inputs = self.inputs(batch)
        options = dict(batch[0].args[1])
        until = options.pop("until", [])
        sample = bool(options.pop("do_sample", options.get("temperature") or False))
        options = {k: v for k, v in options.items() if k not in IGNORED}
        if not sample:
            options = {k: v for k, v in options.items() if k not in ("temperature", "top_p", "top_k")}
        tokenizer = self.processor.tokenizer
        said = self.model.generate(
            **encode_once(self.model, inputs),
            **({"max_new_tokens": 1024} | options),
            do_sample=sample,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for stop in [until] if isinstance(until, str) else until:
            answers = [a.split(stop)[0] if stop else a for a in answers]
        return [a.strip() for a in answers]

    def _count(self, task: str, one: list[Instance]) -> None:
        """Notes what the first prompt of a task costs, once."""
        if self.journal is None or task in self._counted:
            return
        self._counted.add(task)
        inputs = self.inputs(one)
        flops = counted(self.model, inputs)
        tokens = inputs["input_ids"].shape[1]
        cost = {f"{part}_gflops": n / 1e9 for part, n in flops._asdict().items()} | {"prompt_tokens": tokens}
        cost |= {"literature_gmacs": literature(self.model, tokens) / 1e9}
        self._note({"task": task, "cost": cost})

    def _note(self, entry: dict) -> None:
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write(
                    "\n" + json.dumps(entry)
                )  # the newline first: a stopped run may have left half a line


def _kind(request: Instance) -> tuple[str, str]:
    """What requests of one batch have in common: the task and the generation settings."""
    return request.args[4], json.dumps(request.args[1], sort_keys=True, default=str)


class _Naming:
    """Adds the samples' ids to any error raised inside."""

    def __init__(self, batch: list[Instance]):
        self.names = ", ".join(f"{r.args[4]} {r.args[5]} {r.args[3]}" for r in batch)

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: Any) -> None:
        if error is not None:
            error.add_note(f"while answering (task, split, sample id): {self.names}")


def _refuse_truncated() -> None:
    """Lets pillow raise on a truncated picture; lmms-eval has it fill the rest with grey, and scores that."""
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = False


def _blanked(picture: Any) -> Any:
    from PIL import Image

    return Image.new("RGB", picture.size, GREY)
