"""Adapters say how they merged: those that peft and the Trainer save, and folders that do not say it."""

import copy
import json

import pytest
import torch
from huggingface_hub import metadata_load
from prompts import PROMPTS, single

from llava_pitome import (
    MergeConfig,
    UnsupportedModelError,
    apply,
    load,
    merge_tokens,
    remove,
    save_merge_config,
)
from llava_pitome.api import applied
from llava_pitome.models import checkpoints

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")  # accelerate collects for every Trainer
UNMERGED = MergeConfig(ratio=1.0)
CONFIGS = [
    MergeConfig(ratio=0.8),
    MergeConfig(tokens=5, method="tome"),
    MergeConfig(decoder={1: 0.5}, llm_proportional=True),
    MergeConfig.recipe("best", tokens=9, parameters={"candidates": 4.0}),
    MergeConfig(ratio=(0.9, 0.8, 1.0, 0.5, 1.0, 0.9, 0.9), resize=(4, 5)),
    UNMERGED,
]


def lora(**options):
    from peft import LoraConfig

    options = {"target_modules": r".*language_model.*(q|v)_proj", "init_lora_weights": False} | options
    return LoraConfig(r=2, **options)


@pytest.fixture
def base(saved):
    return load(str(saved))


@pytest.fixture
def adapter(base, tmp_path):
    """Makes the folder of an adapter of a model that merges as the config says, or not at all."""
    from peft import get_peft_model

    def made(config=None, name="adapter"):
        model, processor = copy.deepcopy(base[0]), base[1]
        if config is not None:
            apply(model, config, processor)
        get_peft_model(model, lora()).save_pretrained(tmp_path / name)
        if config is not None:
            remove(model)
        return tmp_path / name

    return made


def logits(model, processor, pictures):
    with torch.no_grad():
        return model(**single(processor, PROMPTS[0], pictures)).logits


@pytest.mark.parametrize("wrapped_first", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_an_adapter_saved_by_peft_is_loaded_as_it_merged(base, pictures, tmp_path, config, wrapped_first):
    from peft import get_peft_model

    model, processor = base
    if not wrapped_first:
        apply(model, config, processor)
    tuned = get_peft_model(model, lora(task_type="CAUSAL_LM" if wrapped_first else None))
    if wrapped_first:
        apply(tuned, config, processor)
    tuned.save_pretrained(tmp_path)
    assert MergeConfig.from_pretrained(tmp_path) == config
    loaded, own = load(str(tmp_path))
    assert applied(loaded) == config
    assert torch.equal(logits(loaded, own, pictures), logits(tuned, processor, pictures))


def test_an_adapter_says_how_the_model_merged_when_it_was_saved(base, tmp_path):
    from peft import get_peft_model

    model, processor = base
    apply(model, CONFIGS[0], processor)
    tuned = get_peft_model(model, lora())
    with merge_tokens(tuned, CONFIGS[1], processor):
        tuned.save_pretrained(tmp_path / "inner")
    tuned.save_pretrained(tmp_path / "outer")
    remove(tuned)
    tuned.save_pretrained(tmp_path / "removed")
    assert [MergeConfig.from_pretrained(tmp_path / name) for name in ("inner", "outer")] == [
        CONFIGS[1],
        CONFIGS[0],
    ]
    with pytest.raises(ValueError, match="does not say how it merged"):
        load(str(tmp_path / "removed"))


def test_an_adapter_saved_over_another_says_how_it_merged_itself(adapter):
    adapter(CONFIGS[0])
    assert MergeConfig.from_pretrained(adapter(CONFIGS[1])) == CONFIGS[1]


def test_a_loaded_adapter_is_saved_again_as_it_merges(adapter, tmp_path):
    model, _ = load(str(adapter(CONFIGS[0])))
    model.save_pretrained(tmp_path / "again")
    assert applied(load(str(tmp_path / "again"))[0]) == CONFIGS[0]


@pytest.mark.parametrize("before", [None, ["llava"]])
def test_a_models_tags_are_its_own_again_after_removing(model, before):
    if before:
        model.add_model_tags(before)
    apply(model, CONFIGS[0])
    apply(model, CONFIGS[1])
    model.add_model_tags("added")  # as TRL does
    assert [tag for tag in model.model_tags if "token_merging" in tag] == [CONFIGS[1].tag()]
    remove(model)
    assert model.model_tags == [*(before or []), "added"]


def test_a_model_without_tags_has_none_after_removing_nor_has_a_copy(model):
    before = set(vars(model))
    apply(model, CONFIGS[0])
    other = copy.deepcopy(model)
    remove(model)
    remove(other)
    assert set(vars(model)) == set(vars(other)) == before
    assert model.model_tags is other.model_tags is None


def test_an_adapter_that_does_not_say_how_it_merged_is_refused(adapter, pictures):
    folder = adapter()
    message = r"does not say how it merged.*ratio=1\.0 if it was trained without"
    with pytest.raises(ValueError, match=message):
        load(str(folder))
    with pytest.raises(ValueError, match=message):
        checkpoints.saved_merge_config(str(folder))
    loaded, own = load(str(folder), CONFIGS[0])
    assert applied(loaded) == CONFIGS[0]
    remove(loaded)
    expected = logits(loaded, own, pictures)
    unmerged, own = load(str(folder), UNMERGED)
    assert torch.equal(logits(unmerged, own, pictures), expected)
    UNMERGED.save_pretrained(folder)
    assert torch.equal(logits(*load(str(folder)), pictures), expected)


def test_how_the_base_model_was_saved_to_merge_says_nothing_about_an_adapter(base, saved, adapter):
    with merge_tokens(base[0], CONFIGS[0], base[1]):
        base[0].save_pretrained(saved)
    folder = adapter()
    with pytest.raises(ValueError, match="does not say how it merged"):
        load(str(folder))
    model, _ = load(str(folder), CONFIGS[1])
    remove(model)
    assert not hasattr(model.config, "token_merging")


def test_an_adapter_that_transformers_saves_is_refused_until_its_config_is_written(base, tmp_path, pictures):
    """Its `add_adapter` writes no model card."""
    model, processor = base
    apply(model, CONFIGS[0], processor)
    model.add_adapter(lora())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say how it merged"):
        load(str(tmp_path))
    save_merge_config(model, tmp_path)
    loaded, own = load(str(tmp_path))
    assert torch.equal(logits(loaded, own, pictures), logits(model, processor, pictures))


@pytest.mark.parametrize("as_string", [True, False])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], None])
def test_save_merge_config_writes_how_a_model_merges(base, adapter, config, as_string):
    from peft import get_peft_model

    folder, (model, processor) = adapter(CONFIGS[1]), base
    if config is not None:
        apply(model, config, processor)
    for wrapped in (model, get_peft_model(model, lora()), torch.compile(model)):
        save_merge_config(wrapped, str(folder) if as_string else folder)
        assert MergeConfig.from_pretrained(folder) == (config or UNMERGED)  # not as peft saved it
        (folder / "token_merging.json").unlink()
        assert MergeConfig.from_pretrained(folder) == (config or UNMERGED)


def test_save_merge_config_reaches_the_folders_of_named_adapters(base, tmp_path):
    from peft import get_peft_model

    model, processor = base
    apply(model, CONFIGS[0], processor)
    tuned = get_peft_model(model, lora(), adapter_name="one")
    tuned.add_adapter("two", lora())
    tuned.save_pretrained(tmp_path / "adapters")
    (tmp_path / "adapters/other").mkdir()
    save_merge_config(tuned, tmp_path / "adapters")
    assert not any((tmp_path / "adapters/other").iterdir())
    for name in ("one", "two"):
        assert applied(load(str(tmp_path / "adapters" / name))[0]) == CONFIGS[0]


def test_save_merge_config_beside_a_checkpoint(base, saved):
    apply(base[0], CONFIGS[0])
    save_merge_config(base[0], saved)
    assert applied(load(str(saved))[0]) == CONFIGS[0]


def test_save_merge_config_refuses_what_it_cannot_look_into(model, tmp_path):
    apply(model, CONFIGS[0])
    with pytest.raises(UnsupportedModelError):
        save_merge_config(torch.nn.Sequential(model), tmp_path)
    assert not any(tmp_path.iterdir())


def test_records_that_differ_are_refused(adapter):
    """As where a folder's token_merging.json is of an earlier training."""
    folder = adapter(CONFIGS[0])
    (folder / "token_merging.json").write_text(json.dumps(CONFIGS[1].to_dict()))
    with pytest.raises(ValueError, match=r'differ.*"tokens": 5.*"ratio": 0\.8'):
        load(str(folder))
    assert applied(load(str(folder), CONFIGS[2])[0]) == CONFIGS[2]
    CONFIGS[1].save_pretrained(folder)
    assert applied(load(str(folder))[0]) == CONFIGS[1]


def test_the_rest_of_a_model_card_is_kept(base, adapter):
    folder = adapter(CONFIGS[0])
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nWritten by hand.\n")
    before, text = metadata_load(card), card.read_text()
    save_merge_config(base[0], folder)
    after = metadata_load(card)
    assert after.pop("tags") == [*(t for t in before.pop("tags") if "merging" not in t), UNMERGED.tag()]
    assert after == before and "lora" in metadata_load(card)["tags"]
    assert card.read_text().split("---\n", 2)[2] == text.split("---\n", 2)[2]


@pytest.mark.parametrize(
    "card", [None, "", "# A title", "---\ntags: [a\n---\n", "---\ntags: token\n---\n", "---\n- a\n---\n"]
)
def test_a_model_card_without_the_tag_says_nothing(adapter, card):
    folder = adapter(CONFIGS[0])
    if card is None:
        (folder / "README.md").unlink()
    else:
        (folder / "README.md").write_text(card)
    with pytest.raises(ValueError, match="does not say how it merged"):
        load(str(folder))
    CONFIGS[1].save_pretrained(folder)
    assert applied(load(str(folder))[0]) == CONFIGS[1]


UNREADABLE = ("", "{", "null", "3", "[1]", "true", '"ratio"', '{"rato": 0.9}', '{"ratio": 2}')


@pytest.mark.parametrize("tag", [f"token_merging:{text}" for text in UNREADABLE])
def test_a_tag_that_cannot_be_read_is_refused(adapter, tag):
    folder = adapter(CONFIGS[0])
    (folder / "README.md").write_text(f"---\ntags: ['{tag}']\n---\n")
    with pytest.raises(ValueError, match=str(folder)):
        load(str(folder))


def test_a_folder_in_place_of_a_model_card_says_nothing(adapter):
    folder = adapter(CONFIGS[0])
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    with pytest.raises(ValueError, match="does not say how it merged"):
        load(str(folder))


HUB_ARGUMENTS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")


@pytest.mark.parametrize("name", [*HUB_ARGUMENTS, None])
def test_a_hub_argument_of_none_is_as_not_given(adapter, saved, name):
    none = dict.fromkeys([name] if name else HUB_ARGUMENTS)
    assert applied(load(str(adapter(CONFIGS[0])), **none)[0]) == CONFIGS[0]
    assert applied(load(str(saved), **none)[0]) is None
    assert checkpoints.saved_merge_config(str(saved), **none) is None


def test_the_card_of_a_full_model_is_not_read(saved):
    (saved / "README.md").write_text(f"---\ntags: ['{CONFIGS[0].tag()}']\n---\n")
    assert applied(load(str(saved))[0]) is None


class Rows(torch.utils.data.Dataset):
    """Four rows of a prompt that is its own answer."""

    def __init__(self, processor, pictures):
        inputs = [single(processor, PROMPTS[0], pictures[i:]) for i in range(4)]
        self.rows = [{k: v[0] for k, v in row.items()} for row in inputs]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i] | {"labels": self.rows[i]["input_ids"]}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("callback", [True, False])
def test_what_the_trainer_saves_is_loaded_as_it_merged(base, pictures, tmp_path, callback, full):
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from llava_pitome.integrations.trainer import TokenMergingCallback

    model, processor = base
    apply(model, CONFIGS[3], processor)
    trained = model if full else get_peft_model(model, lora())
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = Trainer(
        trained,
        arguments,
        train_dataset=Rows(processor, pictures),
        processing_class=processor,
        callbacks=[TokenMergingCallback()] if callback else [],
    )
    trainer.train()
    trainer.save_model()
    expected = logits(trained.eval(), processor, pictures)
    folders = [tmp_path / "out" / name for name in ("checkpoint-1", "checkpoint-2", ".")]
    for folder in folders:
        assert (folder / "token_merging.json").exists() == callback
        loaded, own = load(str(folder))
        assert applied(loaded) == CONFIGS[3]
    assert torch.equal(logits(loaded, own, pictures), expected)


def test_the_callback_refuses_what_it_cannot_write(model):
    from transformers import TrainerState, TrainingArguments

    from llava_pitome.integrations.trainer import TokenMergingCallback

    arguments = TrainingArguments("unused", use_cpu=True)
    begin = TokenMergingCallback().on_train_begin
    begin(arguments, TrainerState(), None, model=model)
    with pytest.raises(ValueError, match="hyperparameter_search"):
        begin(arguments, TrainerState(is_hyper_param_search=True), None, model=model)
    with pytest.raises(UnsupportedModelError):
        begin(arguments, TrainerState(), None, model=torch.nn.Linear(1, 1))
