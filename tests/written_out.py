"""A LLaVA's language model in plain torch, one prompt at a time: it merges, and its cache grows."""

import math
from typing import NamedTuple

import torch
from prompts import IMAGE
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava_pitome import METHODS, parents


class Found(NamedTuple):
    """What one pass made.

    Attributes:
        logits: (T, words) of every token, or of what it merged into.
        states: behind each layer, those who are left (T', D).
        attentions: in each layer (H, T', P + T').
    """

    logits: torch.Tensor
    states: list
    attentions: list


class Story:
    """A conversation about pictures, with one cache."""

    def __init__(self, model, config):
        self.model, self.config, self.llm = model, config, model.model.language_model
        none = torch.zeros(2, 0, 8, dtype=torch.float64)
        self.keys, self.values = ([none] * len(self.llm.layers) for _ in range(2))
        self.bias = [none[0, :, 0]] * len(self.llm.layers)

    @torch.no_grad()
    def say(self, ids, pictures=None, sizes=None):
        """Runs token ids (T,), with the features (I, n, D) of their pictures, and sizes (I, n)."""
        ids, states, attentions = torch.as_tensor(ids), [], []
        x = self.llm.embed_tokens(ids)
        groups = []
        if pictures is not None:
            x[ids == IMAGE] = pictures.flatten(0, 1)
            groups = list((ids == IMAGE).nonzero().view(len(pictures), -1))
        sizes = [torch.ones(len(g)) if sizes is None else sizes[n] for n, g in enumerate(groups)]
        position, into = torch.arange(len(ids)) + self.keys[0].shape[1], torch.arange(len(ids))
        for i, layer in enumerate(self.llm.layers):
            h = layer.input_layernorm(x)
            mixed, raw, attention = self.attend(i, h, position, groups, sizes)
            x = x + layer.self_attn.o_proj(mixed)
            attentions.append(attention)
            merges = groups and self.config.decoder.get(i, 1.0) != 1.0
            if merges and self.config.site == "attention":
                x, step, groups, sizes = self.merged(i, x, raw, attention, groups, sizes)
                position, into = position[step[0]], step[1][into]
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if merges and self.config.site == "block":
                x, step, groups, sizes = self.merged(i, x, raw, attention, groups, sizes)
                position, into = position[step[0]], step[1][into]
            states.append(x)
        return Found(self.model.lm_head(self.llm.norm(x))[into], states, attentions)

    def attend(self, i, h, position, groups, sizes):
        """Attention's output, one key a token, and the maps; the cache grows."""
        a = self.llm.layers[i].self_attn
        q, k, v = (p(h).unflatten(-1, (-1, 8)).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
        cos, sin = self.llm.rotary_emb(h, position[None])
        q, turned = apply_rotary_pos_emb(q[None], k[None], cos, sin)
        bias = torch.zeros(len(h), dtype=torch.float64)
        for group, size in zip(groups, sizes):
            bias[group] = size.log().double() * self.config.llm_proportional
        for kept, new in ((self.keys, turned[0]), (self.values, v), (self.bias, bias)):
            kept[i] = torch.cat([kept[i], new], -2 if new.ndim == 3 else 0)
        keys, values = (x[i].repeat_interleave(2, 0) for x in (self.keys, self.values))
        past = keys.shape[1] - len(h)
        scores = q[0] @ keys.transpose(1, 2) / math.sqrt(8) + self.bias[i]
        ahead = torch.ones(len(h), past + len(h), dtype=torch.bool).triu(past + 1)
        attention = scores.masked_fill(ahead, -torch.inf).softmax(-1)
        return (attention @ values).transpose(0, 1).flatten(1), k.mean(0), attention

    def merged(self, i, x, keys, attention, groups, sizes):
        """The states without those who go, who was left and where all went; groups and sizes behind."""
        config, count = self.config, len(x)
        metric = keys if config.metric == "keys" else x
        words = torch.ones(count, dtype=torch.bool)
        for group in groups:
            words[group] = False
        out, target, stays, after = x.clone(), torch.arange(count), words.clone(), []
        for group, size in zip(groups, sizes):
            keep = config.decoder[i]
            left = keep if isinstance(keep, int) else math.ceil(len(group) * keep)
            given = self.given(metric, attention, group, size, words)
            found = fewer(config, metric[group], x[group], size, len(group) - left, i / 3, given)
            kept, slot, out[group[found[0]]], size = found[0], found[1], found[2], found[3]
            target[group] = group[kept][slot]
            stays[group[kept]] = True
            after.append((group[kept], size))
        index = stays.nonzero().flatten()
        place = torch.full((count,), -1)
        place[index] = torch.arange(len(index))
        return out[index], (index, place[target]), [place[g] for g, _ in after], [s for _, s in after]

    def given(self, metric, attention, group, size, words):
        """What methods may ask for, by brute force from the maps."""
        seen = attention.mean(0)[:, attention.shape[2] - attention.shape[1] :][:, group]  # (T, n)
        behind = words & (torch.arange(len(words)) > group[0])
        return {
            "size": size,
            "received_attention": seen.mean(0),
            "last_attention": seen[-1],
            "text_attention": seen[behind],
            "text": metric[behind],
            "asks": torch.ones(int(behind.sum()), dtype=torch.bool),
            "grid": torch.tensor([6, 6]),
        }


def fewer(config, metric, x, size, remove, depth, given):
    """Of one image's tokens (n, D): who stays, everybody's slot, the states that come of it, and sizes."""
    method, count = METHODS[config.method], len(x)
    given = {n: tuple(given[n].tolist()) if n == "grid" else given[n][None] for n in method.needs}
    options = {**config.parameters, **given, "depth": depth}
    weight = torch.ones(count, dtype=torch.float64)
    if method.kept:
        kept = method.kept(metric[None], remove, **options)[0]
        slot = (kept[:, None] <= torch.arange(count)).sum(0).sub(1).clamp(min=0)
        return kept, slot, x[kept], size[kept]
    if method.mixed:
        parent, mixing = (y[0] for y in method.mixed(metric[None], remove, **options))
    elif method.weighted:
        parent, weight = (y[0] for y in method.weighted(metric[None], remove, **options))
    else:
        parent = parents(metric[None], remove, config.method, **options)[0]
    kept = (parent == torch.arange(count)).nonzero().flatten()
    members = [(parent == k).nonzero().flatten() for k in kept]
    slot = (parent[:, None] == kept).to(torch.uint8).argmax(1)
    counted = size.double() * weight
    sizes = torch.stack([counted[m].sum() for m in members]).float()
    if method.mixed:
        return kept, slot, mixing.double() @ x, sizes
    share = counted if config.size_weighted else weight
    rows = [(x[m] * share[m, None]).sum(0) / share[m].sum() for m in members]
    if method.keeps_norm:
        several = [(weight[m] > 0).sum() > 1 for m in members]
        longest = [x[m][weight[m] > 0].norm(dim=-1).max() for m in members]
        rows = [r * n / r.norm() if s else r for r, n, s in zip(rows, longest, several)]
    return kept, slot, torch.stack(rows), sizes
