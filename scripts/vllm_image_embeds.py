"""Merged features, computed with transformers, handed to an unmodified vLLM.

    .venv.vllm/bin/python scripts/vllm_image_embeds.py

This package does nothing inside vLLM here: its plugin is off, and vLLM has not even a tower, since no picture
is allowed as pixels. Four ways to merge make features of four lengths. Each length is a call of its own: vLLM
0.32 takes features of different lengths one after the other, but not in the same step. Prints each answer
beside transformers' own; exits with 1 where two differ.
"""

import os
import sys

os.environ |= {"VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import torch
from PIL import Image
from vllm import LLM, SamplingParams

from llava_pitome import MergeConfig, embedded, load, merge_tokens
from llava_pitome.embedded.questions import HINT, ask
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene

CONFIGS = (MergeConfig(ratio=1.0), MergeConfig(ratio=0.9), MergeConfig(tokens=20), MergeConfig(prefix=0.5))
QUESTIONS = 4  # for each of them
WORDS = 8  # of an answer, at most


@torch.inference_mode()
def encoded(model, processor, seed: int) -> tuple[str, torch.Tensor, str]:
    """A question on a scene, its picture's features (tokens, channels), and transformers' answer."""
    shown = scene(seed)
    prompt = f"USER: <image>\n{ask(shown, 1)[0].text}{HINT} ASSISTANT:"
    inputs = processor(images=Image.fromarray(render(shown)), text=prompt, return_tensors="pt")
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    said = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False)
    answer = processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return prompt, features, answer


def main() -> int:
    """Asks all questions; 1 where an answer differs from transformers'."""
    model, processor = load(embedded.NAME, dtype="float32")
    llm = LLM(
        str(embedded.PATH),
        dtype="float32",
        enable_mm_embeds=True,
        limit_mm_per_prompt={"image": 0},  # in pixels: the tower is not even loaded
        max_model_len=1024,
        kv_cache_memory_bytes=2**28,
        enforce_eager=True,
    )
    differ = False
    for i, config in enumerate(CONFIGS):
        with merge_tokens(model, config, processor):
            cases = [encoded(model, processor, QUESTIONS * i + n) for n in range(QUESTIONS)]
        asked = [{"prompt": p, "multi_modal_data": {"image": [features]}} for p, features, _ in cases]
        outputs = llm.generate(asked, SamplingParams(max_tokens=WORDS, temperature=0), use_tqdm=False)
        for (_, features, answer), output in zip(cases, outputs):
            said, length = output.outputs[0].text, len(output.prompt_token_ids)
            differ |= said != answer
            print(f"{len(features)} image tokens of {length}: vLLM{said!r}, transformers{answer!r}")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
