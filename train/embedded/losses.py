"""The losses of the embedded model: answers, and auxiliary ones with which it learns them sooner.

Shapes: B images, P patches of an image, D channels, T tokens of a prompt, N nouns.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from train.embedded import data
from train.embedded.model import WIDTH

CLASSES = [*(len(values) + 1 for values in data.LABELS.values()), data.GRID, data.GRID]  # row, column last


class Losses:
    """The losses of a model, with the patch classifiers that only training needs."""

    inputs = ("input_ids", "pixel_values")  # of the model, in a batch
    auxiliary = ("point", "align", "patches")  # names of the losses beside that of the answers

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: Any, options: dict[str, Any]):
        """Takes the options `point_loss`, `align_loss`, `patches_loss` (weights) and `device`."""
        self.model, self.options = model, options
        self.heads = nn.Linear(WIDTH, sum(CLASSES)).to(model.device)
        self.words = data.label_tokens(tokenizer, model.device)
        self.sides = data.side_tokens(tokenizer, model.device)
        # the layer whose attention's first two heads learn to attend from a noun to the patches it refers to
        self.pointing = model.model.language_model.layers[1]
        self.attention = self.pointing.self_attn

    def tower(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """First stage: the patch loss of the tower's features."""
        pixels = batch["pixel_values"].to(self.model.device).flatten(0, -4)
        with self.autocast():
            features = self.model.model.vision_tower(pixels).last_hidden_state
        loss, accuracy = self.patch_loss(features[:, 1:], batch["patches"].to(self.model.device))
        return loss, {"loss": loss.item()} | accuracy

    def answers(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Later stages: next-token loss on the answers about each image, plus the auxiliary losses."""
        outputs: dict[str, Any] = {}
        tower, projector = self.model.model.vision_tower, self.model.model.multi_modal_projector
        with (
            tower.register_forward_hook(lambda _m, _a, out: outputs.update(features=out.last_hidden_state)),
            projector.register_forward_hook(lambda _m, _a, out: outputs.update(projected=out)),
            self.attention.register_forward_pre_hook(
                lambda _m, _a, inputs: outputs.update(attention=inputs), with_kwargs=True
            ),
            self.pointing.register_forward_hook(lambda _m, _a, out: outputs.update(hidden=out)),
        ):
            logits, targets = self.answer_logits(batch)
        losses = {"loss": F.cross_entropy(logits, targets)} | self.auxiliary_losses(outputs, batch)
        loss = losses["loss"]
        for name in self.auxiliary:
            loss = loss + self.options[f"{name}_loss"] * losses[name]
        accuracy = (logits.argmax(-1) == targets).float().mean().item()
        return loss, {name: value.item() for name, value in losses.items()} | {"right": accuracy}

    def auxiliary_losses(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses named by `auxiliary`.

        Args:
            outputs: of parts of the model: "features" of the tower, "projected" ones, "hidden" states after
                the layer that points, and the keyword arguments of its "attention".
            batch: that they were computed from.
        """
        labels, attended = batch["patches"].to(self.model.device), outputs["attention"]
        return {
            "point": self.point_loss(attended["hidden_states"], attended["position_embeddings"], batch),
            "align": self.align_loss(outputs["projected"], labels),
            "patches": self.patch_loss(outputs["features"][:, 1:], labels)[0],
        }

    def patch_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of each patch's labels, row and column, and the accuracy of each label on objects.

        Patches with an object and those without weigh 1 and 0.5 in all, however many they are. Features are
        (B, P, D), labels (B, P, len(LABELS)) as in `data.patch_labels`.
        """
        *logits, rows, columns = self.heads(features.float()).split(CLASSES, dim=-1)
        patch = torch.arange(data.PATCHES, device=features.device).repeat(len(features))
        total = F.cross_entropy(rows.flatten(0, 1), patch // data.GRID)
        total = total + F.cross_entropy(columns.flatten(0, 1), patch % data.GRID)
        accuracy = {}
        for i, (name, predicted) in enumerate(zip(data.LABELS, logits, strict=True)):
            target, predicted = labels[..., i].flatten(), predicted.flatten(0, 1)
            losses, is_object = F.cross_entropy(predicted, target, reduction="none"), target > 0
            total = total + losses[is_object].mean() + 0.5 * losses[~is_object].mean()
            accuracy[name] = (predicted[is_object].argmax(-1) == target[is_object]).float().mean().item()
        return total / len(CLASSES), accuracy

    def point_loss(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy between the attention of two heads from a noun and the patches it refers to.

        `hidden` (B, T, D) is the attention's input, `rotary` its cosines and sines; `batch` has nouns (N, 2)
        and referents (N, P), see `data.noun_referents`.
        """
        device, attention = self.model.device, self.attention
        ids, (rows, positions) = batch["input_ids"].to(device), batch["nouns"].to(device).T
        with self.autocast():
            q = attention.q_proj(hidden).unflatten(-1, (-1, attention.head_dim))
            k = attention.k_proj(hidden).unflatten(-1, (-1, attention.head_dim))
        q, k = apply_rotary_pos_emb(q[:, :, :2], k[:, :, :2], *rotary, unsqueeze_dim=2)
        scores = torch.einsum("nhd,nthd->nht", q[rows, positions].float(), k[rows].float())
        is_later = torch.arange(ids.shape[1], device=device) > positions[:, None]
        log_p = (scores * attention.scaling).masked_fill(is_later[:, None], -torch.inf).log_softmax(-1)
        image = (ids[0] == self.model.config.image_token_id).nonzero().flatten()
        return -(batch["referents"].to(device)[:, None] * log_p[..., image]).sum(-1).mean()

    def align_loss(self, projected: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the words for each patch's labels and side, predicted by its projected features.

        LLaVA's first stage aligns features with words through captions; here the words are known.
        """
        words = [table[labels[..., i]] for i, table in enumerate(self.words)]  # (B, P) each; -1: no word
        words += [side.expand(labels.shape[:2]).where(labels[..., 0] > 0, -1) for side in self.sides]
        words = torch.stack(words, -1)
        embeddings = self.model.get_input_embeddings().weight.float()
        normalized = F.rms_norm(projected.float(), projected.shape[-1:])
        log_p = F.log_softmax(normalized @ embeddings.T, -1).gather(-1, words.clamp_min(0))
        has_word = words >= 0
        return -(log_p * has_word).sum() / has_word.sum()

    def answer_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (A, vocabulary) that predict the A tokens of answers, and these tokens (A,)."""
        device = self.model.device
        labels = batch["labels"].to(device)
        with self.autocast():
            inputs = {k: batch[k].to(device) for k in self.inputs}
            out = self.model.model(**inputs, use_cache=False)
            is_answer = labels[:, 1:] != data.IGNORE_INDEX
            logits = self.model.lm_head(out.last_hidden_state[:, :-1][is_answer])
        return logits.float(), labels[:, 1:][is_answer]

    def autocast(self) -> torch.autocast:
        """Computation in bfloat16 with float32 weights."""
        return torch.autocast(self.options["device"], dtype=torch.bfloat16)
