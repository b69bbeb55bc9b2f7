"""MPT-1B and Chinchilla, re-derived: no library has them. Each is written from its description, one head at a time.

`Mosaic`: x + Wo attention(q_ln(q), k_ln(k), v), then x + down gelu(up(ln_2(x))); the norms of queries and keys run over
all heads; a score falls by 2^-(8 h / H) a position in head h = 1 ... H; nothing has a bias; the head is the table.
`Chinchilla`: RMS norms; the score of query i and key j is (q_i + u) k_j + (q_i + v) W R(i - j), R sines, then cosines.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from lvlm_jax.llm import chinchilla, mosaic_gpt
from lvlm_jax.llm.decoder import Decoder, dummy_inputs
from lvlm_jax.nn.linear import abstract
from tests import tiny
from tests.parity import compare
from tests.parity.test_decoders import plain, scores, tokens


def linear(i, o):
    return nn.Linear(i, o, bias=False)


class Scale(nn.Module):
    """A norm's weight, with the norm from outside: "layer" takes the mean away."""

    def __init__(self, width, kind, eps):
        super().__init__()
        self.weight, self.kind, self.eps = nn.Parameter(torch.ones(width)), kind, eps

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class Feed(nn.Module):
    def __init__(self, c, up, down):
        super().__init__()
        self.names = up, down
        setattr(self, up, linear(c.width, 4 * c.width))
        setattr(self, down, linear(4 * c.width, c.width))

    def forward(self, x):
        up, down = (getattr(self, name) for name in self.names)
        return down(gelu(up(x)))


def attend(q, k, v, heads, score):
    """One head after another; score(h, q_h, k_h) -> [T, T]."""
    out = []
    for h, (a, b, c) in enumerate(zip(*(x.chunk(heads, -1) for x in (q, k, v)))):
        grid = score(h, a, b) / math.sqrt(a.shape[-1])
        grid = grid.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), float("-inf"))
        out.append(grid.softmax(-1) @ c)
    return torch.cat(out, -1)


class MosaicAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.clip = c.heads, c.clip_qkv
        self.Wqkv, self.out_proj = linear(c.width, 3 * c.width), linear(c.width, c.width)
        self.q_ln, self.k_ln = (Scale(c.width, "layer", 1e-5) for _ in range(2))

    def forward(self, x):
        q, k, v = self.Wqkv(x).chunk(3, -1)
        slots = torch.arange(len(x))
        away = (slots[:, None] - slots).abs()

        def score(h, q, k):
            slope = 2.0 ** (-8 * (h + 1) / self.heads)
            return q @ k.T - slope * away * math.sqrt(q.shape[-1])  # what is divided later is multiplied here

        return self.out_proj(attend(self.q_ln(q), self.k_ln(k), v, self.heads, score))


class MosaicBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.ln_2 = (Scale(c.width, "layer", 1e-5) for _ in range(2))
        self.attn, self.mlp = MosaicAttention(c), Feed(c, "mlp_up", "mlp_down")

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Mosaic(nn.Module):
    def __init__(self, c):
        super().__init__()
        blocks = nn.ModuleList(MosaicBlock(c) for _ in range(c.depth))
        parts = {"wte": nn.Embedding(c.vocab, c.width), "blocks": blocks, "ln_f": Scale(c.width, "layer", 1e-5)}
        self.transformer = nn.ModuleDict(parts)

    def forward(self, ids):
        x = self.transformer["wte"](ids)
        for block in self.transformer["blocks"]:
            x = block(x)
        return self.transformer["ln_f"](x) @ self.transformer["wte"].weight.T


class RelativeAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.width = c.heads, c.width
        for name in ("q", "k", "v", "o", "r"):
            setattr(self, f"{name}_proj", linear(c.width, c.width))
        self.u, self.v = (nn.Parameter(torch.zeros(c.heads, c.head_width)) for _ in range(2))

    def forward(self, x):
        size = len(x)
        rates = [10000.0 ** (-2 * i / self.width) for i in range(self.width // 2)]
        wave = lambda d: [math.sin(d * rate) for rate in rates] + [math.cos(d * rate) for rate in rates]  # noqa: E731
        r = self.r_proj(torch.tensor([wave(d) for d in range(size)], dtype=torch.float32)).chunk(self.heads, -1)

        def score(h, q, k):
            rows = []
            for i in range(size):
                row = [(q[i] + self.u[h]) @ k[j] + (q[i] + self.v[h]) @ r[h][i - j] for j in range(i + 1)]
                rows.append(torch.stack([*row, *[torch.zeros(())] * (size - i - 1)]))
            return torch.stack(rows)

        return self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, score))


class ChinchillaBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm_1, self.norm_2 = (Scale(c.width, "rms", c.norm_eps) for _ in range(2))
        self.attn, self.mlp = RelativeAttention(c), Feed(c, "up_proj", "down_proj")

    def forward(self, x):
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Chinchilla(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.decoder.layers = nn.ModuleList(ChinchillaBlock(c) for _ in range(c.depth))
        self.decoder.norm = Scale(c.width, "rms", c.norm_eps)

    def forward(self, ids):
        x = self.decoder.embed_tokens(ids)
        for layer in self.decoder.layers:
            x = layer(x)
        return self.decoder.norm(x) @ self.decoder.embed_tokens.weight.T


CASES = {"mosaic_gpt": (Mosaic, mosaic_gpt), "chinchilla": (Chinchilla, chinchilla)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name):
    kind, family = CASES[name]
    config = tiny.DECODERS[name]
    torch.manual_seed(0)
    model, decoder = compare.perturb(kind(config), factor=2.0), Decoder(config)
    rows, shapes = family.rows(config, ""), abstract(decoder, *dummy_inputs(config))[0]
    params, ids = compare.load(rows, compare.tensors(model), shapes), tokens()
    expected = torch.stack([model(torch.tensor(row)) for row in ids])
    forward = lambda p: decoder.apply({"params": p}, jnp.asarray(ids), *plain(*ids.shape), method=scores)  # noqa: E731
    run = tiny.jit(forward)
    compare.close(run(params), expected, f"{name} (re-derived)")
    assert compare.dead(run, params) == set()

    pull = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(pull)).sum().backward()
    wanted = compare.load(rows, compare.gradients(model), shapes)
    grads = tiny.jit(jax.grad(lambda p: (forward(p) * pull).sum()))(params)
    together = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (grads, wanted)]
    compare.close(*together, f"{name} (re-derived), gradients")


def test_the_counts_that_the_papers_give():
    """A layer of 13 squares of the width and a table read twice; of Chinchilla 70 billion in all."""
    for name, total in (("chinchilla_1.4b", 1.37e9), ("chinchilla_70b", 70.05e9)):
        config = chinchilla.PRESETS[name]
        assert 13 * config.depth * config.width**2 + config.vocab * config.width == pytest.approx(total, rel=5e-3)
