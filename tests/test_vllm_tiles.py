"""LLaVA-NeXT and -OneVision under vLLM with the plugin against transformers; run by scripts/test_vllm.sh."""

import json

import pytest
import torch
import transformers as hf
from conftest import PATCH
from tiled import make_tiled, make_tiled_processor, noise, tile_side
from vllm import EngineArgs, SamplingParams
from vllm_engine import check, compare, engine, generate
from vllm_reference import Reference

from llava_pitome import MergeConfig
from llava_pitome.integrations.vllm import weight_names

IMAGES = [noise(*size, seed) for seed, size in enumerate([(50, 100), (1, 1), (700, 105), (2, 600), (96, 96)])]
PROMPTS = [
    *((f"what is <image> {word}", [image]) for word, image in zip(("red", "a", "cat", "or", "two"), IMAGES)),
    ("<image> what <image> or <image>", IMAGES[:3]),
    ("two red", []),
    ("is this <image> <image>", [IMAGES[3], IMAGES[3]]),
    ("<image> that <image>", [IMAGES[0], noise(33, 60, 9)]),  # the first was encoded before
    ("a <image> dog", [IMAGES[2]]),
]
CASES = [
    ("next-vicuna", MergeConfig(ratio=0.9)),
    ("next-mistral", MergeConfig(tokens=30, tile_shares="equal")),
    ("next-llama3", MergeConfig(prefix=0.4, newlines="scaled", method="visionzip")),
    ("next-vicuna", MergeConfig(ratio=1.0)),
    ("onevision", MergeConfig(ratio=0.9)),
    ("onevision", MergeConfig(tokens=25)),
    ("onevision-odd", MergeConfig(tokens_per_tile=9, across_tiles=False, newlines="none")),
    ("onevision", MergeConfig(ratio=1.0)),
]
BOTH = pytest.mark.parametrize("kind", ["next-vicuna", "onevision"])
CLASSES = {
    "next-vicuna": "LlavaNextPitomeForConditionalGeneration",
    "onevision": "LlavaOnevisionPitomeForConditionalGeneration",
}


def save(kind, path):
    """Saves a model; its language model's heads are as wide as vLLM's attention on CPUs needs."""
    model = make_tiled(kind)
    config = model.config
    config.text_config.hidden_size = 128
    config.text_config.head_dim = 32
    torch.manual_seed(0)
    type(model)(config).save_pretrained(path)
    processor = make_tiled_processor(kind)
    if kind.startswith("onevision"):
        side = tile_side(kind) * PATCH
        processor = hf.LlavaOnevisionProcessor(
            processor.image_processor,
            processor.tokenizer,
            hf.LlavaOnevisionVideoProcessor(size={"height": side, "width": side}),
            num_image_tokens=processor.num_image_tokens,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=processor.vision_aspect_ratio,
        )
    processor.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind, config", CASES, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(CASES)])
def test_answers_equal_those_of_transformers(kind, config, tmp_path):
    check(save(kind, tmp_path), config, PROMPTS, enable_prefix_caching=True)


@BOTH
def test_old_weight_names_and_no_caches_give_the_same_answers(kind, tmp_path):
    copy = weight_names.copy_with_old_names(save(kind, tmp_path / "new"), tmp_path / "old")
    without = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    check(copy, MergeConfig(ratio=0.95), PROMPTS, **without)


@BOTH
def test_two_tensor_parallel_ranks_answer_as_one(kind, tmp_path):
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    check(save(kind, tmp_path), MergeConfig(ratio=0.9, prefix=0.8), PROMPTS, **ranks)


@BOTH
def test_merged_prompts_are_cached_by_their_images(kind, tmp_path):
    text, block = "<image> what is this", 32  # the cache holds complete blocks
    one, other = noise(90, 90, 1), noise(90, 90, 2)
    options = {"enable_prefix_caching": True, "block_size": block}
    with engine(save(kind, tmp_path), MergeConfig(tokens=80), **options) as llm:
        prompts = [(text, [image]) for image in (one, one, other)]
        first, again, different = (generate(llm, [prompt])[0] for prompt in prompts)
    compare([first, again, different], Reference(tmp_path, MergeConfig(tokens=80)), prompts)
    assert first.num_cached_tokens == 0 < again.num_cached_tokens
    assert different.num_cached_tokens < block


def test_an_image_that_shares_its_prompt_is_not_cached_as_one_that_is_alone(tmp_path):
    alone, both = ("<image>", [IMAGES[4]]), ("<image> <image>", [IMAGES[4], IMAGES[0]])
    prompts = [both, alone, both, alone]
    config = MergeConfig(ratio=0.95)
    with engine(save("onevision", tmp_path), config, enable_prefix_caching=True) as llm:
        outputs = [generate(llm, [prompt])[0] for prompt in prompts]
    compare(outputs, Reference(tmp_path, config), prompts)


@BOTH
def test_given_features_need_no_vision_tower(kind, tmp_path):
    config = MergeConfig(ratio=0.9)
    reference = Reference(save(kind, tmp_path), config)
    inputs = reference.processor(images=[IMAGES[:1]], text="<image>", return_tensors="pt")
    with torch.inference_mode():
        given = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
        (features,) = reference.model.get_image_features(**given, return_dict=True).pooler_output
    options = {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 0}}
    with engine(tmp_path, config, **options) as llm:
        outputs = generate(llm, [("what is <image> red", [features])])
    compare(outputs, reference, [("what is <image> red", IMAGES[:1])])


def test_requests_that_cannot_merge_raise_and_the_engine_goes_on(tmp_path):
    config = MergeConfig(tokens=60)
    with engine(save("onevision", tmp_path), config) as llm:
        refused = [
            ({"image": noise(1, 900)}, {}, "tokens=60 does not fit"),
            ({"image": noise(50, 50)}, {"size": {"height": 8, "width": 8}}, "size=.* is not allowed"),
            ({"image": noise(50, 50)}, {"image_grid_pinpoints": [[48, 48]]}, "image_grid_pinpoints="),
            ({"video": torch.zeros(2, 48, 48, 3).numpy()}, {}, "videos are not supported under vLLM"),
        ]
        for media, options, message in refused:
            text = "<video>" if "video" in media else "<image>"
            request = {"prompt": text, "multi_modal_data": media, "mm_processor_kwargs": options}
            with pytest.raises(ValueError, match=message):
                llm.generate(request, SamplingParams(max_tokens=1), use_tqdm=False)
        outputs = generate(llm, PROMPTS[:1])
    compare(outputs, Reference(tmp_path, config), PROMPTS[:1])


@BOTH
def test_only_a_config_with_token_merging_selects_the_merging_class(kind, tmp_path):
    save(kind, tmp_path)

    def model_config(**values):
        overrides = {"token_merging": values} if values else {}
        return EngineArgs(model=str(tmp_path), hf_overrides=overrides).create_model_config()

    assert model_config().architecture == CLASSES[kind].replace("Pitome", "")
    assert model_config(ratio=0.9).architecture == CLASSES[kind]
    with pytest.raises(ValueError, match=r"decoder=\{1: 0.5} is not supported under vLLM"):
        model_config(decoder={"1": 0.5})


@BOTH
def test_a_processor_of_other_tiles_raises_before_there_is_an_engine(kind, tmp_path):
    file = save(kind, tmp_path) / "processor_config.json"
    values = json.loads(file.read_text())
    values["image_processor"]["image_grid_pinpoints"] = [[48, 96]]
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="image_grid_pinpoints="), engine(tmp_path, MergeConfig(ratio=0.9)):
        pass
