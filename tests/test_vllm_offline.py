"""vLLM with the plugin against transformers, in one process; run by scripts/test_vllm.sh."""

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, SiglipVisionConfig
from vllm import EngineArgs
from vllm_engine import check, engine, generate
from vllm_reference import PATCHES, Reference, image, prompt, question

from llava_pitome import MergeConfig, embedded, load

ARCHITECTURE = "LlavaPitomeForConditionalGeneration"
PROMPTS = [  # and their images: one, two, none, and one image twice
    *((prompt(question(seed)), [image(seed)]) for seed in range(4)),
    (prompt(question(5), 2), [image(5), image(6)]),
    (prompt("what is a red cat?", 0), []),
    (prompt(question(7), 2), [image(7), image(7)]),
]
CONFIGS = {
    "tower": MergeConfig(ratio=0.9),
    "nothing merges": MergeConfig(ratio=1.0),
    "tower and prefix": MergeConfig(tokens=30, prefix_share=0.5),
    "released": MergeConfig.recipe("released", ratio=0.9),
    "prefix by tower keys": MergeConfig(prefix=40, method="visionzip"),
    "resize": MergeConfig(resize=(9, 10), ratio=0.95),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_answers_equal_those_of_transformers(config):
    check(embedded.PATH, config, PROMPTS)


def test_a_model_saved_merging_merges_under_vllm(tmp_path):
    model, processor = load(embedded.NAME, MergeConfig(tokens=50))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    check(tmp_path, None, PROMPTS)


def test_a_siglip_tower_merges(tmp_path):
    config = AutoConfig.from_pretrained(embedded.PATH)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    config.vision_config = SiglipVisionConfig(**sizes, image_size=112, patch_size=8)
    config.vision_feature_select_strategy, config.tie_word_embeddings = "full", True
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(embedded.PATH)
    processor.num_additional_image_tokens, processor.vision_feature_select_strategy = 0, "full"
    processor.save_pretrained(tmp_path)
    check(tmp_path, MergeConfig(ratio=0.9, prefix=0.5), PROMPTS)


def test_two_tensor_parallel_ranks_answer_as_one():
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    check(embedded.PATH, MergeConfig(ratio=0.9, prefix=0.8), PROMPTS, **ranks)


def test_merged_prompts_are_cached_by_their_images():
    text, block = prompt(question(0)), 32  # the cache holds complete blocks
    with engine(embedded.PATH, MergeConfig(tokens=64), enable_prefix_caching=True, block_size=block) as llm:
        first, again, other = (generate(llm, [(text, [image(seed)])])[0] for seed in (0, 0, 1))
    unmerged = Reference(embedded.PATH, None)(text, [image(0)]).prompt_tokens
    assert len(first.prompt_token_ids) == unmerged - PATCHES + 64
    assert first.num_cached_tokens == 0 < again.num_cached_tokens
    assert other.num_cached_tokens < block
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_only_a_config_with_token_merging_selects_the_merging_class():
    def model_config(**values):
        overrides = {"token_merging": values} if values else {}
        return EngineArgs(model=str(embedded.PATH), hf_overrides=overrides).create_model_config()

    plain = model_config()
    assert plain.architecture == "LlavaForConditionalGeneration"
    assert plain.hf_config.architectures == ["LlavaForConditionalGeneration"]
    assert model_config(ratio=0.9).architecture == ARCHITECTURE
    with pytest.raises(ValueError, match=r"decoder=\{1: 0.5} is not supported under vLLM"):
        model_config(decoder={"1": 0.5})


@pytest.mark.parametrize(
    "option, message",
    [
        ({"mm_encoder_attn_backend": "TORCH_SDPA"}, "mm_encoder_attn_backend"),
        ({"enable_lora": True}, "LoRA is not supported"),
        ({"model_impl": "transformers"}, ARCHITECTURE),
    ],
)
def test_options_for_vllms_own_classes_raise(option, message):
    with pytest.raises(ValueError, match=message), engine(embedded.PATH, MergeConfig(ratio=0.9), **option):
        pass
