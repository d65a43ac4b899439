"""Pictures of one token each in a batch become as many tokens as arrive at the language model.

How far a step merges is drawn when the step begins, long after its rows were read; this is what is then
left to do.
"""

import torch
from torch import Tensor

from train.encoding import IGNORED


def expand(batch: dict[str, Tensor], image: int, tokens: int, padding: int) -> dict[str, Tensor]:
    """A batch (B, T) with every token `image` written `tokens` times, padded on the right again.

    Args:
        batch: input_ids, attention_mask and labels (B, T), padded on the right; whatever else it holds stays.
        image: id of the placeholder.
        tokens: that one picture becomes.
        padding: id that fills rows up.
    """
    ids = batch["input_ids"]
    kept = batch["attention_mask"].bool() | (ids == image)  # all but padding
    times = torch.where(ids == image, tokens, 1) * kept  # (B, T)
    lengths = times.sum(1)
    fill = {"input_ids": padding, "attention_mask": 0, "labels": IGNORED}
    longer = {
        key: torch.full((len(ids), int(lengths.max())), value, dtype=batch[key].dtype, device=ids.device)
        for key, value in fill.items()
    }
    here = torch.arange(int(lengths.max()), device=ids.device) < lengths[:, None]
    for key, rows in longer.items():
        rows[here] = batch[key].flatten().repeat_interleave(times.flatten())
    return batch | longer
