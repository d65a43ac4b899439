"""Caches that were put together again, changed, or filled under another config: right, or an error."""

import copy
import io
import pickle

import pytest
import torch
from conftest import make_model, make_processor
from precise import CLOSE, padded, precise, run
from prompts import batch
from transformers import DynamicCache

from llava_pitome import MergeConfig, apply, merge_tokens, remove

CONFIGS = {
    "best": MergeConfig.recipe("best", tokens=9),
    "decoder": MergeConfig(decoder={0: 0.5}),
    "llm_proportional": MergeConfig(ratio=0.9, llm_proportional=True),
    "original": MergeConfig(prefix=9, positions="original"),
    "all": MergeConfig(ratio=0.9, decoder={1: 0.4}, llm_proportional=True, positions="original"),
}
PLAIN = {"tower": MergeConfig(ratio=0.9), "prefix": MergeConfig(prefix=9), "nothing": MergeConfig(ratio=1.0)}
ROWS = ["a red <image> cat or that", "<image> what", "two red cat and a dog is this"]
WORDS = torch.tensor([[5, 9, 11, 6]])
REFUSED = (
    "not filled under|another merge config|lost|layer . of this cache|holds . prompts|attention_mask hides"
)


def filled(model, processor, pictures, rows=ROWS):
    inputs = padded(processor, rows, pictures)
    return run(model, inputs, past_key_values=DynamicCache()).past_key_values, inputs["attention_mask"]


def single_precision(model, processor, pictures, rows, padding="left"):
    """As `filled`, where features of one picture are the same in every row."""
    processor.tokenizer.padding_side = padding
    inputs = batch(processor, rows, pictures)
    return run(model, inputs, past_key_values=DynamicCache()).past_key_values, inputs["attention_mask"]


def go_on(model, cache, mask):
    inputs = {"input_ids": WORDS.repeat(len(mask), 1)}
    inputs["attention_mask"] = torch.cat([mask, torch.ones(len(mask), 4, dtype=torch.long)], 1)
    return run(model, inputs, past_key_values=cache).logits


def rebuilt(cache):
    return DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])


def half_rebuilt(cache):
    other = copy.deepcopy(cache)
    other.layers[0] = rebuilt(cache).layers[0]
    return other


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def cloned(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return cache


def cast(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.float(), layer.values.float()
    return cache


def cropped_left(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]
    return cache


def overwritten(cache):
    for layer in cache.layers:
        layer.keys = layer.keys + 1
    return cache


def swapped(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.flip(0), layer.values.flip(0)
    return cache


def written_to(cache):
    for layer in cache.layers:
        layer.keys.copy_(layer.keys.flip(2).clone())
    return cache


RIGHT = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "save": saved,
         "clone": cloned, "half rebuilt": half_rebuilt}  # fmt: skip
WRONG = {"rebuilt": rebuilt, "cast": cast, "cropped left": cropped_left, "overwritten": overwritten,
         "written to": written_to}  # fmt: skip


@pytest.mark.parametrize("change", RIGHT)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_cache_that_holds_what_it_held_goes_on(config, change, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        cache, mask = filled(model, processor, pictures)
        expected = go_on(model, copy.deepcopy(cache), mask)
        torch.testing.assert_close(go_on(model, RIGHT[change](cache), mask), expected, **CLOSE)


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_cache_with_other_tensors_raises(config, change, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        cache, mask = filled(model, processor, pictures)
        with pytest.raises(RuntimeError, match=REFUSED):
            go_on(model, WRONG[change](cache), mask[:, 2:] if change == "cropped left" else mask)


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_that_change_places_keep_what_is_theirs(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        cache, mask = filled(model, processor, pictures)
        expected = go_on(model, copy.deepcopy(cache), mask)
        found = go_on(model, swapped(cache), mask.flip(0))
        torch.testing.assert_close(found, expected.flip(0), **CLOSE)
        again = go_on(model, cache, torch.cat([mask.flip(0), torch.ones(3, 4, dtype=torch.long)], 1))
        assert again.isfinite().all()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_row_of_another_cache_raises(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        cache, mask = filled(model, processor, pictures)
        other, _ = filled(model, processor, pictures[::-1], [ROWS[1], ROWS[0], ROWS[2]])
        for layer, foreign in zip(cache.layers, other.layers):
            layer.keys = torch.cat([foreign.keys[:1], layer.keys[1:]])
            layer.values = torch.cat([foreign.values[:1], layer.values[1:]])
        with pytest.raises(RuntimeError, match=REFUSED):
            go_on(model, cache, mask)


OTHERS = [
    (config, filling)
    for config in (*PLAIN, *CONFIGS)
    for filling in (None, *PLAIN, *CONFIGS)
    if filling != config
]


@pytest.mark.parametrize("config, filling", OTHERS)
def test_a_cache_that_was_filled_under_another_config_is_right_or_raises(config, filling, pictures):
    """Where nothing merges in the language model a cache holds tokens like any others."""
    every = PLAIN | CONFIGS | {None: MergeConfig(ratio=1.0)}
    model, processor = precise(make_model()), make_processor()
    if filling is None:
        cache, mask = filled(model, processor, pictures)
    else:
        with merge_tokens(model, every[filling], processor):
            cache, mask = filled(model, processor, pictures)
    plain = filling in (None, *PLAIN)
    if plain and config in (*PLAIN, "decoder"):
        expected = go_on(model, copy.deepcopy(cache), mask)
        with merge_tokens(model, every[config], processor):
            torch.testing.assert_close(go_on(model, cache, mask), expected, **CLOSE)
        return
    with merge_tokens(model, every[config], processor), pytest.raises(RuntimeError, match=REFUSED):
        go_on(model, cache, mask)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rows", [["two red cat"], ["two red cat", "what"]])
def test_a_text_that_was_cached_before_pictures_goes_on(config, rows, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        cache, mask = filled(model, processor, pictures, rows)
        cache = pickle.loads(pickle.dumps(cache))
        inputs = padded(processor, ["and <image> what is this"] * len(rows), pictures)
        whole = torch.cat([mask, inputs["attention_mask"]], 1)
        found = run(model, inputs | {"attention_mask": whole}, past_key_values=cache).logits
        for row, prompt in enumerate(rows):
            alone = padded(processor, [prompt + " and <image> what is this"], pictures)
            own = run(model, alone).logits[0, -inputs["input_ids"].shape[1] :]
            torch.testing.assert_close(found[row], own, **CLOSE)


SELECTED = {
    "selected": lambda cache, mask: (cache.batch_select_indices(torch.tensor([1])), mask[1:]),
    "reordered": lambda cache, mask: (cache.reorder_cache(torch.tensor([1, 0])), mask.flip(0)),
    "written to": lambda cache, mask: (swap_in_place(cache), mask.flip(0)),
}


def swap_in_place(cache):
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            x.copy_(x.flip(0).clone())


@pytest.mark.parametrize("change", SELECTED)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("differ", ["before the picture", "after a turn"])
def test_prompts_with_the_same_picture_are_told_apart(differ, config, change, pictures):
    model, processor = make_model(), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        if differ == "before the picture":
            text = "what is this that a red {} or dog two three and what is this that a red cat <image> what"
            rows = [text.format("dog"), text.format("cat")]
            cache, mask = single_precision(model, processor, pictures[:1], rows)
        else:
            cache, mask = single_precision(model, processor, pictures[:1], ["<image> what is this"])
            cache.batch_repeat_interleave(2)
            questions = processor(
                text=["what", "a red dog or that cat and"], return_tensors="pt", padding=True
            )
            mask = torch.cat([mask.repeat(2, 1), questions["attention_mask"]], 1)
            run(model, {"input_ids": questions["input_ids"], "attention_mask": mask}, past_key_values=cache)
        expected = go_on(model, copy.deepcopy(cache), mask)
        expected = expected[1:] if change == "selected" else expected.flip(0)
        _, mask = SELECTED[change](cache, mask)
        torch.testing.assert_close(go_on(model, cache, mask), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("between", ["plain", "tower"])
def test_a_cache_that_was_refilled_while_nothing_merged_inside_raises(between, config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        cache, mask = filled(model, processor, pictures[:1], ["<image> what is this"])
        go_on(model, cache, mask)
        cache.crop(-4)
    with torch.no_grad():  # one token at a time, which needs no mask
        for word in (6, 5, 7, 8):
            model(input_ids=torch.tensor([[word]]), past_key_values=cache)
    with merge_tokens(model, CONFIGS[config], processor), pytest.raises(RuntimeError, match=REFUSED):
        go_on(model, cache, torch.ones(1, cache.get_seq_length(), dtype=torch.long))


@pytest.mark.parametrize("config", ["best", "llm_proportional", "original", "all"])
def test_a_cached_text_that_another_config_went_on_with_raises(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        cache, mask = filled(model, processor, pictures, ["two red cat"])
    with merge_tokens(model, PLAIN["tower"], processor):
        inputs = padded(processor, ["<image> what is this"], pictures)
        mask = torch.cat([mask, inputs["attention_mask"]], 1)
        run(model, inputs | {"attention_mask": mask}, past_key_values=cache)
    with merge_tokens(model, CONFIGS[config], processor), pytest.raises(RuntimeError, match=REFUSED):
        go_on(model, cache, mask)


def test_a_rebuilt_cache_of_layers_that_merged_raises_also_where_nothing_merges_inside(pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS["decoder"], processor):
        cache, _ = filled(model, processor, pictures[:1], ["<image> what is this"])
    with merge_tokens(model, PLAIN["tower"], processor), pytest.raises(RuntimeError, match=REFUSED):
        model(input_ids=WORDS[:, :1], past_key_values=rebuilt(cache))


@pytest.mark.parametrize("config", CONFIGS)
def test_layers_of_another_cache_or_of_other_lengths_raise_where_tokens_merged(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        cache, mask = filled(model, processor, pictures)
        uneven = copy.deepcopy(cache)
        uneven.layers[2].keys, uneven.layers[2].values = (
            x[:, :, :-1] for x in (uneven.layers[2].keys, uneven.layers[2].values)
        )
        with pytest.raises(RuntimeError, match=REFUSED):
            go_on(model, uneven, mask)
        if CONFIGS[config].merging_layers:
            with pytest.raises(RuntimeError, match=REFUSED):
                first = CONFIGS[config].merging_layers[0] + 1
                cache.layers[first].keys = cache.layers[first].keys.roll(1, 2)
                go_on(model, cache, mask)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_mask_that_contradicts_the_cache_raises(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        cache, mask = filled(model, processor, pictures)
        wrong = mask.clone()
        wrong[0, -1] = 0
        with pytest.raises(RuntimeError, match="attention_mask hides other tokens"):
            go_on(model, cache, wrong)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_detached_cache_holds_no_graph(config, processor, pictures):
    model = make_model()
    with merge_tokens(model, CONFIGS[config], processor):
        inputs = batch(processor, ROWS, pictures)
        cache = model(**inputs, past_key_values=DynamicCache()).past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        found = go_on(model, copy.deepcopy(cache), inputs["attention_mask"])
        assert torch.equal(found, go_on(model, cache, inputs["attention_mask"]))


def test_a_cache_goes_on_in_a_copy_of_the_model(pictures):
    model, processor = precise(make_model()), make_processor()
    apply(model, CONFIGS["best"], processor)
    cache, mask = filled(model, processor, pictures)
    other = copy.deepcopy(model)
    remove(model)
    torch.testing.assert_close(
        go_on(other, copy.deepcopy(cache), mask), go_on(other, cache, mask), rtol=0, atol=0
    )
