"""TRL's SFT, DPO and GRPO trainers with a LLaVA that merges: a few steps on the tiny model;
scripts/test_trl.sh runs it.

Expected losses and log-probabilities are computed here, from the logits of one unpadded row at a time.
"""

import copy
import math

import pytest
import torch
from conftest import PATCHES
from prompts import IMAGE

from llava_pitome import MergeConfig, apply, load
from llava_pitome.api import applied, image_tokens
from llava_pitome.integrations.trainer import TokenMergingCallback

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'llava-pitome[trl]'")

TEMPLATE = (  # of the words that the tiny tokenizer knows
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}"
)
PROMPTS = ["what is this", "what", "is this a cat", "a dog"]
CHOSEN, REJECTED = ["a red cat", "dog", "two", "cat or dog"], ["dog", "cat", "a red cat or", "two"]
IMAGES = [(0,), (1, 2), (), (3,)]  # of the rows; a row without an image, and one with two
CONFIGS = {
    "ratio": MergeConfig(ratio=0.8),
    "decoder": MergeConfig(decoder={0: 0.5, 1: 3}, llm_proportional=True),
    "best": MergeConfig.recipe("best", tokens=9),
}
TRAINERS = ("sft", "dpo", "dpo with ref_model", "dpo of a peft model", "grpo")
merging = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
trainers = pytest.mark.parametrize("kind", TRAINERS)


# accelerate collects garbage for every Trainer
pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL sends telemetry without it


@pytest.fixture
def base(saved):
    """The tiny model, with the name of its folder, and its processor."""
    model, processor = load(str(saved))
    processor.chat_template = TEMPLATE
    return model, processor


def rows(kind, pictures):
    """The data set; GRPO has no batches in which some rows lack images (TRL 1.16, also without merging)."""
    from datasets import Dataset

    columns = {"sft": {"completion": CHOSEN}, "dpo": {"chosen": CHOSEN, "rejected": REJECTED}, "grpo": {}}
    talk = {"prompt": PROMPTS} | columns[kind.split()[0]]
    images = [(0,) if kind == "grpo" and not row else row for row in IMAGES]
    return Dataset.from_dict(
        {"images": [[pictures[i] for i in row] for row in images]}
        | {
            key: [[{"role": "user" if key == "prompt" else "assistant", "content": text}] for text in texts]
            for key, texts in talk.items()
        }
    )


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj", task_type="CAUSAL_LM")


@pytest.fixture
def make(base, pictures, tmp_path):
    """Makes a trainer of the tiny model, merging as the config says (None: not), for full batches."""

    def made(kind, config, *, checkpointing=False, callbacks=(), **options):
        from peft import get_peft_model

        (model, processor), name = copy.deepcopy(base), kind.split()[0]
        if config is not None:
            apply(model, config, processor)
        arguments = {
            "output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 4,
            "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "logging_steps": 1,
            "save_strategy": "no", "gradient_checkpointing": checkpointing, "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
        } | options  # fmt: skip
        given = {"train_dataset": rows(kind, pictures), "processing_class": processor}
        given["callbacks"] = list(callbacks)
        if kind == "dpo with ref_model":
            given["ref_model"] = copy.deepcopy(model)
        elif kind == "dpo of a peft model":
            torch.manual_seed(0)  # of the adapter's weights; elsewhere TRL sets one
            model = get_peft_model(model, lora())
        else:
            given["peft_config"] = lora()
        if name == "sft":
            return trl.SFTTrainer(model, trl.SFTConfig(**arguments), **given)
        if name == "dpo":
            return trl.DPOTrainer(model, args=trl.DPOConfig(**arguments), **given)
        more = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        return trl.GRPOTrainer(model, lengths, args=trl.GRPOConfig(**arguments, **more), **given)

    return made


def lengths(completions, **_):
    """A reward that differs among completions."""
    return [float(i) for i in range(len(completions))]


def logged(trainer, key="loss"):
    return [row[key] for row in trainer.state.log_history if key in row]


def trained(trainer):
    """The weights that the trainer updates, by name."""
    return {n: w.detach().clone() for n, w in trainer.model.named_parameters() if w.requires_grad}


def run(trainer):
    """The losses, the weights that it trains, and how often a layer of the language model ran."""
    calls, layer = [], llava(trainer).model.language_model.layers[1]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    return logged(trainer), trained(trainer), len(calls)


def llava(trainer):
    """The model without peft's wrapper."""
    model = trainer.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def answer_log_probs(model, processor, pictures, answers):
    """The log-probabilities of each row's answer, one row at a time: a list of tensors."""
    found = []
    for prompt, answer, images in zip(PROMPTS, answers, IMAGES):
        words = "<image> " * len(images) + f"{prompt} {answer}"
        inputs = processor(
            images=[pictures[i] for i in images] or None, text=words, return_tensors="pt",
            add_special_tokens=False,
        )  # fmt: skip
        count = len(answer.split())
        with torch.no_grad():
            log_probs = model(**inputs).logits[0, -count - 1 : -1].log_softmax(-1)
        found.append(log_probs.gather(1, inputs["input_ids"][0, -count:, None])[:, 0])
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@merging
@trainers
def test_a_merging_model_is_trained(make, kind, config, checkpointing):
    trainer = make(kind, config, checkpointing=checkpointing)
    before, seen = trained(trainer), []
    counts = lambda _, args, inputs: seen.append((inputs["input_ids"] == IMAGE).sum(1).tolist())  # noqa: E731
    hook = llava(trainer).model.register_forward_pre_hook(counts, with_kwargs=True)
    trainer.train()
    hook.remove()
    losses, after = logged(trainer), trained(trainer)
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    tokens = config.tokens_at(PATCHES, 7)
    assert tokens == image_tokens(trainer.model) and (tokens == PATCHES) == (
        not config.ratio and not config.tokens
    )
    assert sum(map(sum, seen)) > 0
    assert {count for row in seen for count in row} <= {0, tokens, 2 * tokens}
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    if kind == "dpo with ref_model":
        assert any("vision_tower" in name for name in changed) and any("lm_head" in name for name in changed)
    else:  # lora_A has no gradient before the second step
        assert changed == set(after) and all("lora" in name for name in changed)


@merging
@trainers
def test_gradient_checkpointing_changes_nothing(make, kind, config):
    runs = [run(make(kind, config, checkpointing=checkpointing)) for checkpointing in (False, True)]
    (losses, weights, calls), (own, recomputed, own_calls) = runs
    assert own_calls == calls + 2  # again in the backward pass of each step
    assert own == pytest.approx(losses, rel=1e-5, abs=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(recomputed[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@trainers
def test_training_with_ratio_1_is_training_unmerged(make, kind):
    runs = [run(make(kind, config)) for config in (MergeConfig(ratio=1.0), None)]
    (losses, weights, _), (own, plain, _) = runs
    assert losses == own
    for name, weight in weights.items():
        assert torch.equal(weight, plain[name]), name


@merging
def test_the_loss_of_sft_is_that_of_single_rows(make, base, pictures, config):
    model, processor = base
    trainer = make("sft", config, max_steps=1)
    apply(model, config, processor)
    expected = -torch.cat(answer_log_probs(model, processor, pictures, CHOSEN)).mean()
    trainer.train()
    assert logged(trainer) == [pytest.approx(expected.item(), rel=1e-5)]


@merging
@pytest.mark.parametrize("kind", [kind for kind in TRAINERS if "dpo" in kind])
def test_dpo_begins_with_equal_policy_and_reference(make, base, pictures, kind, config):
    model, processor = base
    trainer = make(kind, config, max_steps=1, checkpointing=True)
    apply(model, config, processor)
    trainer.train()
    assert logged(trainer) == [pytest.approx(math.log(2), abs=1e-6)]
    for side, answers in (("chosen", CHOSEN), ("rejected", REJECTED)):
        own = [found.sum() for found in answer_log_probs(model, processor, pictures, answers)]
        assert logged(trainer, f"logps/{side}") == [pytest.approx(torch.stack(own).mean().item(), rel=1e-5)]


@merging
def test_grpo_begins_with_equal_policy_and_reference(make, config):
    trainer = make("grpo", config, max_steps=2)
    trainer.train()
    first, second = logged(trainer, "kl")
    assert first == pytest.approx(0, abs=1e-6) and second > 1e-6


@pytest.mark.parametrize("callback", [False, True])
@trainers
def test_what_a_trainer_saves_is_loaded_as_it_merged(make, tmp_path, kind, callback):
    config = CONFIGS["best"]
    callbacks = [TokenMergingCallback()] if callback else []
    trainer = make(kind, config, max_steps=1, save_strategy="steps", save_steps=1, callbacks=callbacks)
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    for folder in (tmp_path / "out/checkpoint-1", tmp_path / "out", tmp_path / "elsewhere"):
        assert applied(load(str(folder))[0]) == config
    if kind == "dpo with ref_model":  # a whole model, whose config.json says it
        return
    trainer.create_model_card()  # as push_to_hub does; it replaces peft's
    if callback:
        assert applied(load(str(tmp_path / "out"))[0]) == config
    else:
        with pytest.raises(ValueError, match="does not say how it merged"):
            load(str(tmp_path / "out"))


@pytest.fixture
def full(base, pictures, tmp_path):
    """Makes a trainer of all weights that has to make its own reference model."""
    model, processor = base

    def made(kind, config):
        apply(model, config, processor)
        arguments = {
            "output_dir": str(tmp_path / "out"), "max_steps": 1, "per_device_train_batch_size": 4,
            "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
            "logging_steps": 1,
        }  # fmt: skip
        given = {"train_dataset": rows(kind, pictures), "processing_class": processor}
        if kind == "dpo":
            return trl.DPOTrainer(model, args=trl.DPOConfig(**arguments), **given)
        more = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        return trl.GRPOTrainer(model, lengths, args=trl.GRPOConfig(**arguments, **more), **given)

    return made


@merging
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_reference_model_that_trl_made_merges_after_apply(full, kind, config):
    trainer = full(kind, config)
    apply(trainer.ref_model, config)
    trainer.train()
    key, expected = ("loss", math.log(2)) if kind == "dpo" else ("kl", 0)
    assert logged(trainer, key) == [pytest.approx(expected, abs=1e-6)]


@merging
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_reference_model_that_trl_made_is_unmerged(full, kind, config):
    """As docs/training.md says: an error where the numbers of image tokens differ, and none elsewhere."""
    trainer = full(kind, config)
    assert applied(trainer.ref_model) is None
    if config.tokens_at(PATCHES, 7) == PATCHES:
        trainer.train()
        key, merged = ("loss", math.log(2)) if kind == "dpo" else ("kl", 0)
        assert abs(logged(trainer, key)[0] - merged) > 1e-5
        return
    # TRL takes transformers' error for a prompt that was cut off
    with pytest.raises(ValueError) as raised:
        trainer.train()
    assert "Image features and image tokens do not match" in f"{raised.value} {raised.value.__cause__}"
