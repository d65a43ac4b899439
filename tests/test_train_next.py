"""Training of embedded-next: batches equal to the processor's, growing the model, and runs of a few steps."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

import llava_pitome
from llava_pitome import embedded
from llava_pitome.embedded.anyres import tiling
from llava_pitome.embedded.questions import HINT
from llava_pitome.embedded.questions_next import ask
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes_next import WORDS, scene
from train.embedded import data, llava_next, next_data, next_model
from train.embedded.__main__ import main
from train.embedded.next_losses import NextLosses

SIZES = ((224, 224), (112, 336), (336, 112), (112, 224), (129, 333), (301, 200), (333, 336), (200, 113))
RUN = (
    "model=next",
    "heads_steps=1",
    "tower_steps=2",
    "together_steps=2",
    "batch_size=2",
    "turns=3",
    "validate=8",
)


@pytest.fixture(scope="module")
def processor():
    return next_model.make_processor(next_model.make_tokenizer())


@pytest.fixture(scope="module")
def model(processor):
    return next_model.grow(processor.tokenizer).eval()


@pytest.fixture
def quick_start(processor, monkeypatch):
    """Runs of this test share one tokenizer."""
    monkeypatch.setattr(next_model, "make_tokenizer", lambda: processor.tokenizer)


def prompt(processor, question):
    content = [{"type": "image"}, {"type": "text", "text": question.text + HINT}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_is_what_the_processor_makes_and_the_model_expects(size, processor, model):
    scenes = [scene(seed, size) for seed in (1, 2)]
    batch = next_data.make_batch(scenes, 2, processor)
    images = [Image.fromarray(render(s)) for s in scenes]
    prompts = [prompt(processor, ask(s, 2)[0]) for s in scenes]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], inputs["pixel_values"])
    assert torch.equal(batch["image_sizes"], inputs["image_sizes"])
    for row, text in enumerate(inputs["input_ids"]):
        tokens = text[inputs["attention_mask"][row].bool()]
        assert torch.equal(batch["input_ids"][row, : len(tokens)], tokens)
    with torch.no_grad():
        features = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], return_dict=True
        ).pooler_output
    assert {len(f) for f in features} == {len(batch["tile"])}


@pytest.mark.parametrize("size", SIZES)
def test_the_layout_is_the_models_packing(size, model):
    """Features that say which tile and patch they are, packed by transformers."""
    where, tiles = next_data.layout(tiling(*size)), int(np.prod(tiling(*size).tiles))
    numbers = torch.arange((1 + tiles) * next_data.PATCHES).view(1 + tiles, next_data.PATCHES, 1).float()
    newline = torch.full((1,), -1.0)
    packed, _ = model.model.pack_image_features([numbers], torch.tensor([size]), "default", newline)
    expected = torch.where(where.tile < 0, -1, where.tile * next_data.PATCHES + where.patch)
    assert torch.equal(packed[0].flatten().long(), expected)


def test_patch_labels_name_the_object_whose_pixels_a_patch_shows(processor):
    """A picture with one object alone differs from an empty one in the patches with its labels."""
    found = scene(11)
    tiles = tiling(found.height, found.width)
    for thing in found.things:
        alone = type(found)(found.seed, "plain", (thing,), found.height, found.width, found.scale)
        empty = type(found)(found.seed, "plain", (), found.height, found.width, found.scale)
        shown, blank = (
            processor.image_processor([render(s)], return_tensors="pt")["pixel_values"][0]
            for s in (alone, empty)
        )
        changed = (shown - blank).abs().amax(1).unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2)).flatten(1)
        labels = next_data.patch_labels(alone, tiles)
        is_labelled = labels[..., 0] > 0
        assert is_labelled[1:].any()
        assert changed[is_labelled].mean() > 5 * changed[~is_labelled].mean()
        values = [
            v for v, wanted in zip(next_data.LABELS["word"], range(1, 99)) if wanted == labels[..., 5].max()
        ]
        assert values == [thing.mark if len(thing.mark) > 1 else "-"]


def test_bins_are_sixths_of_the_picture():
    for size in SIZES:
        where = next_data.layout(tiling(*size))
        grid = where.bins[where.tile > 0]
        for axis in (0, 1):
            counts = torch.bincount(grid[:, axis], minlength=next_data.BINS)
            assert counts.min() > 0 and counts.max() <= 1.6 * counts.min()


def test_nouns_refer_to_the_thumbnail_with_one_head_and_to_the_tiles_with_the_other(processor):
    scenes = [scene(seed, (224, 200)) for seed in range(4)]
    batch = next_data.make_batch(scenes, 16, processor)
    referents, (rows, positions) = batch["referents"], batch["nouns"].T
    sums = referents.sum(-1)
    assert ((sums - 1).abs().lt(1e-5) | sums.eq(0)).all() and sums.any(-1).all()
    assert not referents[:, 0, next_data.PATCHES :].any() and not referents[:, 1, : next_data.PATCHES].any()
    assert not referents[:, :, batch["tile"] < 0].any()
    nouns = processor.tokenizer.batch_decode(batch["input_ids"][rows, positions][:, None])
    is_text = torch.tensor([noun.strip() in (*WORDS, *"0123456789CEFHKLPTUY") for noun in nouns])
    assert is_text.any() and not sums[is_text, 0].any() and sums[~is_text].any(0).all()
    assert (batch["labels"][rows, positions] == -100).all()


def test_questions_without_a_noun_have_no_point_loss(processor, model):
    options = {"device": "cpu"}
    losses = NextLosses(model, processor.tokenizer, options)
    batch = next_data.make_batch([scene(seed, (112, 224)) for seed in (1, 2)], 1, processor)
    ids = torch.full_like(
        batch["input_ids"], processor.tokenizer.encode(" many", add_special_tokens=False)[0]
    )
    ids[:, : len(batch["tile"])] = processor.image_token_id
    packed = torch.zeros(2, len(batch["tile"]), len(next_data.LABELS), dtype=torch.long)
    nouns = next_data.noun_referents(ids, batch["labels"], packed, processor.tokenizer)
    assert nouns["nouns"].shape == (0, 2) and nouns["referents"].shape == (0, 2, len(batch["tile"]))
    hidden = torch.randn(*ids.shape, 128, requires_grad=True)
    rotary = model.model.language_model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    loss = losses.point_loss(hidden, rotary, {"input_ids": ids, **nouns})
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


def test_every_word_of_the_questions_is_one_token(processor):
    known = (*WORDS, "sign", "says", "word", "digit", "letter", "cell", "grid", "object", "A", "B", "C")
    for word in known:
        assert len(processor.tokenizer.encode(f" {word}", add_special_tokens=False)) == 1


def test_weights_are_those_of_the_embedded_model(processor, model):
    old, old_processor = llava_pitome.load("embedded", dtype=torch.float32)
    for name in (
        "model.vision_tower.encoder.layers.3.mlp.fc1.weight",
        "model.multi_modal_projector.linear_1.weight",
    ):
        assert torch.equal(model.state_dict()[name], old.state_dict()[name])
    ids = [
        t.encode(" triangle", add_special_tokens=False)[-1]
        for t in (processor.tokenizer, old_processor.tokenizer)
    ]
    new_vectors, old_vectors = (m.get_input_embeddings().weight for m in (model, old))
    assert torch.equal(new_vectors[ids[0]], old_vectors[ids[1]])


def test_losses_reach_every_part_of_the_model(processor, model):
    options = {f"{name}_loss": 0.3 for name in ("point", "place", "align", "patches")} | {"device": "cpu"}
    losses = NextLosses(model, processor.tokenizer, options)
    batch = next_data.make_batch([scene(seed, (112, 224)) for seed in (1, 2)], 4, processor)
    loss, facts = losses.answers(batch)
    loss.backward()
    assert all(np.isfinite(value) for value in facts.values())
    without = [n for n, p in (*model.named_parameters(), *losses.heads.named_parameters()) if p.grad is None]
    assert all("post_layernorm" in name for name in without)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)


def test_a_run_writes_a_model_that_loads_and_resumes_from_its_checkpoint(
    tmp_path, monkeypatch, capsys, quick_start
):
    words = [*RUN, f"output={tmp_path / 'whole'}"]
    assert main(words) == 0
    folder = tmp_path / "whole"
    assert (folder / "model.safetensors").stat().st_size <= 8 * 2**20
    assert json.loads((folder / "training.json").read_text())["log"][-1]["stage"] == "together"
    monkeypatch.setitem(embedded.PATHS, embedded.NAME_NEXT, folder)
    model, processor = llava_pitome.load(embedded.NAME_NEXT)
    assert isinstance(model, LlavaNextForConditionalGeneration) and model.dtype == torch.bfloat16
    picture = scene(0)
    inputs = processor(
        images=Image.fromarray(render(picture)),
        text=prompt(processor, ask(picture, 1)[0]),
        return_tensors="pt",
    ).to(model.dtype)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert isinstance(AutoProcessor.from_pretrained(folder), type(processor))

    assert main([*words, "seed=1"]) == 1
    assert "was made with other options: seed=1 (was 0)" in capsys.readouterr().err


def test_a_run_that_was_stopped_continues_with_the_same_weights(tmp_path, monkeypatch, quick_start):
    monkeypatch.setattr("train.embedded.run.SAVE_STEPS", 1)
    runs = {name: [*RUN, f"output={tmp_path / name}"] for name in ("whole", "stopped")}
    assert main(runs["whole"]) == 0

    class Stopped(Exception):
        pass

    save_checkpoint = llava_next.Run.save_checkpoint

    def stop(run, stage, step, optimizers):
        save_checkpoint(run, stage, step, optimizers)
        if (stage, step) == ("together", 1):
            raise Stopped

    monkeypatch.setattr(llava_next.Run, "save_checkpoint", stop)
    with pytest.raises(Stopped):
        main(runs["stopped"])
    monkeypatch.setattr(llava_next.Run, "save_checkpoint", save_checkpoint)
    assert main(runs["stopped"]) == 0
    whole, stopped = (LlavaNextForConditionalGeneration.from_pretrained(tmp_path / name) for name in runs)
    trained = [n for n in whole.state_dict() if "encoder.layers.11." not in n]  # the last one is not used
    assert all(torch.equal(whole.state_dict()[n], stopped.state_dict()[n]) for n in trained)


def test_an_unknown_model_and_options_of_the_other_one_are_refused(capsys):
    assert main(["model=llava16"]) == 1
    assert "allowed: llava15 | next" in capsys.readouterr().err
    assert main(["model=next", "language_steps=3"]) == 1
    assert "unknown key 'language_steps'" in capsys.readouterr().err
    assert main(["turns=3"]) == 1
    assert "unknown key 'turns'" in capsys.readouterr().err


def test_a_missing_model_is_named_with_the_command_that_trains_it(tmp_path, monkeypatch):
    monkeypatch.setitem(embedded.PATHS, embedded.NAME_NEXT, tmp_path / "missing")
    with pytest.raises(ValueError, match=r"train it with `python -m train\.embedded model=next`"):
        llava_pitome.load(embedded.NAME_NEXT)


def test_training_and_validation_use_different_scenes():
    first = next_data.TRAIN_SEEDS
    assert first > next_data.HELD_OUT_SEEDS + 10**6 > 2 * 10**6
    assert first > data.TRAIN_SEEDS + 20 * data.STAGE_SEEDS
