"""PaLM's block written a second time, in torch, from the paper's section 2 and the names of flamingo-pytorch's keys."""

import torch
from torch import nn
from torch.nn import functional as F


class Gamma(nn.Module):
    """Layer norm without a bias."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gamma)


class Layer(nn.Module):
    """x + attention(norm(x)) + feed-forward(norm(x)), all of whose first products are one."""

    def __init__(self, dim, heads, dim_head, ff_mult):
        super().__init__()
        self.heads, self.sizes = heads, (heads * dim_head, dim_head, dim_head, dim * ff_mult, dim * ff_mult)
        self.norm = Gamma(dim)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff_out = nn.ModuleDict({"1": nn.Linear(dim * ff_mult, dim, bias=False)})

    def forward(self, x):
        rows, length, _ = x.shape
        q, k, v, up, gate = self.fused_attn_ff_proj(self.norm(x)).split(self.sizes, dim=-1)
        q = q.reshape(rows, length, self.heads, -1)
        q, k = turned(q), turned(k[:, :, None])[:, :, 0]
        scores = torch.einsum("nqhd,nkd->nhqk", q, k) / q.shape[-1] ** 0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        seen = torch.einsum("nhqk,nkd->nqhd", weights, v).reshape(rows, length, -1)
        return x + self.attn_out(seen) + self.ff_out["1"](F.silu(gate) * up)


def turned(x):
    """Values i and i + half of a head, as one complex number, turned by position / 10000^(2i / width)."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones(()), torch.arange(x.shape[1])[:, None] * speed)
    z = torch.complex(x[..., :half], x[..., half:]) * turn[None, :, None]
    return torch.cat([z.real, z.imag], -1)


class PaLM(nn.Module):
    """Ids -> scores; the head is the embedding table."""

    def __init__(self, num_tokens, dim, depth, heads, dim_head, ff_mult=4):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        layer = lambda: nn.ModuleDict({"0": nn.ModuleDict({"fn": Layer(dim, heads, dim_head, ff_mult)})})  # noqa: E731
        self.layers = nn.ModuleList([layer() for _ in range(depth)])
        self.to_logits = nn.ModuleDict({"0": Gamma(dim)})

    def forward(self, ids):
        x = self.token_emb(ids)
        for layer in self.layers:
            x = layer["0"]["fn"](x)
        return self.to_logits["0"](x) @ self.token_emb.weight.T
