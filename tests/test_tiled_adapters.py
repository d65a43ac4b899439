"""Adapters of kin of LLaVA-1.5 that train.run made: saving, loading, resuming, quantized models."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
from test_tiled_loading import processor_of
from tiled import make_tiled, noise
from tiled_runs import SIZES, SOME, TEMPLATE, VIP, save_all, trainer_of, words_of
from training_runs import losses
from transformers import Trainer, TrainingArguments

from llava_pitome import MergeConfig, load, merge_tokens, remove
from llava_pitome.api import applied
from llava_pitome.integrations.trainer import TokenMergingCallback
from train.run import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with images and a checkpoint of every kind."""
    return save_all(tmp_path_factory.mktemp("tiled"))


@pytest.mark.parametrize("kind", (*SOME, "next-mistral"))
def test_a_saved_adapter_is_loaded_merging_as_it_was_trained(kind, folder, tmp_path):
    amount = '{"prefix": 24}' if kind == VIP else '{"tokens": 28, "newlines": "scaled"}'
    trainer = trainer_of(words_of(folder, kind, tmp_path, f"merging={amount}"))
    trainer.train()
    trainer.finish()
    config, mine = trainer.config_at(0), trainer.model.eval()
    model, processor = load(str(tmp_path))
    assert applied(model) == config == MergeConfig.from_pretrained(tmp_path) and applied(mine) is None
    for name in SIZES:
        image = noise(*SIZES[name])
        inputs = processor(images=image, text="<s> that <image> what this", return_tensors="pt")
        with torch.no_grad(), merge_tokens(mine, config):
            assert torch.equal(model(**inputs).logits, mine(**inputs).logits)
        assert (inputs["input_ids"] == 4).sum() == (24 if kind == VIP else 28)
    plain, _ = load(str(folder / kind))
    remove(model)
    inputs = processor(images=image, text="<s> that <image> what this", return_tensors="pt")
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("kind", ["next-vicuna", "onevision"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(kind, folder, tmp_path):
    words = words_of(
        folder, kind, tmp_path / "run", "tokens=24,30", "max_steps=4", "save_steps=2", "batch_size=2"
    )
    assert main(words) == 0
    expected = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "training.json").unlink()
    assert main([*words, "resume=true"]) == 0
    assert losses(tmp_path / "run") == expected and len(expected) == 4


@pytest.mark.parametrize("kind", ["next-vicuna", "onevision"])
def test_a_quantized_language_model_is_trained(kind, folder, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = make_tiled(kind).config
    config.text_config.hidden_size, config.text_config.head_dim = 64, 16  # 4 bits pack blocks of 64
    type(make_tiled(kind))(config).save_pretrained(tmp_path / "wide")
    processor = processor_of(kind)
    processor.chat_template = TEMPLATE
    processor.save_pretrained(tmp_path / "wide")
    words = words_of(
        folder, kind, tmp_path / "out", f"model={tmp_path / 'wide'}", "tokens=30", "quantization=4bit"
    )
    assert main(words) == 0
    assert all(map(torch.isfinite, map(torch.tensor, losses(tmp_path / "out").values())))


@pytest.mark.parametrize("kind", ["next-vicuna", "onevision"])
def test_the_callback_of_another_trainer_writes_how_the_model_merged(kind, folder, tmp_path):
    model, processor = load(str(folder / kind), MergeConfig(tokens=30))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    rows = [
        dict(processor(images=noise(*SIZES[name]), text="<image> what", return_tensors="pt"))
        for name in SIZES
    ]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=1, use_cpu=True, report_to=[],
        remove_unused_columns=False, save_steps=2,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, lambda found: found[0] | {"labels": found[0]["input_ids"]}, rows,
        callbacks=[TokenMergingCallback()],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    for saved in (tmp_path, tmp_path / "checkpoint-2"):
        assert MergeConfig.from_pretrained(saved) == MergeConfig(tokens=30)
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))
