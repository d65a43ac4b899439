"""Prompts for the tests under vLLM, and the answers of transformers."""

from typing import NamedTuple

import torch
from PIL import Image

from llava_pitome import load
from llava_pitome.embedded.questions import HINT, ask
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene

NEW_TOKENS = 6
PATCHES = 196


def image(seed):
    return Image.fromarray(render(scene(seed)))


def question(seed):
    return ask(scene(seed), 1)[0].text + HINT


def prompt(text, images=1):
    return "USER: " + "<image>\n" * images + f"{text} ASSISTANT:"


class Answer(NamedTuple):
    prompt_tokens: int
    ids: list[int]
    logprobs: list[float]
    text: str


class Reference:
    """Greedy answers of transformers."""

    def __init__(self, path, config):
        self.model, self.processor = load(str(path), config, dtype="float32")

    @torch.inference_mode()
    def __call__(self, text, images):
        inputs = self.processor(images=[images] if images else None, text=text, return_tensors="pt")
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, **options)
        length = inputs["input_ids"].shape[1]
        ids = out.sequences[0, length:].tolist()
        logprobs = [step[0].log_softmax(-1)[i].item() for step, i in zip(out.logits, ids)]
        return Answer(length, ids, logprobs, self.processor.decode(ids, skip_special_tokens=True))
