import copy
import json

import pytest
import torch
from conftest import LAYERS, PATCHES, make_model, make_processor
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from llava_pitome import MergeConfig, apply, load, merge_tokens, remove

IMAGE, PAD = 4, 3
RECIPES = [
    MergeConfig(ratio=0.8),
    MergeConfig.recipe("released", ratio=0.8),
    MergeConfig(tokens=5, method="tome"),
]
PROMPTS = ["<image> what is this", "a red <image> cat or <image> dog", "what is <image>", "two red cat"]


def images_of(prompt, pictures):
    return pictures[: prompt.count("<image>")]


def batch(processor, prompts, pictures):
    return processor(
        images=[images_of(p, pictures) for p in prompts], text=prompts, return_tensors="pt", padding=True
    )


def generate(model, inputs, count=6):
    return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ]


def single(processor, prompt, pictures):
    return processor(images=images_of(prompt, pictures) or None, text=prompt, return_tensors="pt")


def features(model, inputs):
    with torch.no_grad():
        out = model.model.vision_tower(inputs["pixel_values"].to(model.dtype), output_hidden_states=True)
    return out.hidden_states[model.config.vision_feature_layer]


@pytest.fixture
def saved(model, processor, tmp_path):
    """A folder with a plain model and its processor."""
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


# Apply, remove, and the context


def test_the_readmes_lines_answer_with_fewer_tokens(model, processor, pictures):
    with merge_tokens(model, MergeConfig(ratio=0.9), processor) as merging:
        inputs = processor(images=pictures[0], text="<image> what is this", return_tensors="pt")
        assert (inputs.input_ids == IMAGE).sum() == merging.lengths(PATCHES)[-1] < PATCHES / 1.8
        assert generate(model, inputs).shape == (1, 6)
    assert (
        processor(images=pictures[0], text="<image>", return_tensors="pt").input_ids == IMAGE
    ).sum() == PATCHES


def test_the_config_goes_with_the_model_while_it_merges(model):
    config = MergeConfig(ratio=0.8, parameters={"margin": 0.3})
    with merge_tokens(model, config):
        assert MergeConfig.from_dict(model.config.token_merging) == config
    assert not hasattr(model.config, "token_merging")


def test_removing_what_was_never_applied_does_nothing(model):
    before = model.config.to_dict()
    remove(model)
    remove(model)
    assert model.config.to_dict() == before


def test_an_inner_context_gives_the_outer_config_back(model, processor, pictures):
    def arriving():
        return (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum().item()

    with merge_tokens(model, MergeConfig(tokens=12), processor):
        outer = generate(model, single(processor, PROMPTS[0], pictures))
        with merge_tokens(model, MergeConfig(tokens=7), processor):
            assert arriving() == 7
            with pytest.raises(KeyError), merge_tokens(model, MergeConfig(ratio=1.0), processor):
                assert arriving() == PATCHES
                raise KeyError
            assert arriving() == 7
        assert arriving() == 12
        assert model.config.token_merging["tokens"] == 12
        assert torch.equal(generate(model, single(processor, PROMPTS[0], pictures)), outer)
    assert arriving() == PATCHES


def test_a_copy_of_a_merging_model_merges_by_itself_and_can_be_made_plain(model, pictures):
    plain = features(model, {"pixel_values": torch.ones(1, 3, 48, 48)})
    apply(model, MergeConfig(tokens=9))
    copied = copy.deepcopy(model)
    remove(model)
    assert features(copied, {"pixel_values": torch.ones(1, 3, 48, 48)}).shape[1] == 10
    apply(copied, MergeConfig(tokens=5))
    assert features(copied, {"pixel_values": torch.ones(1, 3, 48, 48)}).shape[1] == 6
    remove(copied)
    again = copy.deepcopy(copied)
    apply(again, MergeConfig(tokens=9))
    for one in (copied, copy.deepcopy(again)):
        remove(one)
        assert torch.equal(features(one, {"pixel_values": torch.ones(1, 3, 48, 48)}), plain)
        assert not hasattr(one.config, "token_merging")


def test_two_models_merge_each_by_its_own_config(pictures):
    one, two, first, second = make_model(), make_model(seed=1), make_processor(), make_processor()
    with merge_tokens(one, MergeConfig(tokens=9), first), merge_tokens(two, MergeConfig(tokens=4), second):
        assert features(one, single(first, PROMPTS[0], pictures)).shape[1] == 10
        assert features(two, single(second, PROMPTS[0], pictures)).shape[1] == 5


# Batches


@pytest.mark.parametrize("config", RECIPES)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_batch_answers_as_its_rows_alone(tower, config, pictures):
    model, processor = make_model(tower), make_processor(tower)
    with merge_tokens(model, config, processor) as merging, torch.no_grad():
        inputs, kept = batch(processor, PROMPTS, pictures), merging.lengths(PATCHES)[-1]
        assert (inputs.input_ids == IMAGE).sum(1).tolist() == [kept, 2 * kept, kept, 0]
        assert (
            (inputs.input_ids[-1] == PAD).sum() > 0 == (inputs.input_ids[-1, -3:] == PAD).sum()
        )  # left padding
        together, answers = model(**inputs).logits, generate(model, inputs)
        for row, prompt in enumerate(PROMPTS):
            alone = single(processor, prompt, pictures)
            length = alone.input_ids.shape[1]
            torch.testing.assert_close(together[row, -length:], model(**alone).logits[0], rtol=0, atol=2e-4)
            assert torch.equal(answers[row], generate(model, alone)[0])


def test_prompts_of_text_alone_answer_as_without_merging(model, processor):
    inputs = processor(text=["what is this", "two and three"], return_tensors="pt", padding=True)
    plain = generate(model, inputs)
    with merge_tokens(model, MergeConfig(ratio=0.8), processor):
        merged = processor(text=["what is this", "two and three"], return_tensors="pt", padding=True)
        assert torch.equal(merged.input_ids, inputs.input_ids)
        assert torch.equal(generate(model, merged), plain)


def test_the_cache_is_as_short_as_the_prompt(model, processor, pictures):
    with merge_tokens(model, MergeConfig(tokens=5), processor), torch.no_grad():
        inputs = single(processor, PROMPTS[0], pictures)
        out = model(**inputs, use_cache=True)
    assert out.past_key_values.get_seq_length() == 5 + 3


def test_labels_train_on_the_short_prompt(model, processor, pictures):
    with merge_tokens(model, MergeConfig(tokens=5), processor):
        inputs = batch(processor, PROMPTS[:2], pictures)
        labels = inputs.input_ids.masked_fill(inputs.input_ids == IMAGE, -100)
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_as_many_placeholders_as_patches_are_an_error_and_no_silent_answer(model, processor, pictures):
    inputs = single(processor, PROMPTS[0], pictures)
    with (
        merge_tokens(model, MergeConfig(tokens=5), processor),
        pytest.raises(ValueError, match="do not match"),
    ):
        model(**inputs)


# Kernels, dtypes, devices


@pytest.mark.parametrize("config", RECIPES)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_sdpa_and_eager_agree(tower, config, pictures):
    processor, found = make_processor(tower), []
    for kernel in ("sdpa", "eager"):
        model = make_model(tower, attn_implementation=kernel)
        with merge_tokens(model, config, processor), torch.no_grad():
            found.append(model(**batch(processor, PROMPTS, pictures)).logits[:, -1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("config", RECIPES)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_bfloat16_answers(tower, kernel, config, pictures):
    model, processor = make_model(tower, attn_implementation=kernel).bfloat16(), make_processor(tower)
    with merge_tokens(model, config, processor) as merging:
        inputs = batch(processor, PROMPTS, pictures).to(torch.bfloat16)
        found = features(model, inputs)
        assert found.dtype == torch.bfloat16
        assert found.isfinite().all()
        assert [s.size.dtype for s in merging.slots] == [torch.float32] * LAYERS
        assert generate(model, inputs).shape == (len(PROMPTS), 6)


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"dtype": torch.bfloat16},
        {"attn_implementation": "eager"},
    ],
)
def test_loading_takes_the_options_of_transformers(model, processor, saved, pictures, options):
    config = MergeConfig(tokens=5)
    loaded, own = load(str(saved), config, **options)
    assert loaded.dtype == options.get("dtype", torch.float32)
    found = generate(loaded, batch(own, PROMPTS, pictures).to(loaded.device))
    with merge_tokens(model.to(loaded.dtype), config, processor):
        assert torch.equal(found.cpu(), generate(model, batch(processor, PROMPTS, pictures)))


# Saving and loading


@pytest.mark.parametrize("config", [*RECIPES, MergeConfig(ratio=(0.9, 0.8, 1.0, 0.5, 1.0, 0.9, 0.9))])
def test_a_saved_model_merges_again_once_loaded(model, processor, pictures, tmp_path, config):
    with merge_tokens(model, config, processor):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        expected = generate(model, batch(processor, PROMPTS, pictures))
    assert (
        MergeConfig.from_dict(json.loads((tmp_path / "config.json").read_text())["token_merging"]) == config
    )
    loaded, own = load(str(tmp_path))
    assert MergeConfig.from_dict(loaded.config.token_merging) == config
    assert torch.equal(generate(loaded, batch(own, PROMPTS, pictures)), expected)
    remove(loaded)
    assert not hasattr(loaded.config, "token_merging")
    assert "token_merging" not in loaded.config.to_dict()
    assert torch.equal(
        generate(loaded, batch(own, PROMPTS, pictures)), generate(model, batch(processor, PROMPTS, pictures))
    )


def test_the_weights_that_are_saved_while_merging_are_the_plain_ones(model, saved, tmp_path):
    with merge_tokens(model, MergeConfig(ratio=0.8)):
        model.save_pretrained(tmp_path / "merging")
    assert (tmp_path / "merging/model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_a_plain_checkpoint_loads_plain(saved, pictures):
    model, processor = load(str(saved))
    assert not hasattr(model.config, "token_merging")
    assert (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum() == PATCHES
    assert not model.training
    assert processor.tokenizer.padding_side == "left"


def test_a_config_that_is_given_wins_over_the_saved_one(model, processor, pictures, tmp_path):
    with merge_tokens(model, MergeConfig(tokens=5), processor):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    loaded, own = load(str(tmp_path), MergeConfig(tokens=11))
    assert (single(own, PROMPTS[0], pictures).input_ids == IMAGE).sum() == 11
    remove(loaded)
    assert not hasattr(loaded.config, "token_merging")


def test_a_checkpoint_with_a_broken_config_raises_with_the_nearest_name(model, processor, tmp_path):
    model.config.token_merging = {"version": 1, "rato": 0.9}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no field 'rato'; the nearest is 'ratio'"):
        load(str(tmp_path))


def test_merging_loads_unmerged_where_transformers_loads_it(model, processor, tmp_path):
    with merge_tokens(model, MergeConfig(tokens=5), processor):
        model.save_pretrained(tmp_path)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 48, 48)
    assert torch.equal(features(plain, {"pixel_values": pixels}), features(model, {"pixel_values": pixels}))
    assert AutoConfig.from_pretrained(tmp_path).token_merging["tokens"] == 5


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


def test_two_passes_before_a_backward_with_checkpointing_raise(model, processor, pictures):
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with merge_tokens(model, MergeConfig(ratio=0.8), processor):
        both = [single(processor, PROMPTS[0], pictures[i:]) for i in range(2)]
        loss = sum(model(**inputs, labels=inputs.input_ids).loss for inputs in both)
        with pytest.raises(RuntimeError, match="backward before the next forward"):
            loss.backward()


def test_reentrant_checkpointing_gives_the_gradients_or_raises_with_what_to_use(processor, pictures):
    """Since 5.23 transformers leaves hooks, and so the merged tokens, outside of what is checkpointed."""
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
        model.model.vision_tower = torch.compile(model.model.vision_tower, backend="eager", dynamic=False)
    else:
        model.model.vision_tower.compile(backend="eager", dynamic=False)
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
    with merge_tokens(torch.compile(model, backend="eager"), MergeConfig(tokens=5)):
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


def test_data_parallel_is_refused(model):
    with pytest.raises(ValueError, match="DataParallel is not supported"):
        apply(torch.nn.DataParallel(model), MergeConfig(tokens=5))


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


# What cannot be done


def test_a_model_that_is_no_llava_raises_with_what_is_supported():
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, vocab_size=9))  # fmt: skip
    for model in (llama, torch.nn.Linear(2, 2)):
        with pytest.raises(
            ValueError, match=f"{type(model).__name__} is not supported. Supported: Llava.*CLIP.*Siglip"
        ):
            apply(model, MergeConfig(ratio=0.9))


def test_a_checkpoint_that_is_no_llava_raises_with_what_is_supported(tmp_path):
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'llama'. Supported: Llava"):
        load(str(tmp_path))


def test_features_of_several_layers_raise():
    model = make_model(vision_feature_layer=[-2, -3])
    with pytest.raises(ValueError, match=r"vision_feature_layer=\[-2, -3\] joins several layers"):
        apply(model, MergeConfig(ratio=0.9))


@pytest.mark.parametrize("layer", [9, -10])
def test_a_feature_layer_that_the_tower_lacks_raises(layer):
    with pytest.raises(ValueError, match=f"vision_feature_layer={layer}"):
        apply(make_model(vision_feature_layer=layer), MergeConfig(ratio=0.9))


def test_more_tokens_than_patches_raise(model):
    with pytest.raises(ValueError, match=r"tokens=37 .*36 patches, allowed is 1 to 36"):
        apply(model, MergeConfig(tokens=37))


def test_another_number_of_ratios_than_layers_raises(model):
    with pytest.raises(ValueError, match="2 shares; the tower has 7 layers"):
        apply(model, MergeConfig(ratio=(0.9, 0.9)))


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
def test_proportional_attention_with_a_kernel_that_takes_no_bias_raises(model, kernel):
    model.model.vision_tower.config._attn_implementation = kernel
    with pytest.raises(ValueError, match=f"{kernel}.*'sdpa' or 'eager'.*proportional=False"):
        apply(model, MergeConfig(ratio=0.9))
    apply(model, MergeConfig(ratio=0.9, proportional=False))
    remove(model)


def test_a_processor_of_another_patch_size_raises(model, processor):
    processor.patch_size = 14
    with pytest.raises(ValueError, match="patch_size=14, the model 8"):
        apply(model, MergeConfig(ratio=0.9), processor)


def test_an_unknown_quantization_raises_before_anything_is_read():
    with pytest.raises(ValueError, match="quantization='3bit' is unknown; allowed are 4bit, 8bit"):
        load("no/such/folder", quantization="3bit")


def failures():
    other = make_processor()
    other.patch_size = 14
    return {
        "tokens": (MergeConfig(tokens=99), None),
        "ratios": (MergeConfig(ratio=(0.9,)), None),
        "processor": (MergeConfig(ratio=0.9), other),
        "no processor": (MergeConfig(ratio=0.9), other.tokenizer),
    }


def hooks(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize("failure", failures())
def test_an_apply_that_fails_leaves_a_plain_model_plain(model, failure):
    before, config = hooks(model), copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError):
        apply(model, *failures()[failure])
    assert hooks(model) == before
    assert model.config.to_dict() == config


@pytest.mark.parametrize("failure", failures())
@pytest.mark.parametrize("verb", ["apply", "merge_tokens"])
def test_an_apply_that_fails_leaves_the_config_before_it_in_force(model, processor, pictures, verb, failure):
    with merge_tokens(model, MergeConfig(tokens=7), processor):
        before, config = hooks(model), copy.deepcopy(model.config.to_dict())
        with pytest.raises(ValueError):
            if verb == "apply":
                apply(model, *failures()[failure])
            else:
                with merge_tokens(model, *failures()[failure]):
                    raise AssertionError("not reached")
        assert hooks(model) == before
        assert model.config.to_dict() == config
        assert (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum() == 7
    assert (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum() == PATCHES


def test_the_saved_processor_loads_unfitted(model, processor, pictures, tmp_path):
    with merge_tokens(model, MergeConfig(tokens=5), processor):
        processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert (single(loaded, PROMPTS[0], pictures).input_ids == IMAGE).sum() == PATCHES
