"""Batches of conversations, and their expansion to the number of image tokens of a step.

Shapes: B rows, T tokens, I images, K tiles.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from train.conversation import IGNORE_INDEX
from train.image_counts import GREY

OF_TEXT = ("input_ids", "labels")


class Collator:
    """Collates items of `data.ConversationDataset`, padded on the right."""

    def __init__(self, processor: Any, grey_size: tuple[int, int] = GREY):
        """Takes the model's processor, and the size of the image that batches of text alone are given."""
        self.processor, self.grey_size = processor, grey_size

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (B, T), one placeholder per image, and the images.

        These are pixel_values (I, 3, H, W). For models that cut images into tiles they are (K, 3, H, W), the
        tiles of all images one after another, beside image_sizes (I, 2) and OneVision's batch_num_images: a
        number for each row with images.

        A batch without images gets a grey one after the end of its first row, where no text token attends to
        it and no label is: ZeRO and DistributedDataParallel need the vision tower to run in every process.
        """
        ids, labels = [item["input_ids"] for item in items], [item["labels"] for item in items]
        mask = [torch.ones_like(row) for row in ids]
        images = [{k: v for k, v in item.items() if k not in OF_TEXT} for item in items]
        images = [found for found in images if found]
        if not images:
            ids[0] = torch.cat([ids[0], ids[0].new_tensor([self.processor.image_token_id])])
            labels[0] = torch.cat([labels[0], labels[0].new_tensor([IGNORE_INDEX])])
            mask[0] = torch.ones_like(ids[0])
            grey = Image.new("RGB", self.grey_size[::-1], (122, 116, 104))
            images = [image_inputs(self.processor, [grey])]
        return {
            "input_ids": pad_sequence(ids, True, self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_sequence(mask, True, 0),
            "labels": pad_sequence(labels, True, IGNORE_INDEX),
        } | {key: torch.cat([found[key] for found in images]) for key in images[0]}


def image_inputs(processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """What a processor makes of the images of one prompt, the tiles of all one after another."""
    if not hasattr(processor.image_processor, "image_grid_pinpoints"):
        return {"pixel_values": processor.image_processor(list(images), return_tensors="pt").pixel_values}
    inputs = dict(processor.image_processor([list(images)], do_pad=False))
    tiles = [torch.as_tensor(x, device="cpu") for x in inputs.pop("pixel_values")]
    others = {key: torch.as_tensor(value, device="cpu") for key, value in inputs.items()}
    return {"pixel_values": torch.cat(tiles)} | others


def expand(
    batch: dict[str, Tensor], image_token_id: int, tokens: int | Sequence[int], pad_token_id: int
) -> dict[str, Tensor]:
    """The batch with every placeholder repeated as often as its image has tokens, padded on the right again.

    The ratio of a step is drawn when the step begins, after its rows were read; the collator cannot do this.

    Args:
        batch: input_ids, attention_mask and labels (B, T), padded on the right; other entries are kept.
        image_token_id: of the placeholder.
        tokens: of each image, in the order of the placeholders, or of all of them.
        pad_token_id: of the padding.
    """
    ids = batch["input_ids"]
    is_image = ids == image_token_id
    repeats = batch["attention_mask"].clone()  # (B, T)
    repeats[is_image] = torch.as_tensor(tokens, device=ids.device).to(repeats)
    lengths = repeats.sum(1)
    is_token = torch.arange(int(lengths.max()), device=ids.device) < lengths[:, None]
    expanded = {}
    for key, padding in (("input_ids", pad_token_id), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
        expanded[key] = torch.full(is_token.shape, padding, dtype=batch[key].dtype, device=ids.device)
        expanded[key][is_token] = batch[key].flatten().repeat_interleave(repeats.flatten())
    return batch | expanded
