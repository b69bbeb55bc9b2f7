"""ChatGLM-6B written a second time, in torch, from its description (systems.md, section 2.15) and its keys' names."""

import torch
from torch import nn
from torch.nn import functional as F


def turned(x, counts):
    """Values i and i + half of `x` [row, head, position, width], as one complex number, turned."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones(()), counts[:, None, :, None] * speed)
    z = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([z.real, z.imag], -1)


class Attention(nn.Module):
    """The first half of a head is turned by the place in the context, the second by the distance behind it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x, places, behind, hidden):
        rows, length, width = x.shape
        each = width // self.heads
        # A head's query, key and value stand together.
        three = self.query_key_value(x).view(rows, length, self.heads, 3, each).permute(3, 0, 2, 1, 4)
        q, k, v = three
        q, k = (
            torch.cat([turned(y[..., : each // 2], places), turned(y[..., each // 2 :], behind)], -1) for y in (q, k)
        )
        weights = (q @ k.mT / each**0.5).masked_fill(hidden[:, None], float("-inf")).softmax(-1)
        return self.dense((weights @ v).transpose(1, 2).reshape(rows, length, width))


class Layer(nn.Module):
    """DeepNorm's sums: what is added to is the normed stream, times sqrt(2 layers)."""

    def __init__(self, width, heads, hidden, layers):
        super().__init__()
        self.alpha = (2 * layers) ** 0.5
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(width, hidden), "dense_4h_to_h": nn.Linear(hidden, width)})

    def forward(self, x, *where):
        y = self.input_layernorm(x)
        y = self.post_attention_layernorm(self.alpha * y + self.attention(y, *where))
        wide = F.gelu(self.mlp["dense_h_to_4h"](y), approximate="tanh")
        return self.alpha * y + self.mlp["dense_4h_to_h"](wide)


class ChatGLM(nn.Module):
    """Ids, how long each row's context is, and the place its answer is written for -> scores."""

    def __init__(self, vocab, width, layers, heads, hidden):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.word_embeddings = nn.Embedding(vocab, width)
        self.transformer.layers = nn.ModuleList([Layer(width, heads, hidden, layers) for _ in range(layers)])
        self.transformer.final_layernorm = nn.LayerNorm(width)

    def forward(self, ids, contexts, masks):
        length = ids.shape[1]
        places, behind, hidden = [], [], []
        for context, mask in zip(contexts, masks):
            rest = length - context
            places.append([*range(context), *[mask] * rest])
            behind.append([0] * context + [1 + n for n in range(rest)])
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            later[:, :context] = False
            hidden.append(later)
        x = self.transformer.word_embeddings(ids)
        for layer in self.transformer.layers:
            x = layer(x, torch.tensor(places), torch.tensor(behind), torch.stack(hidden))
        return self.transformer.final_layernorm(x) @ self.transformer.word_embeddings.weight.T
