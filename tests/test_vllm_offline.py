"""vLLM with the plugin against transformers, in one process; run by scripts/test_vllm.sh."""

import gc
import os
from contextlib import contextmanager

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, SiglipVisionConfig
from vllm import LLM, EngineArgs, SamplingParams
from vllm_given import PATCHES, WORDS, Answerer, cases, picture, prompt, question

from llava_pitome import MergeConfig, embedded, load

NAME = "LlavaPitomeForConditionalGeneration"
CONFIGS = {
    "ratio": MergeConfig(ratio=0.9),
    "unmerged": MergeConfig(ratio=1.0),
    "tower and prefix": MergeConfig(tokens=30, prefix_share=0.5),
    "the authors' branch": MergeConfig.recipe("released", ratio=0.9),
    "keys behind the tower": MergeConfig(prefix=40, method="visionzip"),
    "fewer patches": MergeConfig(resize=(9, 10), ratio=0.95),
}


@contextmanager
def engine(path=embedded.PATH, **options):
    """vLLM in this process, small and without compiling."""
    options = {"max_model_len": 1024, "dtype": "float32", "enforce_eager": True} | options
    llm = LLM(str(path), kv_cache_memory_bytes=2**28, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def overrides(config):
    return {"token_merging": config.to_dict()}


def ask(llm, asked):
    prompts = [
        {"prompt": text, "multi_modal_data": {"image": pictures}} if pictures else {"prompt": text}
        for text, pictures in asked
    ]
    return llm.generate(prompts, SamplingParams(max_tokens=WORDS, temperature=0, logprobs=0), use_tqdm=False)


def same(outputs, path, config, asked):
    """Asserts that vLLM said what transformers says, as surely, and counted as many tokens."""
    expect = Answerer(path, config)
    for output, (text, pictures) in zip(outputs, asked):
        length, ids, scores, _ = expect(text, pictures)
        said = output.outputs[0]
        assert len(output.prompt_token_ids) == length
        assert list(said.token_ids) == ids
        found = [step[i].logprob for step, i in zip(said.logprobs, ids)]
        assert found == pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in CONFIGS.items()])
def test_vllm_answers_as_transformers_does_under_the_same_config(config):
    with engine(hf_overrides=overrides(config)) as llm:
        outputs = ask(llm, cases())
    same(outputs, embedded.PATH, config, cases())


def test_fewer_tokens_are_counted_and_a_repeated_prompt_comes_from_the_cache():
    one = [(prompt(question(0)), [picture(0)])]
    options = {"enable_prefix_caching": True, "block_size": 32}  # only whole blocks are kept
    with engine(hf_overrides=overrides(MergeConfig(tokens=64)), **options) as llm:
        first, again = ask(llm, one)[0], ask(llm, one)[0]
        other = ask(llm, [(one[0][0], [picture(1)])])[0]
    plain = Answerer(embedded.PATH, None)(*one[0])[0]
    assert len(first.prompt_token_ids) == plain - PATCHES + 64
    assert first.num_cached_tokens == 0 < again.num_cached_tokens
    assert other.num_cached_tokens < 32  # the same words, another picture
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_model_that_was_saved_merging_merges_under_vllm(tmp_path):
    model, processor = load(embedded.NAME, MergeConfig(tokens=50))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        outputs = ask(llm, cases())
    same(outputs, tmp_path, None, cases())


@pytest.fixture
def siglip(tmp_path):
    """A random LLaVA with a SigLIP tower, all of whose features are read."""
    config = AutoConfig.from_pretrained(embedded.PATH)
    config.vision_config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=112,
        patch_size=8,
    )
    config.vision_feature_select_strategy, config.tie_word_embeddings = "full", True
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(embedded.PATH)
    processor.num_additional_image_tokens, processor.vision_feature_select_strategy = 0, "full"
    processor.save_pretrained(tmp_path)
    return tmp_path


def test_a_siglip_tower_merges_too(siglip):
    config = MergeConfig(ratio=0.9, prefix=0.5)
    with engine(siglip, hf_overrides=overrides(config)) as llm:
        outputs = ask(llm, cases())
    same(outputs, siglip, config, cases())


def test_two_tensor_parallel_ranks_answer_as_one():
    config = MergeConfig(ratio=0.9, prefix=0.8)
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(hf_overrides=overrides(config), **ranks) as llm:
        outputs = ask(llm, cases())
    same(outputs, embedded.PATH, config, cases())


def model_config(**options):
    return EngineArgs(model=str(embedded.PATH), **options).create_model_config()


def test_only_a_config_that_asks_for_merging_gets_this_packages_class():
    plain = model_config()
    assert plain.architecture == "LlavaForConditionalGeneration"
    assert plain.hf_config.architectures == ["LlavaForConditionalGeneration"]
    assert model_config(hf_overrides={"token_merging": {"ratio": 0.9}}).architecture == NAME


@pytest.mark.parametrize(
    "values, says",
    [
        ({"decoder": {"1": 0.5}}, "decoder={1: 0.5} is not supported under vLLM"),
        ({"ratio": 0.9, "llm_proportional": True}, "llm_proportional=True is not supported"),
        ({"ratio": 0.9, "positions": "original"}, "positions='original' is not supported"),
        ({"rato": 0.9}, "no field 'rato'; the nearest is 'ratio'"),
        ({"tokens": 200}, "tokens=200 does not fit"),
    ],
)
def test_what_cannot_be_served_raises_before_anything_starts(values, says):
    with pytest.raises(ValueError, match=says.replace("{", r"\{")):
        model_config(hf_overrides={"token_merging": values})


@pytest.mark.parametrize(
    "option, says",
    [
        ({"mm_encoder_attn_backend": "TORCH_SDPA"}, "mm_encoder_attn_backend"),
        ({"enable_lora": True}, "LoRA is not supported"),
    ],
)
def test_options_that_the_tower_cannot_follow_are_refused(option, says):
    with (
        pytest.raises(ValueError, match=says),
        engine(hf_overrides=overrides(MergeConfig(ratio=0.9)), **option),
    ):
        pass


def test_transformers_own_model_inside_vllm_is_refused():
    with pytest.raises(ValueError, match=NAME):
        model_config(hf_overrides=overrides(MergeConfig(ratio=0.9)), model_impl="transformers")
