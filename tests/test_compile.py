"""torch.compile, torch.jit.trace and torch.export of models that merge give what the model gives.

Backends other than "eager" see sizes as symbols, and so find what does not work with them.
"""

import shutil
from functools import partial

import pytest
import torch
from conftest import make_model, make_vip_llava
from test_copies import logits, logits_of_wrapped_layers
from transformers import LlavaForConditionalGeneration

from llava_pitome import METHODS, MergeConfig, apply, merge_tokens

PLACES = {"tower": {"ratio": 0.8}, "prefix": {"prefix": 0.5}, "decoder": {"decoder": {0: 0.5}}}
SIDE, PATCH = 48, 8


@pytest.fixture(autouse=True)
def fresh():
    """Graphs of other tests count towards the limit of recompilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def shallow(config, tower=2, llm=2):
    """Returns a merging model of few layers: compiling takes its time."""
    changed = make_model().config
    changed.vision_config.num_hidden_layers, changed.text_config.num_hidden_layers = tower, llm
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(changed).eval()
    apply(model, config)
    return model


def pixels(count, side=SIDE):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def prompts(model, config, count):
    """Returns inputs of as many prompts with one image each."""
    tokens = config.tokens_at((SIDE // PATCH) ** 2, len(model.model.vision_tower.encoder.layers) - 1)
    ids = torch.tensor([[1, *[4] * tokens, 5, 6 + i] for i in range(count)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(count)}


class Features(torch.nn.Module):
    """Image features, after the merge that follows the projector."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return torch.cat(list(self.model.get_image_features(x).pooler_output))


class Tower(torch.nn.Module):
    """The features of the layer that LLaVA reads, of images of any size."""

    def __init__(self, model):
        super().__init__()
        self.tower = model.model.vision_tower

    def forward(self, x):
        return self.tower(x, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]


class Logits(torch.nn.Module):
    """The whole model as a function of tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values):
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False
        ).logits


FEATURES = [
    MergeConfig(ratio=0.8),
    MergeConfig(tokens=7),
    MergeConfig(prefix=0.5),
    MergeConfig(ratio=0.8, prefix=9),
    MergeConfig.recipe("best", tokens=9),
    MergeConfig(resize=(4, 5), ratio=1 / 3),
]


@pytest.mark.parametrize(
    "config, dynamic", [*((c, None) for c in FEATURES), (FEATURES[0], True), (FEATURES[4], True)]
)
def test_compiled_features_are_those_of_the_model(config, dynamic):
    model = shallow(config)
    compiled = torch.compile(Features(model), backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for count in (1, 2, 3):
            expected = Features(model)(pixels(count))
            torch.testing.assert_close(compiled(pixels(count)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [make_vip_llava, lambda layers: make_model(vision_feature_layer=layers)])
@pytest.mark.parametrize("config, dynamic", [(FEATURES[3], None), (FEATURES[4], True)])
def test_compiled_features_of_several_layers_are_those_of_the_model(make, config, dynamic):
    changed = make([1, 3, 2]).config
    changed.vision_config.num_hidden_layers = 4
    model = type(make([1, 3, 2]))(changed).eval()
    apply(model, config)

    def features(x):
        return torch.stack(list(model.get_image_features(x).pooler_output))

    compiled = torch.compile(features, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for count in (1, 2):
            torch.testing.assert_close(compiled(pixels(count)), features(pixels(count)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config, dynamic",
    [
        (MergeConfig(ratio=0.8), True),
        (MergeConfig(tokens=7), None),
        (MergeConfig(resize=(4, 5), ratio=0.8), None),
    ],
)
def test_a_compiled_tower_takes_images_of_several_sizes(config, dynamic):
    model = shallow(config, tower=3)
    compiled = torch.compile(Tower(model), backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for count, side in ((1, 48), (2, 64)):
            x = pixels(count, side)
            torch.testing.assert_close(compiled(x), Tower(model)(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config, dynamic, counts",
    [
        (MergeConfig(decoder={0: 0.5}), None, (1, 2, 3)),
        (MergeConfig(decoder={0: 10}), True, (2,)),
        (MergeConfig.recipe("best", tokens=9), None, (1, 2)),
    ],
)
def test_a_compiled_model_answers_as_it_does_uncompiled(config, dynamic, counts):
    model = shallow(config)
    compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for count in counts:
            inputs = prompts(model, config, count)
            expected = model(**inputs).logits
            torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "part, config",
    [(Features, MergeConfig.recipe("best", ratio=0.8)), (Logits, MergeConfig(decoder={0: 0.5}))],
)
def test_inductor_compiles_what_merges(part, config):
    model = shallow(config)
    inputs = prompts(model, config, 2)
    inputs = [inputs["pixel_values"]] if part is Features else list(inputs.values())
    with torch.no_grad():
        expected = part(model)(*inputs)
        compiled = torch.compile(part(model), dynamic=True)
        torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-4)


def traced_configs():
    """Yields a config for every method in every place of its, and others."""
    for name, method in METHODS.items():
        for place in method.places:
            yield pytest.param(MergeConfig(method=name, **PLACES[place]), id=f"{name}-{place}")
    yield MergeConfig.recipe("best", tokens=9)
    yield MergeConfig.recipe("released", ratio=0.8)
    yield MergeConfig(ratio=0.3, decoder={0: 2})
    yield MergeConfig(resize=(4, 4), decoder={0: 0.5}, positions="original")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("config", traced_configs())
def test_a_traced_model_answers_as_it_does_untraced(config):
    model = shallow(config, tower=4, llm=3)
    first, second = (list(prompts(model, config, 2).values()) for _ in range(2))
    second[2] = pixels(7)[:2]
    with torch.no_grad():
        traced = torch.jit.trace(Logits(model), first, check_trace=False)
        for inputs in (first, second):
            torch.testing.assert_close(traced(*inputs), Logits(model)(*inputs), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("config", FEATURES[:5], ids=lambda c: str(c.changes()))
def test_a_trace_takes_no_other_number_of_images(config):
    with torch.no_grad():
        traced = torch.jit.trace(Features(shallow(config, tower=4)), pixels(2), check_trace=False)
        for count in (1, 3):
            with pytest.raises(RuntimeError):
                traced(pixels(count))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("config", FEATURES[:2], ids=lambda c: str(c.changes()))
def test_a_tower_exports(config, strict):
    model = shallow(config, tower=3)
    with torch.no_grad():
        Tower(model)(pixels(2))  # transformers adds hooks of its own at the first use
        program = torch.export.export(Tower(model), (pixels(2),), strict=strict)
        torch.testing.assert_close(program.module()(pixels(2)), Tower(model)(pixels(2)))


@pytest.mark.parametrize("first", [True, False])
def test_single_layers_may_be_compiled(first, processor, pictures):
    config, plain = MergeConfig.recipe("best", tokens=6), make_model()
    dense = logits(plain, processor, pictures)
    with merge_tokens(plain, config, processor):
        expected = logits(plain, processor, pictures)
    compiled = partial(torch.compile, backend="eager")
    found = logits_of_wrapped_layers(make_model(), config, first, compiled, processor, pictures)
    torch.testing.assert_close(found, (expected, dense), rtol=0, atol=1e-5)
