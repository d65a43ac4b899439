"""vLLM with the plugin in the process of a test, and its answers compared with those of transformers."""

import gc
import os
from contextlib import contextmanager

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

import pytest
from vllm import LLM, SamplingParams
from vllm_reference import NEW_TOKENS, Reference


@contextmanager
def engine(path, config=None, **options):
    """vLLM, small and without compilation."""
    options = {"max_model_len": 1024, "dtype": "float32", "enforce_eager": True} | options
    overrides = {} if config is None else {"hf_overrides": {"token_merging": config.to_dict()}}
    llm = LLM(str(path), kv_cache_memory_bytes=2**28, **overrides, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def generate(llm, prompts):
    """Greedy answers to prompts, each with its images."""
    requests = [
        {"prompt": text, "multi_modal_data": {"image": images}} if images else {"prompt": text}
        for text, images in prompts
    ]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, logprobs=0)
    return llm.generate(requests, sampling, use_tqdm=False)


def check(path, config, prompts, **options):
    """Asserts that vLLM's answers, log-probabilities and prompt lengths equal those of transformers."""
    with engine(path, config, **options) as llm:
        outputs = generate(llm, prompts)
    compare(outputs, Reference(path, config), prompts)


def compare(outputs, reference, prompts):
    """Asserts it for answers that were given."""
    for output, (text, images) in zip(outputs, prompts, strict=True):
        expected, answer = reference(text, images), output.outputs[0]
        assert len(output.prompt_token_ids) == expected.prompt_tokens
        assert list(answer.token_ids) == expected.ids
        logprobs = [step[i].logprob for step, i in zip(answer.logprobs, expected.ids)]
        assert logprobs == pytest.approx(expected.logprobs, abs=1e-3)
