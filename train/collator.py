"""Batches of conversations, and their expansion to the number of image tokens of a step.

Shapes: B rows, T tokens, I images.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from train.conversation import IGNORE_INDEX


class Collator:
    """Collates items of `data.ConversationDataset`, padded on the right."""

    def __init__(self, processor: Any):
        """Takes the model's processor."""
        self.processor = processor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (B, T) and pixel_values (I, 3, H, W); one placeholder per image.

        A batch without images gets a grey one after the end of its first row, where no text token attends to
        it and no label is: ZeRO and DistributedDataParallel need the vision tower to run in every process.
        """
        ids, labels = [item["input_ids"] for item in items], [item["labels"] for item in items]
        mask = [torch.ones_like(row) for row in ids]
        pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
        if not pixels:
            ids[0] = torch.cat([ids[0], ids[0].new_tensor([self.processor.image_token_id])])
            labels[0] = torch.cat([labels[0], labels[0].new_tensor([IGNORE_INDEX])])
            mask[0] = torch.ones_like(ids[0])
            grey = Image.new("RGB", (32, 32), (122, 116, 104))
            pixels = [self.processor.image_processor([grey], return_tensors="pt").pixel_values]
        return {
            "input_ids": pad_sequence(ids, True, self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_sequence(mask, True, 0),
            "labels": pad_sequence(labels, True, IGNORE_INDEX),
            "pixel_values": torch.cat(pixels),
        }


def expand(
    batch: dict[str, Tensor], image_token_id: int, tokens: int, pad_token_id: int
) -> dict[str, Tensor]:
    """The batch with every placeholder repeated `tokens` times, padded on the right again.

    The ratio of a step is drawn when the step begins, after its rows were read; the collator cannot do this.

    Args:
        batch: input_ids, attention_mask and labels (B, T), padded on the right; other entries are kept.
        image_token_id: of the placeholder.
        tokens: image tokens of one image.
        pad_token_id: of the padding.
    """
    ids = batch["input_ids"]
    is_image = ids == image_token_id
    repeats = torch.where(is_image, tokens, 1) * (batch["attention_mask"].bool() | is_image)  # (B, T)
    lengths = repeats.sum(1)
    is_token = torch.arange(int(lengths.max()), device=ids.device) < lengths[:, None]
    expanded = {}
    for key, padding in (("input_ids", pad_token_id), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
        expanded[key] = torch.full(is_token.shape, padding, dtype=batch[key].dtype, device=ids.device)
        expanded[key][is_token] = batch[key].flatten().repeat_interleave(repeats.flatten())
    return batch | expanded
