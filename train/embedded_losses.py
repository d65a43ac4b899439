"""What the embedded model is trained on: answers, and what helps it find them sooner."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from train import embedded_data as data
from train import embedded_model as parts

SIZES = [len(v) + 1 for v in data.LABELS.values()] + [
    data.GRID,
    data.GRID,
]  # classes; row and column come last


class Losses:
    """The losses of a model, and the patch heads that only training needs."""

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer, options: dict):
        self.model, self.options = model, options
        self.heads = nn.Linear(parts.WIDTH, sum(SIZES)).to(model.device)
        self.words = data.words(tokenizer, model.device)
        self.sides = data.sides(tokenizer, model.device)

    def patches(self, features: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
        """Cross-entropy of what lies under each patch, and of where that is; objects count as much."""
        facts, total = {}, 0.0
        *logits, rows, columns = self.heads(features.float()).split(SIZES, dim=-1)
        here = torch.arange(data.PATCHES, device=features.device).repeat(len(features))
        total = total + F.cross_entropy(rows.flatten(0, 1), here // data.GRID)
        total = total + F.cross_entropy(columns.flatten(0, 1), here % data.GRID)
        for i, (name, part) in enumerate(zip(data.LABELS, logits, strict=True)):
            target = labels[..., i].flatten()
            each = F.cross_entropy(part.flatten(0, 1), target, reduction="none")
            here = target > 0
            total = total + each[here].mean() + 0.5 * each[~here].mean()
            facts[name] = (part.flatten(0, 1)[here].argmax(-1) == target[here]).float().mean().item()
        return total / len(SIZES), facts

    def tower(self, batch: dict) -> tuple[Tensor, dict]:
        """First stage: the tower's features name what lies under each patch."""
        with self.autocast():
            features = self.model.model.vision_tower(
                batch["pixel_values"].to(self.model.device)
            ).last_hidden_state
        loss, facts = self.patches(features[:, 1:], batch["patches"].to(self.model.device))
        return loss, {"loss": loss.item()} | facts

    def answers(self, batch: dict) -> tuple[Tensor, dict]:
        """Later stages: next-token loss on the answers of a conversation about each picture."""
        caught: dict[str, Tensor] = {}
        tower, projector = self.model.model.vision_tower, self.model.model.multi_modal_projector
        with (
            tower.register_forward_hook(lambda _m, _a, out: caught.update(tower=out.last_hidden_state)),
            projector.register_forward_hook(lambda _m, _a, out: caught.update(projected=out)),
            self.pointing().register_forward_pre_hook(
                lambda _m, _a, kw: caught.update(seen=kw["hidden_states"], turn=kw["position_embeddings"]),
                with_kwargs=True,
            ),
        ):
            logits, target = self.logits(batch)
        labels = batch["patches"].to(self.model.device)
        loss = F.cross_entropy(logits, target)
        patches, _ = self.patches(caught["tower"][:, 1:], labels)
        align = self.align(caught["projected"], labels)
        point = self.point(caught["seen"], caught["turn"], batch)
        right = (logits.argmax(-1) == target).float().mean().item()
        facts = {"loss": loss, "point": point, "align": align, "patches": patches}
        for name in ("point", "align", "patches"):
            loss = loss + self.options[f"{name}_loss"] * facts[name]
        return loss, {k: v.item() for k, v in facts.items()} | {"right": right}

    def pointing(self) -> nn.Module:
        """The attention whose first heads learn to look from a noun at what it means."""
        return self.model.model.language_model.layers[1].self_attn

    def point(self, seen: Tensor, turn: tuple[Tensor, Tensor], batch: dict) -> Tensor:
        """Cross-entropy of the patches that a noun means under the attention of two heads."""
        device, attention = self.model.device, self.pointing()
        ids, (rows, places) = batch["input_ids"].to(device), batch["nouns"].to(device).T
        with self.autocast():
            q = attention.q_proj(seen).unflatten(-1, (-1, attention.head_dim))
            k = attention.k_proj(seen).unflatten(-1, (-1, attention.head_dim))
        q, k = apply_rotary_pos_emb(q[:, :, :2], k[:, :, :2], *turn, unsqueeze_dim=2)
        scores = torch.einsum("nhd,nthd->nht", q[rows, places].float(), k[rows].float()) * attention.scaling
        later = torch.arange(ids.shape[1], device=device) > places[:, None]
        share = scores.masked_fill(later[:, None], -torch.inf).log_softmax(-1)
        image = (ids[0] == self.model.config.image_token_id).nonzero().flatten()
        return -(batch["meant"].to(device)[:, None] * share[..., image]).sum(-1).mean()

    def align(self, projected: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the words for what lies under a patch, read off its projected features.

        LLaVA's own first stage aligns features with words through captions; here the words are known.
        """
        words = [
            table[labels[..., i]] for i, table in enumerate(self.words)
        ]  # (B, PATCHES) each, -1: no word
        words += [side.expand(labels.shape[:2]).where(labels[..., 0] > 0, -1) for side in self.sides]
        words = torch.stack(words, -1)
        embeddings = self.model.get_input_embeddings().weight.float()
        unit = F.rms_norm(projected.float(), projected.shape[-1:])
        log_p = F.log_softmax(unit @ embeddings.T, -1).gather(-1, words.clamp_min(0))
        said = words >= 0
        return -(log_p * said).sum() / said.sum()

    def logits(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Logits (words, vocabulary) and targets (words,) where an answer is predicted, and nowhere else."""
        device = self.model.device
        labels = batch["labels"].to(device)
        with self.autocast():
            out = self.model.model(
                input_ids=batch["input_ids"].to(device),
                pixel_values=batch["pixel_values"].to(device),
                use_cache=False,
            )
            where = labels[:, 1:] != data.IGNORE
            logits = self.model.lm_head(out.last_hidden_state[:, :-1][where])
        return logits.float(), labels[:, 1:][where]

    def autocast(self) -> torch.autocast:
        """Half-precision arithmetic over float32 weights."""
        return torch.autocast(self.options["device"], dtype=torch.bfloat16)
