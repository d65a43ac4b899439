import copy

import pytest
import torch
from conftest import make_model, make_processor
from precise import CLOSE, alone, answer, padded, precise, run
from prompts import PROMPTS, single
from transformers import DynamicCache

from llava_pitome import MergeConfig, merge_tokens

CONFIGS = {
    "decoder": MergeConfig(decoder={0: 0.5, 1: 3}, llm_proportional=True),
    "block": MergeConfig(decoder={1: 0.4}, site="block", method="tome"),
    "everywhere": MergeConfig(ratio=0.9, prefix=0.5, decoder={0: 0.5}, llm_proportional=True),
    "llm_proportional": MergeConfig(tokens=9, llm_proportional=True),
}
TURNS = {  # what is said in each turn, row by row
    "picture first": (["<image> what is this", "a red <image> cat or <image> dog"],
                      ["a red dog", "two or three and what is that"]),
    "picture last": (["two red cat", "what is this or that"], ["<image> what is this", "a <image> <image>"]),
    "some rows": (["two red cat", "what is <image> or that"], ["<image> what is this", "a red dog"]),
    "both": (["<image> what", "a red <image> or <image>"], ["and what is this <image>", "<image>"]),
}  # fmt: skip
WORDS = torch.tensor([[5, 9, 11, 6]])


def turns(processor, said, pictures):
    return [padded(processor, rows, pictures[i:]) for i, rows in enumerate(said)]


def one_by_one(model, parts, cache=None):
    """Every turn's logits, on one cache."""
    cache, mask, found = cache or DynamicCache(), [], []
    for part in parts:
        mask.append(part["attention_mask"])
        out = run(model, part | {"attention_mask": torch.cat(mask, 1)}, past_key_values=cache)
        found.append(out.logits)
    return found, cache


def in_order(processor, said, pictures):
    """The pictures of all turns prompt by prompt, as one whole prompt has them."""
    own = [alone(processor, rows[row], pictures[i:]) for row in range(2) for i, rows in enumerate(said)]
    return torch.cat([one["pixel_values"] for one in own if "pixel_values" in one])


@pytest.mark.parametrize("said", TURNS)
@pytest.mark.parametrize("config", CONFIGS)
def test_going_on_from_a_cache_is_as_one_whole_prompt(config, said, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        parts = turns(processor, TURNS[said], pictures)
        found, cache = one_by_one(model, parts)
        whole = {k: torch.cat([p[k] for p in parts], 1) for k in ("input_ids", "attention_mask")}
        whole["pixel_values"] = in_order(processor, TURNS[said], pictures)
        expected = run(model, whole)
        real = [p["attention_mask"].bool() for p in parts]
        for part, mask in zip(expected.logits.split([m.shape[1] for m in real], 1), real):
            torch.testing.assert_close(found.pop(0)[mask], part[mask], **CLOSE)
        later = {"input_ids": WORDS.repeat(2, 1)}  # and what is decoded after that
        mask = torch.cat([whole["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
        after = [run(model, later | {"attention_mask": mask}, past_key_values=c).logits
                 for c in (cache, expected.past_key_values)]  # fmt: skip
        torch.testing.assert_close(*after, **CLOSE)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_chat_goes_on_in_generate(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        first, second = turns(processor, TURNS["both"], pictures)
        cache = DynamicCache()
        said = answer(model, first, past_key_values=cache)
        ids = torch.cat([first["input_ids"], said, second["input_ids"]], 1)
        mask = torch.cat([first["attention_mask"], torch.ones_like(said), second["attention_mask"]], 1)
        chat = {"input_ids": ids, "attention_mask": mask}
        found = answer(model, chat | {"pixel_values": second["pixel_values"]}, past_key_values=cache)
        chat["pixel_values"] = in_order(processor, TURNS["both"], pictures)
        assert torch.equal(found, answer(model, chat))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_copied_cache_goes_its_own_way(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        parts = turns(processor, TURNS["picture first"], pictures)
        _, cache = one_by_one(model, parts[:1])
        copied = copy.deepcopy(cache)
        mask = torch.cat([p["attention_mask"] for p in parts], 1)
        found = [run(model, parts[1] | {"attention_mask": mask}, past_key_values=c).logits
                 for c in (copied, cache)]  # fmt: skip
        assert torch.equal(*found)
        assert (
            copied.token_merging.segments[0].length == cache.token_merging.segments[0].length == mask.shape[1]
        )


@pytest.mark.parametrize("config", CONFIGS)
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[config], processor):
        parts = turns(processor, TURNS["picture first"], pictures)
        _, cache = one_by_one(model, parts[:1])
        aside = copy.deepcopy(cache)
        mask = torch.cat([parts[0]["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
        run(model, {"input_ids": WORDS.repeat(2, 1), "attention_mask": mask}, past_key_values=aside)
        aside.crop(-4)
        mask = torch.cat([p["attention_mask"] for p in parts], 1)
        found = [run(model, parts[1] | {"attention_mask": mask}, past_key_values=c).logits
                 for c in (aside, cache)]  # fmt: skip
        torch.testing.assert_close(*found, **CLOSE)
        aside.crop(-parts[1]["input_ids"].shape[1] - 1)  # one word after the second row's picture
        mask = torch.cat([parts[0]["attention_mask"][:, :-1], torch.ones(2, 4, dtype=torch.long)], 1)
        run(model, {"input_ids": WORDS.repeat(2, 1), "attention_mask": mask}, past_key_values=aside)
        aside.crop(-5)
        with pytest.raises(RuntimeError, match="lost 5 tokens, but only 4 come after its last image"):
            run(
                model,
                {"input_ids": WORDS.repeat(2, 1), "attention_mask": mask[:, :-1]},
                past_key_values=aside,
            )


def test_a_cache_that_was_reset_remembers_nothing(pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS["decoder"], processor):
        for said in ("picture first", "picture last"):
            parts = turns(processor, TURNS[said], pictures)
            _, cache = one_by_one(model, turns(processor, TURNS["both"], pictures))
            cache.reset()
            if cache.get_seq_length():
                pytest.skip("transformers before 5.23 fills a cache with zeros to reset it")
            found, _ = one_by_one(model, parts, cache)
            expected, _ = one_by_one(model, parts)
            for one, other, part in zip(found, expected, parts):
                real = part["attention_mask"].bool()
                torch.testing.assert_close(one[real], other[real], **CLOSE)


# What a cache was filled under


def words(mask):
    given = torch.cat([mask, torch.ones(len(mask), 4, dtype=torch.long)], 1)
    return {"input_ids": WORDS.repeat(len(mask), 1), "attention_mask": given}


@pytest.mark.parametrize(
    "other", [{"decoder": {1: 0.5}}, {"decoder": {0: 0.5, 1: 0.5}}, {"ratio": 0.9, "llm_proportional": True}]
)
def test_a_cache_of_another_config_raises(other, model, processor, pictures):
    with merge_tokens(model, MergeConfig(decoder={0: 0.5}), processor):
        first = padded(processor, PROMPTS, pictures)
        cache = run(model, first).past_key_values
    with (
        merge_tokens(model, MergeConfig(**other), processor),
        pytest.raises(RuntimeError, match="another merge"),
    ):
        run(model, words(first["attention_mask"]), past_key_values=cache)


def test_a_cache_of_another_share_in_the_same_layers_goes_on(pictures):
    model, processor, found = precise(make_model()), make_processor(), []
    for second in (0.5, 0.3):
        with merge_tokens(model, MergeConfig(decoder={0: 0.5}), processor):
            first = padded(processor, PROMPTS, pictures)
            cache = run(model, first).past_key_values
        with merge_tokens(model, MergeConfig(decoder={0: second}), processor):
            found.append(run(model, words(first["attention_mask"]), past_key_values=cache).logits)
    assert torch.equal(*found)


def test_a_cache_that_a_plain_model_filled_goes_on_with_and_without_pictures(pictures):
    model, processor = precise(make_model()), make_processor()
    first = padded(processor, PROMPTS, pictures)
    plain = run(model, first).past_key_values
    expected = run(model, words(first["attention_mask"]), past_key_values=copy.deepcopy(plain)).logits
    own = [run(model, alone(processor, p, pictures)).past_key_values for p in PROMPTS]
    with merge_tokens(model, MergeConfig(decoder={0: 0.5}), processor):
        found = run(model, words(first["attention_mask"]), past_key_values=copy.deepcopy(plain)).logits
        torch.testing.assert_close(found, expected, **CLOSE)
        second = padded(processor, PROMPTS, pictures)
        given = second | {"attention_mask": torch.cat([first["attention_mask"], second["attention_mask"]], 1)}
        out = run(model, given, past_key_values=plain)
        assert [x.keys.shape[2] for x in out.past_key_values.layers] == [77 * 2, 77 + 41, 77 + 41]
        for row, (prompt, cache) in enumerate(zip(PROMPTS, own)):
            now = alone(processor, prompt, pictures)
            count = now["attention_mask"].shape[1]
            now["attention_mask"] = torch.ones(1, cache.get_seq_length() + count, dtype=torch.long)
            found = run(model, now, past_key_values=cache).logits[0]
            torch.testing.assert_close(out.logits[row, -count:], found, **CLOSE)


def test_a_cache_that_was_filled_partly_while_nothing_merged_raises(model, processor, pictures):
    config = MergeConfig(decoder={0: 0.5})
    with merge_tokens(model, config, processor):
        cache = run(model, single(processor, PROMPTS[0], pictures)).past_key_values
    with torch.no_grad():
        model(input_ids=WORDS[:, :1], past_key_values=cache)  # one token, which needs no mask
    with merge_tokens(model, config, processor), pytest.raises(RuntimeError, match="while nothing merged"):
        model(input_ids=WORDS, past_key_values=cache)


@pytest.mark.parametrize("change", ["repeated", "picked", "reordered"])
@pytest.mark.parametrize("rows", ["padded", "alike"])
@pytest.mark.parametrize("config", CONFIGS)
def test_prompts_of_a_cache_can_be_picked_repeated_and_reordered(change, rows, config, pictures):
    model, processor = precise(make_model()), make_processor()
    prompts = ["<image> what is this", "<image> is a red cat" if rows == "alike" else "a cat"]
    prompts[0] += " cat" if rows == "alike" else ""
    with merge_tokens(model, CONFIGS[config], processor):
        first = padded(processor, prompts, pictures)
        cache, mask = run(model, first).past_key_values, first["attention_mask"]
        expected = run(model, words(mask), past_key_values=copy.deepcopy(cache)).logits
        if change == "repeated":
            cache.batch_repeat_interleave(2)
            mask, expected = mask.repeat_interleave(2, 0), expected.repeat_interleave(2, 0)
        elif change == "picked":
            cache.batch_select_indices(torch.tensor([1]))
            mask, expected = mask[1:], expected[1:]
        else:
            cache.reorder_cache(torch.tensor([1, 0]))
            mask, expected = mask.flip(0), expected.flip(0)
        found = run(model, words(mask), past_key_values=cache).logits
        torch.testing.assert_close(found, expected, **CLOSE)


def test_a_pass_that_broke_off_leaves_a_cache_that_raises_and_a_model_that_goes_on(
    model, processor, pictures
):
    with merge_tokens(model, MergeConfig(decoder={0: 0.5}), processor):
        inputs = single(processor, PROMPTS[0], pictures)
        expected, cache = run(model, inputs).logits, DynamicCache()
        run(model, inputs, past_key_values=cache)

        def stop(*_):
            raise KeyError

        handle = model.model.language_model.layers[1].mlp.register_forward_hook(stop)
        with pytest.raises(KeyError):
            run(model, words(inputs["attention_mask"]), past_key_values=cache)
        handle.remove()
        with pytest.raises(RuntimeError, match="another merge config"):
            run(model, words(inputs["attention_mask"]), past_key_values=cache)
        assert torch.equal(run(model, inputs).logits, expected)
