"""A LLaVA's language model in plain torch, one prompt at a time, with merging and a growing KV cache."""

import math
from typing import NamedTuple

import torch
from prompts import IMAGE
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava_pitome import METHODS
from llava_pitome.methods.registry import choose


class Found(NamedTuple):
    """The output of one forward pass.

    Attributes:
        logits: (T, words) of every token, or of the token it merged into.
        states: hidden states (T', D) of the kept tokens after each layer.
        attentions: in each layer (H, T', P + T').
    """

    logits: torch.Tensor
    states: list
    attentions: list


class Story:
    """A conversation about images, with one KV cache."""

    def __init__(self, model, config):
        self.model, self.config, self.llm = model, config, model.model.language_model
        empty = torch.zeros(2, 0, 8, dtype=torch.float64)
        self.keys, self.values = ([empty] * len(self.llm.layers) for _ in range(2))
        self.bias = [empty[0, :, 0]] * len(self.llm.layers)

    @torch.no_grad()
    def say(self, ids, pictures=None, sizes=None):
        """Runs token ids (T,), with the features (I, n, D) of their images, and sizes (I, n)."""
        ids, states, attentions = torch.as_tensor(ids), [], []
        x = self.llm.embed_tokens(ids)
        groups = []
        if pictures is not None:
            x[ids == IMAGE] = pictures.flatten(0, 1)
            groups = list((ids == IMAGE).nonzero().view(len(pictures), -1))
        sizes = [torch.ones(len(g)) if sizes is None else sizes[n] for n, g in enumerate(groups)]
        position, slot = torch.arange(len(ids)) + self.keys[0].shape[1], torch.arange(len(ids))
        for i, layer in enumerate(self.llm.layers):
            output, keys, attention = self.attend(i, layer.input_layernorm(x), position, groups, sizes)
            x = x + layer.self_attn.o_proj(output)
            attentions.append(attention)
            is_merging = groups and self.config.decoder.get(i, 1.0) != 1.0
            for site in ("attention", "block"):
                if is_merging and self.config.site == site:
                    x, kept, step, groups, sizes = self.merge(i, x, keys, attention, groups, sizes)
                    position, slot = position[kept], step[slot]
                if site == "attention":
                    x = x + layer.mlp(layer.post_attention_layernorm(x))
            states.append(x)
        return Found(self.model.lm_head(self.llm.norm(x))[slot], states, attentions)

    def attend(self, i, h, position, groups, sizes):
        """Returns attention's output, one key a token, and the weights; the cache grows."""
        a = self.llm.layers[i].self_attn
        q, k, v = (p(h).unflatten(-1, (-1, 8)).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, rotated = (
            x[0] for x in apply_rotary_pos_emb(q[None], k[None], *self.llm.rotary_emb(h, position[None]))
        )
        bias = torch.zeros(len(h), dtype=torch.float64)
        for group, size in zip(groups, sizes):
            bias[group] = size.log().double() * self.config.llm_proportional
        for cache, new in ((self.keys, rotated), (self.values, v), (self.bias, bias)):
            cache[i] = torch.cat([cache[i], new], -2 if new.ndim == 3 else 0)
        keys, values = (x[i].repeat_interleave(2, 0) for x in (self.keys, self.values))
        past = keys.shape[1] - len(h)
        scores = q @ keys.transpose(1, 2) / math.sqrt(8) + self.bias[i]
        is_later = torch.ones(len(h), past + len(h), dtype=torch.bool).triu(past + 1)
        attention = scores.masked_fill(is_later, -torch.inf).softmax(-1)
        return (attention @ values).transpose(0, 1).flatten(1), k.mean(0), attention

    def merge(self, i, x, keys, attention, groups, sizes):
        """Returns the kept states, their positions, every token's slot, and the groups and sizes after it."""
        config, count = self.config, len(x)
        metric = keys if config.metric == "keys" else x
        is_text = torch.ones(count, dtype=torch.bool)
        for group in groups:
            is_text[group] = False
        out, target, stays, after = x.clone(), torch.arange(count), is_text.clone(), []
        for group, size in zip(groups, sizes):
            amount = config.decoder[i]
            length = amount if isinstance(amount, int) else math.ceil(len(group) * amount)
            inputs = self.inputs(metric, attention, group, size, is_text)
            kept, slot, rows, size = reduced(config, metric[group], x[group], size, length, i / 3, inputs)
            out[group[kept]] = rows
            target[group] = group[kept][slot]
            stays[group[kept]] = True
            after.append((group[kept], size))
        index = stays.nonzero().flatten()
        place = torch.full((count,), -1)
        place[index] = torch.arange(len(index))
        return out[index], index, place[target], [place[g] for g, _ in after], [s for _, s in after]

    def inputs(self, metric, attention, group, size, is_text):
        """Returns what methods may need, by brute force from the attention weights."""
        to_image = attention.mean(0)[:, attention.shape[2] - attention.shape[1] :][:, group]  # (T, n)
        is_after = is_text & (torch.arange(len(is_text)) > group[0])
        return {
            "sizes": size[None],
            "received_attention": to_image.mean(0)[None],
            "last_attention": to_image[-1][None],
            "text_attention": to_image[is_after][None],
            "text": metric[is_after][None],
            "text_mask": torch.ones(1, int(is_after.sum()), dtype=torch.bool),
            "grid": (6, 6),
        }


def reduced(config, metric, x, size, length, depth, inputs):
    """Returns the tokens kept of one image, every token's slot, the kept states (n', D), and sizes."""
    inputs = {name: inputs[name] for name in METHODS[config.method].needs}
    remove = len(x) - length
    result = choose(metric[None], remove, config.method, depth=depth, **inputs, **config.parameters)
    parent = result.parent[0]
    kept = (parent == torch.arange(len(x))).nonzero().flatten()
    weight = torch.ones(len(x), dtype=torch.float64) if result.weight is None else result.weight[0].double()
    if result.prunes:
        weight = (parent == torch.arange(len(x))).double()
    members = [(parent == k).nonzero().flatten() for k in kept]
    slot = (parent[:, None] == kept).to(torch.uint8).argmax(1)
    counted = size.double() * weight
    sizes = torch.stack([counted[m].sum() for m in members]).float()
    if result.mixing is not None:
        return kept, slot, result.mixing[0].double() @ x, sizes
    share = counted if config.size_weighted else weight
    rows = [(x[m] * share[m, None]).sum(0) / share[m].sum() for m in members]
    if result.keeps_norm:
        averaged = [m[weight[m] > 0] for m in members]
        rows = [r * x[m].norm(dim=-1).max() / r.norm() if len(m) > 1 else r for r, m in zip(rows, averaged)]
    return kept, slot, torch.stack(rows), sizes
