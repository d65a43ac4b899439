"""Forward passes that run at the same time in several threads, through one model or several."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import PATCHES, make_model, make_processor
from prompts import PROMPTS, RECIPES, batch, generate, single

from llava_pitome import MergeConfig, apply, merge_tokens
from llava_pitome.merge.plan import trace
from llava_pitome.tracing import record_merges

BEST = MergeConfig.recipe("best", tokens=6)
CONFIGS = [
    *RECIPES, BEST, MergeConfig(method="fastv", decoder={0: 5}), MergeConfig(prefix=9, prefix_metric="keys"),
    MergeConfig(ratio=0.9, decoder={1: 0.5}, positions="original", llm_proportional=True),
]  # fmt: skip
THREADS, ROUNDS = 4, 4


def together(function, works):
    """What a function returns for each piece of work, several of them at the same time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, works))


def cases(processor, pictures):
    """Inputs of different lengths, batch sizes, numbers of images, and without any."""
    found = [single(processor, prompt, pictures[i:] + pictures[:i]) for i, prompt in enumerate(PROMPTS)]
    return [*found, batch(processor, PROMPTS[:3], pictures), batch(processor, PROMPTS[1:], pictures[::-1])]


@pytest.mark.parametrize(
    "config, tower", [*((config, "clip") for config in CONFIGS), (CONFIGS[0], "siglip"), (BEST, "siglip")]
)
def test_threads_get_the_answers_that_they_get_alone(config, tower, pictures):
    model, processor = make_model(tower), make_processor(tower)
    model.generation_config.eos_token_id = None
    with merge_tokens(model, config, processor):
        works = cases(processor, pictures)
        alone = [generate(model, inputs, 3) for inputs in works]
        found = together(lambda inputs: generate(model, inputs, 3), works * ROUNDS)
    assert all(torch.equal(x, y) for x, y in zip(found, alone * ROUNDS))


@pytest.mark.parametrize("config", CONFIGS)
def test_threads_get_the_gradients_that_they_get_alone(config, processor, pictures):
    model = make_model().train()
    with merge_tokens(model, config, processor):
        works = cases(processor, pictures)

        def gradient(inputs):
            weight = model.model.vision_tower.embeddings.patch_embedding.weight
            embedding = model.get_input_embeddings().weight
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            return torch.autograd.grad(loss, (weight, embedding), allow_unused=True)

        alone = [gradient(inputs) for inputs in works]
        found = together(gradient, works * 2)
    for x, y in zip(found, alone * 2):
        assert all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(x, y))


@pytest.mark.parametrize("config", CONFIGS[::3])
def test_checkpointed_threads_get_the_gradients_that_they_get_alone(config, processor, pictures):
    model = make_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with merge_tokens(model, config, processor):
        works = cases(processor, pictures)

        def gradient(inputs):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            return torch.autograd.grad(loss, model.get_input_embeddings().weight)[0]

        alone = [gradient(inputs) for inputs in works]
        found = together(gradient, works * 2)
    assert all(torch.equal(x, y) for x, y in zip(found, alone * 2))


@pytest.mark.parametrize("config", [RECIPES[0], BEST, CONFIGS[-1]])
def test_answers_are_streamed_from_threads(config, processor, pictures):
    from transformers import TextIteratorStreamer

    model = make_model()
    with merge_tokens(model, config, processor):
        works = [single(processor, prompt, pictures) for prompt in PROMPTS[:3]]

        def stream(inputs):
            streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
            options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "streamer": streamer}
            thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
            thread.start()
            said = "".join(streamer)
            thread.join()
            return said

        alone = [stream(inputs) for inputs in works]
        assert together(stream, works * 4) == alone * 4


@pytest.mark.parametrize("config", [RECIPES[3], BEST])
def test_plans_and_records_are_of_a_threads_own_pass(config, processor, pictures):
    model = make_model()
    with merge_tokens(model, config, processor) as handle, record_merges(handle) as recorder:
        works = cases(processor, pictures)[:3]

        def plan(inputs):
            with torch.no_grad():
                model(**inputs)
            merged = recorder.trace().after("prefix").slot
            return trace(handle.plans()), handle.sizes(), merged

        alone = [plan(inputs) for inputs in works]
        found = together(plan, works * 8)
        for x, y in zip(found, alone * 8):
            assert all(torch.equal(a, b) for a, b in zip(x, y))
            assert torch.equal(x[0][0], x[2])


def test_a_thread_that_ran_no_pass_is_told_of_the_last_one(model, processor, pictures):
    with merge_tokens(model, BEST, processor) as handle:
        thread = threading.Thread(target=model, kwargs=single(processor, PROMPTS[0], pictures))
        thread.start()
        thread.join()
        assert trace(handle.plans()).shape == (1, PATCHES) and handle.sizes().sum() == PATCHES
        assert handle.patches() == PATCHES and handle.language_model.tokens[0].sizes.shape == (1, 6)


# DataParallel, which copies a model's modules and runs each copy in a thread


def replicas(model, count):
    """Copies as `torch.nn.parallel.replicate` makes them on devices, here with the same weights."""
    modules = list(model.modules())
    index = {module: i for i, module in enumerate(modules)}
    found = [[module._replicate_for_data_parallel() for module in modules] for _ in range(count)]
    for copied in found:
        for module, replica in zip(modules, copied):
            for name, child in module._modules.items():
                replica._modules[name] = None if child is None else copied[index[child]]
            for name, weight in (*module._parameters.items(), *module._buffers.items()):
                setattr(replica, name, weight)
    return [copied[0] for copied in found]


@pytest.mark.parametrize("config", CONFIGS)
def test_replicas_of_data_parallel_merge_as_the_model(config, processor, pictures):
    model = make_model()
    with merge_tokens(torch.nn.DataParallel(model), config, processor):
        works = cases(processor, pictures)
        with torch.no_grad():
            alone = [model(**inputs).logits for inputs in works]

        def ask(pair):
            with torch.no_grad():
                return pair[0](**pair[1]).logits

        for _ in range(3):
            found = together(ask, list(zip(replicas(model, len(works)), works)))
            assert all(torch.equal(x, y) for x, y in zip(found, alone))
        whole = torch.nn.DataParallel(model)  # around a model that merges, as the Trainer does it
        with torch.no_grad():
            assert torch.equal(whole(**works[-1]).logits, alone[-1])


# Several models


def test_models_whose_passes_alternate_do_not_meet(processor, pictures):
    models = [make_model(seed=i) for i in range(4)]
    for model, config in zip(models, (BEST, BEST, RECIPES[4], RECIPES[0])):
        apply(model, config)
    models.append(copy.deepcopy(models[0]))
    pixels = [single(processor, PROMPTS[0], pictures[i:])["pixel_values"] for i in range(4)]

    def made(model, x):
        return model.get_image_features(pixel_values=x).pooler_output[0]

    with torch.no_grad():
        alone = [made(model, x) for model in models for x in pixels]
        towers = [
            (model, model.model.vision_tower(x, output_hidden_states=True).hidden_states[-2][:, 1:])
            for model in models
            for x in pixels
        ]
        works = [(model, x) for model in models for x in pixels]
        found = together(lambda work: made(*work), works * 4)
    assert len(towers) == len(alone) and all(torch.equal(x, y) for x, y in zip(found, alone * 4))


def test_features_reach_a_projector_in_any_order(processor, pictures):
    first, second = make_model(), make_model(seed=1)
    config = MergeConfig(ratio=0.9, prefix=9, prefix_metric="keys")
    pixels = [single(processor, PROMPTS[0], pictures[i:])["pixel_values"] for i in range(3)]
    works = [(model, x) for x in pixels for model in (first, second)]

    def encode(model, x):
        return model.model.vision_tower(x, output_hidden_states=True).hidden_states[-2][:, 1:]

    for model in (first, second):
        apply(model, config)
    with torch.no_grad():
        alone = [model.model.multi_modal_projector(encode(model, x)) for model, x in works]
        features = [encode(model, x) for model, x in works]
        for order in (range(6), reversed(range(6))):
            found = {i: works[i][0].model.multi_modal_projector(features[i]) for i in order}
            assert all(torch.equal(found[i], alone[i]) for i in range(6))
            features = [encode(model, x) for model, x in works]
