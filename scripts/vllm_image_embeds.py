"""Merged features, computed with transformers, handed to an unmodified vLLM.

    .venv.vllm/bin/python scripts/vllm_image_embeds.py

This package does nothing inside vLLM here: its plugin is off, and vLLM has not even a tower, since no picture
is allowed as pixels. It gets features, of four different lengths in one batch. Prints each answer beside
transformers' own; exits with 1 where two differ.
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
WORDS = 8  # of an answer, at most


@torch.inference_mode()
def encoded(model, processor, config: MergeConfig, seed: int) -> tuple[str, torch.Tensor, str]:
    """A question on a scene, its picture's merged features (tokens, channels), and transformers' answer."""
    shown = scene(seed)
    prompt = f"USER: <image>\n{ask(shown, 1)[0].text}{HINT} ASSISTANT:"
    with merge_tokens(model, config, processor):
        inputs = processor(images=Image.fromarray(render(shown)), text=prompt, return_tensors="pt")
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
        said = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False)
    answer = processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return prompt, features, answer


def main() -> int:
    """Asks eight questions, all in one batch; returns how many answers differ."""
    model, processor = load(embedded.NAME, dtype="float32")
    cases = [encoded(model, processor, CONFIGS[seed % len(CONFIGS)], seed) for seed in range(8)]
    llm = LLM(
        str(embedded.PATH),
        dtype="float32",
        enable_mm_embeds=True,
        limit_mm_per_prompt={"image": 0},  # in pixels: the tower is not even loaded
        max_model_len=1024,
        kv_cache_memory_bytes=2**28,
        enforce_eager=True,
    )
    asked = [{"prompt": prompt, "multi_modal_data": {"image": features}} for prompt, features, _ in cases]
    given = llm.generate(asked, SamplingParams(max_tokens=WORDS, temperature=0))
    differ = 0
    for (_, features, answer), output in zip(cases, given):
        said = output.outputs[0].text
        differ += said != answer
        print(f"{len(features):4} image tokens, {len(output.prompt_token_ids):4} in the prompt:"
              f" vLLM{said!r}, transformers{answer!r}")  # fmt: skip
    return min(differ, 1)


if __name__ == "__main__":
    sys.exit(main())
