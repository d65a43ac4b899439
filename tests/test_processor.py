import copy
import pickle

import pytest
import torch
from conftest import PATCHES, SIDE, make_model, make_processor

from llava_pitome import MergeConfig, apply, merge_tokens, remove
from llava_pitome.models.processors import check, restore, set_token_counts

IMAGE = 4  # the id of <image>


def half(patches):
    return patches // 2


def written(processor, picture, **options):
    ids = processor(images=[picture], text=["<image> what is this"], return_tensors="pt", **options).input_ids
    return (ids == IMAGE).sum().item()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_fitted_processor_writes_as_many_placeholders_as_are_kept(tower, pictures):
    processor = make_processor(tower)
    assert written(processor, pictures[0]) == PATCHES
    set_token_counts(processor, half)
    assert written(processor, pictures[0]) == PATCHES // 2
    restore(processor)
    assert written(processor, pictures[0]) == PATCHES


def test_a_class_token_that_is_kept_is_counted_on_top(processor, pictures):
    processor.vision_feature_select_strategy = "full"
    assert written(processor, pictures[0]) == PATCHES + 1
    set_token_counts(processor, half)
    assert written(processor, pictures[0]) == PATCHES // 2 + 1


def test_each_image_is_counted_by_its_own_size(processor, pictures):
    set_token_counts(processor, half)
    large = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    assert written(processor, pictures[0], **large) == 32
    assert written(processor, pictures[0]) == 18


def test_the_number_of_multimodal_tokens_is_the_fitted_one(processor):
    sizes = [(SIDE, SIDE), (100, 30)]
    assert processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] == [PATCHES] * 2
    set_token_counts(processor, half)
    found = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert found["num_image_tokens"] == [PATCHES // 2] * 2
    assert found["num_image_patches"] == [1, 1]
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()
    restore(processor)
    assert processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] == [PATCHES] * 2


def test_fitting_again_replaces_what_was_fitted(processor, pictures):
    set_token_counts(processor, half)
    set_token_counts(processor, lambda patches: patches - 1)
    assert written(processor, pictures[0]) == PATCHES - 1


def test_unfitting_what_was_never_fitted_does_nothing(processor):
    before = sorted(vars(processor))
    restore(processor)
    assert sorted(vars(processor)) == before


def test_nothing_is_left_in_a_processor(processor):
    before = sorted(vars(processor))
    set_token_counts(processor, half)
    restore(processor)
    assert sorted(vars(processor)) == before


def test_another_processor_is_not_touched(processor, pictures):
    set_token_counts(processor, half)
    assert written(make_processor(), pictures[0]) == PATCHES


def test_a_saved_processor_does_not_know_that_it_was_fitted(processor, tmp_path):
    processor.save_pretrained(tmp_path / "plain")
    set_token_counts(processor, half)
    processor.save_pretrained(tmp_path / "fitted")
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert "processor_config.json" in files
    assert sorted(p.name for p in (tmp_path / "fitted").iterdir()) == files
    for name in files:
        assert (tmp_path / "fitted" / name).read_text() == (tmp_path / "plain" / name).read_text(), name


def test_a_fitted_processor_can_be_shown(processor):
    before = repr(processor)
    set_token_counts(processor, half)
    assert repr(processor) == before


@pytest.mark.parametrize("other", [None, 4, 14])
def test_a_processor_of_another_patch_size_raises(processor, other):
    processor.patch_size = other
    with pytest.raises(ValueError, match=f"patch_size={other!r}, the model 8"):
        check(processor, 8, 0)


def test_what_is_no_llava_processor_raises(processor):
    with pytest.raises(ValueError, match="writes no image placeholders; pass the LlavaProcessor"):
        check(processor.tokenizer, 8, 0)


def test_merging_fits_the_processor_and_gives_it_back(model, processor, pictures):
    with merge_tokens(model, MergeConfig(tokens=7), processor):
        assert written(processor, pictures[0]) == 7
    assert written(processor, pictures[0]) == PATCHES
    apply(model, MergeConfig(tokens=9), processor)
    assert written(processor, pictures[0]) == 9
    remove(model)
    assert written(processor, pictures[0]) == PATCHES


def test_a_processor_that_the_next_config_is_not_given_is_given_back(model, processor, pictures):
    apply(model, MergeConfig(tokens=7), processor)
    apply(model, MergeConfig(tokens=9))
    assert written(processor, pictures[0]) == PATCHES


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_as_many_placeholders_are_written_as_features_arrive(tower, pictures):
    model, processor = make_model(tower), make_processor(tower)
    for tokens in (1, 12, 35, 36):
        with merge_tokens(model, MergeConfig(tokens=tokens), processor), torch.no_grad():
            inputs = processor(
                images=pictures[:2], text=["<image> what", "a <image>"], return_tensors="pt", padding=True
            )
            assert (inputs.input_ids == IMAGE).sum(1).tolist() == [tokens] * 2
            assert model(**inputs).logits.isfinite().all()


def test_labels_and_masks_are_of_the_short_prompt(model, processor, pictures):
    with merge_tokens(model, MergeConfig(tokens=7), processor):
        inputs = processor(images=pictures[0], text="<image> what is this", return_tensors="pt")
    assert inputs.input_ids.shape == inputs.attention_mask.shape == (1, 7 + 3)


def test_a_fitted_processor_is_no_longer_so_once_copied_and_unfitted(processor, pictures):
    set_token_counts(processor, half)
    restore(processor)
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert written(other, pictures[0]) == PATCHES
