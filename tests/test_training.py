import pytest
import torch
from conftest import PATCHES, make_model, make_processor
from prompts import IMAGE, PROMPTS, RECIPES, batch, features, generate, single
from transformers import (
    LlavaForConditionalGeneration,
)

from llava_pitome import MergeConfig, apply, load, merge_tokens, remove

# Training


def gradients(model, inputs, merging_config, **checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable(**checkpointing)
    model.train()
    with merge_tokens(model, merging_config):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", RECIPES)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_gradient_checkpointing_changes_no_gradient(tower, config, pictures):
    processor, model = make_processor(tower), make_model(tower)
    with merge_tokens(model, config, processor):
        inputs = batch(processor, PROMPTS[:2], pictures)
    plain = gradients(model, inputs, config)
    again = gradients(
        make_model(tower), inputs, config, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert plain.keys() == again.keys()
    assert any("vision_tower" in name for name in plain)
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-4, atol=1e-7, msg=name)


def test_layers_run_again_in_gradient_checkpointing(model, processor, pictures):
    """The test above would prove nothing if the tower's layers were not checkpointed."""
    calls = []
    model.model.vision_tower.encoder.layers[3].self_attn.register_forward_hook(lambda *_: calls.append(1))
    with merge_tokens(model, RECIPES[0], processor):
        inputs = batch(processor, PROMPTS[:2], pictures)
    gradients(model, inputs, RECIPES[0], gradient_checkpointing_kwargs={"use_reentrant": False})
    assert len(calls) == 2


def test_two_passes_before_a_backward_with_checkpointing_give_both_gradients(processor, pictures):
    found = []
    for options in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        model = make_model().train()
        if options:
            model.gradient_checkpointing_enable(**options)
        with merge_tokens(model, MergeConfig(ratio=0.8), processor):
            both = [single(processor, PROMPTS[0], pictures[i:]) for i in range(2)]
            sum(model(**inputs, labels=inputs.input_ids).loss for inputs in both).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_reentrant_checkpointing_gives_the_gradients_or_raises_with_what_to_use(processor, pictures):
    """transformers 5.23 leaves a layer's own hooks outside of what is checkpointed, 5.17 does not."""
    with merge_tokens(make_model(), RECIPES[0], processor):
        inputs = batch(processor, PROMPTS[:2], pictures)
    found = []
    for options in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}):
        model = make_model()
        model.enable_input_require_grads()
        try:
            found.append(gradients(model, inputs, RECIPES[0], **options))
        except RuntimeError as error:
            assert "'use_reentrant': False" in str(error)
            assert options
            return
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


# Wrappers


def shallow():
    """Compiling takes its time: three layers instead of eight."""
    config = make_model().config
    config.vision_config.num_hidden_layers = 3
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("how, config", zip(("wrapped", "in place"), RECIPES))
def test_a_compiled_tower_merges_from_apply_to_remove(how, config):
    model, plain, inputs = shallow(), shallow(), {"pixel_values": torch.randn(2, 3, 48, 48)}
    features(model, inputs)  # warm: a cold tower breaks the graph, and so would notice new hooks by chance
    if how == "wrapped":
        model.model.vision_tower = torch.compile(model.model.vision_tower, backend="aot_eager")
    else:
        model.model.vision_tower.compile(backend="aot_eager")
    torch.testing.assert_close(features(model, inputs), features(plain, inputs))
    with merge_tokens(model, config), merge_tokens(plain, config):
        torch.testing.assert_close(features(model, inputs), features(plain, inputs))
        apply(model, MergeConfig(tokens=3))
        assert features(model, inputs).shape[1] == 1 + 3
    torch.testing.assert_close(features(model, inputs), features(plain, inputs))


def test_a_compiled_tower_is_compiled_once_for_all_images_of_a_size():
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    model, pixels = shallow(), torch.randn(4, 2, 3, 48, 48)
    features(model, {"pixel_values": pixels[0]})  # transformers' own hooks, at the first use, break the graph
    with merge_tokens(model, MergeConfig(ratio=0.8)):
        expected = [features(model, {"pixel_values": p}) for p in pixels]
        model.model.vision_tower = torch.compile(model.model.vision_tower, backend=backend, dynamic=False)
        found = [features(model, {"pixel_values": p}) for p in pixels]
    torch.testing.assert_close(found, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*language_model.*\.(q_proj|v_proj)"])
def test_a_model_inside_peft_merges_and_trains(targets, processor, pictures):
    import peft

    model, plain = make_model(), make_model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    config = MergeConfig(tokens=5)
    with merge_tokens(wrapped, config, processor), merge_tokens(plain, config):
        inputs = batch(processor, PROMPTS[:2], pictures)
        assert (inputs.input_ids == IMAGE).sum(1).tolist() == [5, 10]
        with torch.no_grad():  # LoRA starts as nothing
            torch.testing.assert_close(wrapped(**inputs).logits, plain(**inputs).logits)
        before = {n: p.clone() for n, p in wrapped.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
        wrapped.train()
        wrapped(**inputs, labels=inputs.input_ids).loss.backward()
        optimizer.step()
    assert before and all("lora_" in name for name in before)
    moved = [n for n, p in wrapped.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert any("language_model" in name for name in moved)
    assert not hasattr(model.config, "token_merging")
    assert not any(m._forward_pre_hooks for m in model.model.vision_tower.modules())


def test_wrapping_into_peft_keeps_the_config_and_remove_finds_the_model(processor, pictures):
    import peft

    model = make_model()
    apply(model, MergeConfig(tokens=5), processor)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert (generate(wrapped, single(processor, PROMPTS[0], pictures))).shape == (1, 6)
    remove(wrapped)
    assert (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum() == PATCHES


def test_a_model_inside_torch_compile_is_found(model):
    with merge_tokens(torch.compile(model, backend="aot_eager"), MergeConfig(tokens=5)):
        assert features(model, {"pixel_values": torch.randn(1, 3, 48, 48)}).shape[1] == 6


def test_a_model_inside_distributed_data_parallel_merges_and_trains(model, processor, pictures, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        with merge_tokens(wrapped, MergeConfig(tokens=5), processor):
            inputs = single(processor, PROMPTS[0], pictures)
            wrapped(**inputs, labels=inputs.input_ids).loss.backward()
        assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_language_model_answers_and_its_tower_is_the_plain_one(
    quantization, processor, tmp_path, pictures
):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    shape = make_model().config
    shape.text_config.hidden_size, shape.text_config.intermediate_size = (
        64,
        128,
    )  # the 4-bit kernel takes no fewer
    shape.text_config.head_dim = 16
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(shape).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    kind, config = (Linear4bit if quantization == "4bit" else Linear8bitLt), MergeConfig(ratio=0.8)
    loaded, own = load(
        str(tmp_path), config, quantization=quantization, device_map="cpu", dtype=torch.float32
    )
    quantized = {n for n, m in loaded.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}
    linear = {n for n, m in model.model.language_model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert quantized == {f"model.language_model.{n}" for n in linear}
    assert all(isinstance(loaded.get_submodule(n), kind) for n in quantized)
    inputs = batch(own, PROMPTS, pictures)
    with merge_tokens(model, config, processor):
        expected = features(model, inputs)
        plain = model(**inputs).logits
    torch.testing.assert_close(features(loaded, inputs), expected, rtol=0, atol=1e-6)
    assert generate(loaded, inputs).shape == (len(PROMPTS), 6)
    with torch.no_grad():
        found = loaded(**inputs).logits
    assert torch.nn.functional.cosine_similarity(found[:, -1], plain[:, -1], dim=-1).min() > 0.8
    remove(loaded)
    assert features(loaded, inputs).shape[1] == 1 + PATCHES
