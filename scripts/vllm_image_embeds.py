"""Merged features, computed with transformers, as inputs of an unmodified vLLM.

    .venv.vllm/bin/python scripts/vllm_image_embeds.py

The plugin is off, and vLLM does not load a vision tower, since no image is allowed as pixels. Four configs
give features of four lengths, each in a call of its own: vLLM 0.32 takes features of different lengths one
after the other, but not in the same step. Prints each answer beside that of transformers; exits with 1 where
two differ.
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
QUESTIONS = 4  # for each config
NEW_TOKENS = 8


@torch.inference_mode()
def encode(model, processor, seed: int) -> tuple[str, torch.Tensor, str]:
    """A prompt about a scene, its image's features (tokens, channels), and the answer of transformers."""
    drawn = scene(seed)
    prompt = f"USER: <image>\n{ask(drawn, 1)[0].text}{HINT} ASSISTANT:"
    inputs = processor(images=Image.fromarray(render(drawn)), text=prompt, return_tensors="pt")
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return prompt, features, answer


def main() -> int:
    """Answers all questions; returns 1 where an answer differs from that of transformers."""
    model, processor = load(embedded.NAME, dtype="float32")
    llm = LLM(
        str(embedded.PATH),
        dtype="float32",
        enable_mm_embeds=True,
        limit_mm_per_prompt={"image": 0},  # as pixels, so that the vision tower is not loaded
        max_model_len=1024,
        kv_cache_memory_bytes=2**28,
        enforce_eager=True,
    )
    status = 0
    for i, config in enumerate(CONFIGS):
        with merge_tokens(model, config, processor):
            cases = [encode(model, processor, QUESTIONS * i + n) for n in range(QUESTIONS)]
        requests = [{"prompt": p, "multi_modal_data": {"image": [features]}} for p, features, _ in cases]
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
        for (_, features, expected), output in zip(cases, llm.generate(requests, sampling, use_tqdm=False)):
            answer, length = output.outputs[0].text, len(output.prompt_token_ids)
            print(f"{len(features)} image tokens of {length}: vLLM{answer!r}, transformers{expected!r}")
            status |= answer != expected
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
