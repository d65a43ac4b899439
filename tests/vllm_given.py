"""What the tests under vLLM ask, and what transformers answers."""

import torch
from PIL import Image

from llava_pitome import load
from llava_pitome.embedded.questions import HINT, ask
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene

WORDS = 6  # of an answer, at most
PATCHES = 196


def picture(seed):
    return Image.fromarray(render(scene(seed)))


def question(seed):
    return ask(scene(seed), 1)[0].text + HINT


def prompt(text, images=1):
    return "USER: " + "<image>\n" * images + f"{text} ASSISTANT:"


def cases():
    """Prompts and their pictures: single ones, two pictures in one, none, and one picture twice."""
    found = [(prompt(question(seed)), [picture(seed)]) for seed in range(4)]
    found.append((prompt(question(5), 2), [picture(5), picture(6)]))
    found.append((prompt("what is a red cat?", 0), []))
    found.append((prompt(question(7), 2), [picture(7), picture(7)]))
    return found


class Answerer:
    """transformers' greedy answers of one model."""

    def __init__(self, path, config):
        self.model, self.processor = load(str(path), config, dtype="float32")

    @torch.inference_mode()
    def __call__(self, text, pictures):
        """Tokens of the prompt, tokens of the answer and their log-probabilities, and the answer."""
        inputs = self.processor(images=pictures or None, text=text, return_tensors="pt")
        said = self.model.generate(
            **inputs, max_new_tokens=WORDS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        length = inputs["input_ids"].shape[1]
        ids = said.sequences[0, length:].tolist()
        scores = [step[0].log_softmax(-1)[i].item() for step, i in zip(said.logits, ids)]
        return length, ids, scores, self.processor.decode(ids, skip_special_tokens=True)
