"""The losses of the embedded LLaVA-NeXT: answers, and auxiliary ones with which it learns them sooner.

Shapes: B pictures, K tiles with the thumbnail first, P patches of a tile, T image tokens, L tokens of a
prompt, D channels, N nouns.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from train.embedded import next_data as data
from train.embedded.data import label_tokens, side_tokens
from train.embedded.losses import Losses
from train.embedded.model import WIDTH

CLASSES = [*(len(values) + 1 for values in data.LABELS.values()), data.GRID, data.GRID]  # row, column last
IGNORED = -1  # a label that is not learned


def _head(classes: int) -> nn.Module:
    """A classifier that starts without an opinion, so that its first gradients do not change the features."""
    linear = nn.Linear(WIDTH, classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.LayerNorm(WIDTH, elementwise_affine=False), linear)


class NextLosses(Losses):
    """The losses of a LLaVA-NeXT, with the classifiers that only training needs."""

    inputs = ("input_ids", "pixel_values", "image_sizes")
    auxiliary = ("point", "place", "align", "patches")

    def __init__(self, model: LlavaNextForConditionalGeneration, tokenizer: Any, options: dict[str, Any]):
        """Takes the options `point_loss`, `align_loss`, `patches_loss`, `place_loss` and `device`."""
        self.model, self.options = model, options
        self.heads = nn.ModuleDict({"patches": _head(sum(CLASSES)), "place": _head(2 * data.BINS)})
        self.heads.to(model.device)
        self.words = label_tokens(tokenizer, model.device, data.LABELS)
        self.sides = side_tokens(tokenizer, model.device)
        # the layer whose attention learns to attend from a noun to the patches that it refers to: its first
        # head to those of the thumbnail, its second to those of the tiles
        self.pointing = model.model.language_model.layers[1]
        self.attention = self.pointing.self_attn

    def auxiliary_losses(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses named by `auxiliary`, see Losses."""
        return super().auxiliary_losses(outputs, batch) | {"place": self.place_loss(outputs["hidden"], batch)}

    def patch_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of each patch's labels, row and column, and the accuracy of each label on objects.

        Patches with an object and those without weigh 1 and 0.5 in all, however many they are; of marks and
        words, objects without one also weigh 0.5. Features are (B * K, P, D), labels (B, K, P, len(LABELS)).
        """
        *logits, rows, columns = self.heads["patches"](features.float()).split(CLASSES, dim=-1)
        patch = torch.arange(data.PATCHES, device=features.device).repeat(len(features))
        total = F.cross_entropy(rows.flatten(0, 1), patch // data.GRID)
        total = total + F.cross_entropy(columns.flatten(0, 1), patch % data.GRID)
        accuracy = {}
        for i, ((name, values), predicted) in enumerate(zip(data.LABELS.items(), logits, strict=True)):
            target, predicted = self._legible(labels, i).flatten(), predicted.flatten(0, 1)
            losses = F.cross_entropy(predicted, target, reduction="none", ignore_index=IGNORED)
            first = 2 if values[0] == "-" else 1
            for weight, group in (
                (0.5, target == 0), (0.5, (target > 0) & (target < first)), (1.0, target >= first)
            ):  # fmt: skip
                total = total + weight * (losses * group).sum() / group.sum().clamp_min(1)
            shown = target >= first
            accuracy[name] = (predicted[shown].argmax(-1) == target[shown]).float().mean().item()
        return total / len(CLASSES), accuracy

    def _legible(self, labels: Tensor, i: int) -> Tensor:
        """Label i of every patch (B, K, P), where it can be seen; the thumbnail has no legible characters."""
        wanted = labels[..., i]
        if i in data.LEGIBLE:
            wanted = wanted.clone()
            wanted[:, 0] = IGNORED
        return wanted

    def point_loss(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy between the attention of two heads from a noun and the patches it refers to.

        `hidden` (B, L, D) is the attention's input, `rotary` its cosines and sines; `batch` has nouns (N, 2)
        and referents (N, 2, T), see `next_data.noun_referents`.
        """
        device, attention = self.model.device, self.attention
        ids, (rows, positions) = batch["input_ids"].to(device), batch["nouns"].to(device).T
        width = 2 * attention.head_dim
        with self.autocast():
            q = F.linear(hidden, attention.q_proj.weight[:width]).unflatten(-1, (2, -1))
            k = F.linear(hidden, attention.k_proj.weight[:width]).unflatten(-1, (2, -1))
        q, k = apply_rotary_pos_emb(q.float(), k.float(), *rotary, unsqueeze_dim=2)
        image = (ids[0] == self.model.config.image_token_id).nonzero().flatten()
        first, last = int(image[0]), int(image[-1]) + 1  # image tokens are consecutive
        referents, total = batch["referents"].to(device), 0.0
        for row in range(len(ids)):
            chosen = rows == row
            at = positions[chosen]
            scores = torch.einsum("nhd,lhd->nhl", q[row, at], k[row]) * attention.scaling
            is_later = torch.arange(ids.shape[1], device=device) > at[:, None]
            log_p = scores.masked_fill(is_later[:, None], -torch.inf).log_softmax(-1)
            total = total - (referents[chosen] * log_p[..., first:last]).sum()
        return total / referents.sum().clamp_min(1)

    def place_loss(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of row and column in the picture, predicted from hidden states (B, L, D)."""
        device = self.model.device
        image = (batch["input_ids"][0] == self.model.config.image_token_id).nonzero().flatten()
        kept = (batch["tile"] >= 0).nonzero().flatten()  # newlines have no column
        predicted = self.heads["place"](hidden[:, image[kept]].float()).unflatten(-1, (2, data.BINS))
        bins = batch["bins"][kept].to(device).expand(len(hidden), -1, -1)
        return F.cross_entropy(predicted.flatten(0, 2), bins.flatten())

    def align_loss(self, projected: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the words for each patch's labels, predicted by its projected features.

        Patches of the thumbnail are also to say on which side of the picture they are. Projected features are
        (B * K, P, D), labels (B, K, P, len(LABELS)). Patches without words are left out.
        """
        words = [
            torch.where(wanted < 0, -1, table[wanted.clamp_min(0)])
            for table, wanted in ((t, self._legible(labels, i)) for i, t in enumerate(self.words))
        ]
        is_object = labels[..., 0] > 0
        for side in self.sides:
            seen = side.expand(is_object.shape).where(is_object, -1)
            seen[:, 1:] = -1
            words.append(seen)
        words = torch.stack(words, -1).flatten(0, 1)  # (B * K, P, labels); -1: no word
        chosen = is_object.flatten(0, 1)
        words, projected = words[chosen], projected[chosen].float()
        embeddings = self.model.get_input_embeddings().weight.float()
        normalized = F.rms_norm(projected, projected.shape[-1:])
        log_p = F.log_softmax(normalized @ embeddings.T, -1).gather(-1, words.clamp_min(0))
        has_word = words >= 0
        return -(log_p * has_word).sum() / has_word.sum()
