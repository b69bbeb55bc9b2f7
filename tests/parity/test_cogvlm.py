"""CogVLM whole, from its description in torch: tower, connector, begin and end vectors, visual expert.

The hub's code needs xformers; the model is written here from the paper and the public names, one position at a time
where that says most.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, silu

from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.zoo import cogvlm
from tests import tiny
from tests.parity import compare

CONFIG = tiny.SYSTEMS["cogvlm"]
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


class Patches(nn.Module):
    def __init__(self, v):
        super().__init__()
        self.proj = nn.Conv2d(3, v.width, v.patch_size, v.patch_size)
        self.cls_embedding = nn.Parameter(torch.randn(1, v.width))
        self.position_embedding = nn.Embedding(v.patches + 1, v.width)

    def forward(self, picture):
        x = self.proj(picture).flatten(1).T
        return torch.cat([self.cls_embedding, x]) + self.position_embedding.weight


class TowerAttention(nn.Module):
    def __init__(self, v):
        super().__init__()
        self.heads = v.heads
        self.query_key_value, self.dense = nn.Linear(v.width, 3 * v.width), nn.Linear(v.width, v.width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(0, 1) for y in self.query_key_value(x).chunk(3, -1))
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.dense((weights @ v).transpose(0, 1).flatten(1))


class TowerFeed(nn.Module):
    def __init__(self, v):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(v.width, v.mlp_dim), nn.Linear(v.mlp_dim, v.width)

    def forward(self, x):
        return self.fc2(gelu(self.fc1(x)))


class TowerLayer(nn.Module):
    """Each branch is normed behind itself."""

    def __init__(self, v):
        super().__init__()
        self.attention, self.mlp = TowerAttention(v), TowerFeed(v)
        self.input_layernorm, self.post_attention_layernorm = (nn.LayerNorm(v.width, v.norm_eps) for _ in range(2))

    def forward(self, x):
        x = x + self.input_layernorm(self.attention(x))
        return x + self.post_attention_layernorm(self.mlp(x))


class Vision(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.patch_embedding = Patches(c.vision)
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(TowerLayer(c.vision) for _ in range(c.vision.depth))})
        self.linear_proj = Glu(c.vision.width, c.llm.width, c.connector.hidden)
        self.boi, self.eoi = (nn.Parameter(torch.randn(1, 1, c.llm.width)) for _ in range(2))

    def features(self, picture):
        x = self.patch_embedding(picture)
        for layer in self.transformer["layers"]:
            x = layer(x)
        return x[1:]

    def forward(self, picture):
        return torch.cat([self.boi[0], self.linear_proj(self.features(picture)), self.eoi[0]])


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
        """One row, given as its parts in order: token ids [n], or a picture [3, height, width]."""
        x, kinds, places = [], [], []
        for part in parts:
            place = places[-1] + 1 if places else 0
            if part.ndim == 1:
                x.append(self.model.embed_tokens(part))
                kinds += ["language"] * len(part)
                places += range(place, place + len(part))
            else:
                x.append(self.model.vision(part))
                count = len(x[-1]) - 2
                kinds += ["vision"] * (1 + count) + ["language"]
                places += [place, *[place + 1] * count, place + 2]
        x = torch.cat(x)
        for layer in self.model.layers:
            x = layer(x, kinds, torch.tensor(places, dtype=torch.float32))
        return self.lm_head(self.model.norm(x))


def parts_of(batch, pictures, row):
    """A row of our batch as the reference's parts."""
    q, size = CONFIG.visual_tokens, int((np.asarray(batch.segments[row]) > 0).sum())
    index, tokens = np.asarray(batch.image_index[row]), np.asarray(batch.tokens[row], np.int64)
    out, at = [], 0
    while at < size:
        if index[at] >= 0:
            out.append(pictures[int(index[at]) // q])
            at += q
        else:
            stop = next((i for i in range(at, size) if index[i] >= 0), size)
            out.append(torch.tensor(tokens[at:stop]))
            at = stop
    return out


def references():
    torch.manual_seed(0)
    return compare.perturb(Reference(CONFIG), factor=2.0)


@pytest.mark.slow
def test_the_whole_model():
    model, module = references(), LVLM(CONFIG)
    batch, pictures = tiny.batch(CONFIG, ROWS)
    batch, pictures = jax.tree.map(jnp.asarray, batch), torch.tensor(pictures)
    shapes, _ = abstract(module, dummy_batch(CONFIG))
    rows = cogvlm.rows(CONFIG)
    params = compare.load(rows, compare.tensors(model), shapes)
    features = lambda m, b: m.vision.features(b.patches[0], b.patch_positions[0], b.patch_segments[0])  # noqa: E731
    seen = tiny.jit(lambda p: module.apply({"params": p}, batch, method=features))(params)
    compare.close(seen, torch.stack([model.model.vision.features(x) for x in pictures]), "CogVLM, features")
    expected = [model(parts_of(batch, pictures, row)) for row in range(len(ROWS))]
    forward = lambda p: module.apply({"params": p}, batch, method=tiny.logits)  # noqa: E731
    run = tiny.jit(forward)
    got = run(params)
    for row, wanted in enumerate(expected):
        compare.close(got[row, : len(wanted)], wanted, f"CogVLM, row {row}, logits")
    assert compare.dead(run, params) == set()

    pull = [np.random.default_rng(row).normal(size=w.shape).astype(np.float32) for row, w in enumerate(expected)]
    sum((w * torch.tensor(p)).sum() for w, p in zip(expected, pull)).backward()
    loss = lambda p: sum((forward(p)[row, : len(w)] * w).sum() for row, w in enumerate(pull))  # noqa: E731
    grads = tiny.jit(jax.grad(loss))(params)
    wanted = compare.load(rows, compare.gradients(model), shapes)
    together = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (grads, wanted)]
    compare.close(*together, "CogVLM, gradients")
