"""CogVLM's language model with its visual expert, begin and end vectors and connector, from its description in torch.

The hub's code needs xformers and a tower of its own; what stands behind the tower is written here from the paper and
the public names, one position at a time where that says most.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, silu

from lvlm_jax.connectors import keys
from lvlm_jax.fusion import visual_expert
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from tests import tiny
from tests.parity import compare

CONFIG = tiny.SYSTEMS["visual_expert"]
I = tiny.IMAGE
ROWS = [[3, I, 4], [2, I, 1, I, 5], [9]]
linear = functools.partial(nn.Linear, bias=False)


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        inner = c.heads * c.head_width
        for kind in ("vision", "language"):
            setattr(self, f"{kind}_expert_query_key_value", linear(c.width, 3 * inner))
            setattr(self, f"{kind}_expert_dense", linear(inner, c.width))
        self.heads, self.theta = c.heads, c.rope_theta

    def forward(self, x, kinds, places):
        """One row: x [T, D], the kind and the place of each position."""
        qkv = torch.stack([getattr(self, f"{k}_expert_query_key_value")(v) for k, v in zip(kinds, x)])
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(0, 1) for part in qkv.chunk(3, dim=-1))
        half = q.shape[-1] // 2
        angle = places[:, None] * self.theta ** (-torch.arange(half) / half)
        q, k = (
            torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
            for a, b in (y.split(half, dim=-1) for y in (q, k))
        )
        scores = q @ k.transpose(1, 2) / (2 * half) ** 0.5
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
        out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        return torch.stack([getattr(self, f"{k}_expert_dense")(v) for k, v in zip(kinds, out)])


class Feed(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj, self.up_proj = linear(c.width, c.mlp_dim), linear(c.width, c.mlp_dim)
        self.down_proj = linear(c.mlp_dim, c.width)

    def forward(self, x):
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(c.width, c.norm_eps), Norm(c.width, c.norm_eps)
        self.self_attn = Attention(c)
        self.mlp = nn.ModuleDict({"vision_mlp": Feed(c), "language_mlp": Feed(c)})

    def forward(self, x, kinds, places):
        x = x + self.self_attn(self.input_layernorm(x), kinds, places)
        y = self.post_attention_layernorm(x)
        return x + torch.stack([self.mlp[f"{kind}_mlp"](one) for kind, one in zip(kinds, y)])


class Glu(nn.Module):
    def __init__(self, features, width, hidden):
        super().__init__()
        self.linear_proj, self.norm1 = linear(features, width), nn.LayerNorm(width)
        self.gate_proj, self.dense_h_to_4h = linear(width, hidden), linear(width, hidden)
        self.dense_4h_to_h = linear(hidden, width)

    def forward(self, x):
        x = gelu(self.norm1(self.linear_proj(x)))
        return self.dense_4h_to_h(silu(self.gate_proj(x)) * self.dense_h_to_4h(x))


class Vision(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.linear_proj = Glu(c.vision.width, c.llm.width, c.connector.hidden)
        self.boi, self.eoi = (nn.Parameter(torch.randn(1, 1, c.llm.width)) for _ in range(2))

    def forward(self, features):
        return torch.cat([self.boi[0], self.linear_proj(features), self.eoi[0]])


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.llm.vocab, c.llm.width)
        self.layers = nn.ModuleList(Layer(c.llm) for _ in range(c.llm.depth))
        self.norm, self.vision = Norm(c.llm.width, c.llm.norm_eps), Vision(c)


class Reference(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.model, self.lm_head = Model(c), linear(c.llm.width, c.llm.vocab)

    def forward(self, parts):
        """One row, given as its parts in order: token ids [n], or a picture's features [P, D]."""
        x, kinds, places = [], [], []
        for part in parts:
            place = places[-1] + 1 if places else 0
            if part.ndim == 1:
                x.append(self.model.embed_tokens(part))
                kinds += ["language"] * len(part)
                places += range(place, place + len(part))
            else:
                x.append(self.model.vision(part))
                kinds += ["vision"] * (1 + len(part)) + ["language"]
                places += [place, *[place + 1] * len(part), place + 2]
        x = torch.cat(x)
        for layer in self.model.layers:
            x = layer(x, kinds, torch.tensor(places, dtype=torch.float32))
        return self.lm_head(self.model.norm(x))


def parts_of(batch, features, row):
    """A row of our batch as the reference's parts."""
    q, size = CONFIG.visual_tokens, int((np.asarray(batch.segments[row]) > 0).sum())
    index, tokens = np.asarray(batch.image_index[row]), np.asarray(batch.tokens[row], np.int64)
    out, at = [], 0
    while at < size:
        if index[at] >= 0:
            out.append(features[int(index[at]) // q])
            at += q
        else:
            stop = next((i for i in range(at, size) if index[i] >= 0), size)
            out.append(torch.tensor(tokens[at:stop]))
            at = stop
    return out


@pytest.mark.slow
def test_whole_model_behind_its_tower():
    torch.manual_seed(0)
    model = compare.perturb(Reference(CONFIG), factor=2.0)
    module, (batch, _) = LVLM(CONFIG), tiny.batch(CONFIG, ROWS)
    batch = jax.tree.map(jnp.asarray, batch)
    shapes, _ = abstract(module, dummy_batch(CONFIG))
    rows = [
        *visual_expert.rows(CONFIG.llm),
        *keys.rows(CONFIG.connector, "connector", "model.vision.linear_proj"),
        *visual_expert.ends_rows(),
    ]
    tower = jax.tree.map(jnp.asarray, tiny.randomize({"vision": shapes.pop("vision")}))
    params = {**compare.load(rows, compare.tensors(model), shapes), **tower}
    features = lambda m, b: m.vision.features(b.patches[0], b.patch_positions[0], b.patch_segments[0])  # noqa: E731
    seen = torch.tensor(np.asarray(tiny.jit(lambda p: module.apply({"params": p}, batch, method=features))(params)))
    expected = [model(parts_of(batch, seen, row)) for row in range(len(ROWS))]
    forward = lambda p: module.apply({"params": {**p, **tower}}, batch, method=tiny.logits)  # noqa: E731
    run, behind = tiny.jit(forward), {k: v for k, v in params.items() if k != "vision"}
    got = run(behind)
    for row, wanted in enumerate(expected):
        compare.close(got[row, : len(wanted)], wanted, f"CogVLM, row {row}, logits")
    assert compare.dead(run, behind) == set()

    pull = [np.random.default_rng(row).normal(size=w.shape).astype(np.float32) for row, w in enumerate(expected)]
    sum((w * torch.tensor(p)).sum() for w, p in zip(expected, pull)).backward()
    loss = lambda p: sum((forward(p)[row, : len(w)] * w).sum() for row, w in enumerate(pull))  # noqa: E731
    grads = tiny.jit(jax.grad(loss))(behind)
    wanted = compare.load(rows, compare.gradients(model), shapes)
    together = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (grads, wanted)]
    compare.close(*together, "CogVLM, gradients")
