"""Fixtures: a tiny random LLaVA (CLIP tower of 8 layers, 36 patches) and its processor, made in milliseconds.

Every test runs with one torch thread: the workers of pytest-xdist share the cores, where threads of torch's
own would wait for each other.
"""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; read when torch is imported

import pytest
import torch

torch.set_num_threads(1)

LAYERS, PATCHES, SIDE, PATCH = 8, 36, 48, 8
WORDS = [
    "<unk>", "<s>", "</s>", "<pad>", "<image>",
    "what", "is", "this", "that", "a", "red", "cat", "or", "dog", "two", "three", "and",
]  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
collect_ignore = [  # run by other scripts/test_*.sh, which name these files
    "test_kernels_triton.py", "test_lora_processes.py", "test_vllm_offline.py", "test_vllm_server.py",
    "test_vllm_docs.py", "test_vllm_tiles.py", "test_web_page.py", "test_docs.py", "test_trl.py",
    "test_compile.py", "test_bench.py", "test_sweep.py",
]  # fmt: skip
collect_ignore_glob = [
    "test_tile*.py", "test_*_tiles.py", "test_feature_layer*.py", "test_kin.py", "test_video_io.py",
    "test_train_next.py",
]  # fmt: skip


def make_model(tower: str = "clip", seed: int = 0, **options):
    """A LlavaForConditionalGeneration with random weights; `options` go to its config."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(**VISION) if tower == "clip" else SiglipVisionConfig(**VISION)
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(WORDS),
        pad_token_id=3, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    strategy = "default" if tower == "clip" else "full"
    defaults = {
        "vision_config": vision, "text_config": text, "image_token_index": 4,
        "vision_feature_select_strategy": strategy,
    }  # fmt: skip
    config = LlavaConfig(**defaults | options)
    return LlavaForConditionalGeneration(config).eval()


def make_vip_llava(layers=(-2, -5, -7, 3), tower: str = "clip", seed: int = 0):
    """A VipLlavaForConditionalGeneration of the same shapes, with features of several layers."""
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    kin, names = make_model(tower).config, VipLlavaConfig().to_dict()
    name = next(n for n in ("vision_feature_layer", "vision_feature_layers") if n in names)
    torch.manual_seed(seed)
    config = VipLlavaConfig(
        vision_config=kin.vision_config, text_config=kin.text_config, image_token_index=4, **{name: layers}
    )
    return VipLlavaForConditionalGeneration(config).eval()


def make_processor(tower: str = "clip"):
    """A LlavaProcessor for it, with a vocabulary of 17 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    extra, strategy = (1, "default") if tower == "clip" else (0, "full")
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
    )


@pytest.fixture(scope="module")
def quick_garbage_collection():
    """Collections leave out what exists already, which late in the suite takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def truncated_images_raise(monkeypatch):
    """Restores pillow's default, which importing lmms-eval changes for the process."""
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def pictures() -> list:
    """Four images with structure: noise, smooth at different scales."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    fields = [rng.integers(0, 255, (n, n, 3), dtype=np.uint8) for n in (3, 4, 6, 12)]
    return [Image.fromarray(f).resize((SIDE, SIDE)) for f in fields]


@pytest.fixture
def saved(model, processor, tmp_path):
    """A folder with an unmerged model and its processor."""
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A folder with a CLIP tower, for the `mm_vision_tower` of an original LLaVA."""
    from originals import make_tower

    return make_tower(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """A sentencepiece tokenizer.model."""
    from originals import make_vocabulary

    return make_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture
def original(clip_folder):
    """A model of the original LLaVA package."""
    from originals import make_original

    return make_original(clip_folder)


@pytest.fixture
def original_folder(original, vocabulary, tmp_path):
    """A checkpoint of that model."""
    from originals import save

    return save(original, vocabulary, tmp_path / "original")


@pytest.fixture
def report(record_property):
    """A function that adds a line to the summary of the test run, for measurements that are not judged."""
    return lambda line: record_property("bench", line)


def pytest_terminal_summary(terminalreporter):
    for test in terminalreporter.getreports("passed"):
        for _, line in test.user_properties:
            terminalreporter.write_line(f"bench: {line}")
