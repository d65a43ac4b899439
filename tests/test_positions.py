"""Image tokens at the positions of their patches: as in a whole prompt in which nobody sees the others."""

import copy

import pytest
import torch
from conftest import PATCHES, make_model, make_processor
from precise import ENCODES_FIRST, precise
from prompts import IMAGE, PROMPTS, batch, generate, single

from llava_pitome import MergeConfig, merge_tokens
from llava_pitome.hooks.projector import RECORDS

PRUNED = MergeConfig(prefix=7, method="divprune", positions="original")


@pytest.fixture
def model():
    return precise(make_model())


def whole(model, processor, prompt, pictures, kept):
    """Logits of the text of one plain prompt, whose image tokens are seen only where they were kept."""
    inputs = single(processor, prompt, pictures)
    ids = inputs.input_ids[0]
    sees = torch.ones(len(ids), dtype=torch.bool)
    sees[ids == IMAGE] = torch.zeros(len(kept), PATCHES, dtype=torch.bool).scatter(1, kept, True).flatten()
    mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float64).min, dtype=torch.float64)
    mask = mask.masked_fill(sees & torch.ones(len(ids), len(ids)).tril().bool(), 0)
    inputs["attention_mask"] = mask[None, None]
    with torch.no_grad():
        return model(**inputs.to(torch.float64)).logits[0, ids != IMAGE]


@pytest.mark.parametrize("prompt", [p for p in PROMPTS if "<image>" in p])
def test_what_is_pruned_at_the_prefix_is_as_if_nobody_saw_it(model, processor, pictures, prompt):
    with merge_tokens(model, PRUNED, processor) as merging, torch.no_grad():
        inputs = single(processor, prompt, pictures)
        found = model(**inputs.to(torch.float64)).logits[0, inputs.input_ids[0] != IMAGE]
        kept = merging.plans()[0].kept
    expected = whole(model, processor, prompt, pictures, kept)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


CONFIGS = [
    PRUNED,
    MergeConfig(tokens=5, prefix_share=0.5, positions="original", llm_proportional=True),
    MergeConfig(ratio=0.9, decoder={0: 0.5}, positions="original"),
    MergeConfig(resize=(4, 4), prefix=6, positions="original"),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_batch_answers_as_its_rows_alone(tower, config, pictures):
    model, processor = precise(make_model(tower)), make_processor(tower)
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = batch(processor, PROMPTS, pictures).to(torch.float64)
        together, answers = model(**inputs).logits, generate(model, inputs)
        for row, prompt in enumerate(PROMPTS):
            alone = single(processor, prompt, pictures).to(torch.float64)
            length = alone.input_ids.shape[1]
            torch.testing.assert_close(together[row, -length:], model(**alone).logits[0], rtol=0, atol=1e-5)
            assert torch.equal(answers[row], generate(model, alone)[0])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_a_cache_changes_no_answer(model, processor, pictures, config, options):
    """transformers 5.17 mixes up the pictures of a prompt that it repeats."""
    prompts = [p for p in PROMPTS if ENCODES_FIRST or p.count("<image>") < 2]
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = batch(processor, prompts, pictures).to(torch.float64)
        said = [
            model.generate(
                **inputs,
                max_new_tokens=6,
                min_new_tokens=6,
                use_cache=cache,
                do_sample=False,
                suppress_tokens=[IMAGE],
                **options,
            )
            for cache in (True, False)
        ]
    assert torch.equal(*said)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_later_turn_goes_on_where_the_text_was(model, processor, pictures, config):
    with merge_tokens(model, config, processor), torch.no_grad():
        first = single(processor, PROMPTS[0], pictures).to(torch.float64)
        cache = model(**first, use_cache=True).past_key_values
        later = torch.tensor([[6, 7, 11]])
        found = [model(input_ids=later, past_key_values=c).logits for c in (copy.deepcopy(cache), cache)]
        both = dict(first) | {"input_ids": torch.cat([first.input_ids, later], 1)}
        both["attention_mask"] = torch.ones_like(both["input_ids"])
        expected = model(**both).logits[:, -3:]
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_packed_positions_are_others(model, processor, pictures):
    found = []
    for positions in ("packed", "original"):
        config = MergeConfig(prefix=7, method="divprune", positions=positions)
        with merge_tokens(model, config, processor), torch.no_grad():
            found.append(model(**single(processor, PROMPTS[1], pictures).to(torch.float64)).logits[0, -1])
    assert (found[0] - found[1]).abs().max() > 1e-4


@pytest.mark.skipif(not ENCODES_FIRST, reason="transformers 5.17 takes no pictures that are encoded already")
def test_features_are_known_again_in_any_order(model, processor, pictures):
    """Two prompts about the same two pictures, the features taken by hand and exchanged."""
    config = MergeConfig(tokens=6, positions="original", llm_proportional=True)
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = batch(processor, ["<image> what", "what <image>"], pictures[:1]).to(torch.float64)
        inputs["pixel_values"] = torch.cat(
            [single(processor, "<image>", pictures[i:]).pixel_values for i in (0, 1)]
        ).double()
        expected = model(**inputs).logits
        encoded = model.get_image_features(inputs["pixel_values"].flip(0), return_dict=True)
        encoded.pooler_output = encoded.pooler_output[::-1]
        del inputs["pixel_values"]
        found = model(**inputs, mm_encoder_outputs={"image": encoded}).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.skipif(not ENCODES_FIRST, reason="transformers 5.17 takes no pictures that are encoded already")
def test_features_of_pictures_that_were_encoded_too_long_ago_raise(model, processor, pictures):
    config = MergeConfig(tokens=6, llm_proportional=True)
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = single(processor, "<image> what", pictures).to(torch.float64)
        expected = model(**inputs).logits
        encoded = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        other = single(processor, "<image>", pictures[1:]).pixel_values.double()
        for _ in range(RECORDS - 1):
            model.get_image_features(other)
        assert torch.equal(model(**inputs, mm_encoder_outputs={"image": encoded}).logits, expected)
        model.get_image_features(other)
        with pytest.raises(RuntimeError, match="not those of the images that were encoded last"):
            model(**inputs, mm_encoder_outputs={"image": encoded})
