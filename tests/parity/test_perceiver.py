"""The Perceiver resampler's three published variants: Idefics 1, Idefics 2, OpenFlamingo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Idefics2Config, IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from lvlm_jax.connectors import FLAMINGO, IDEFICS, IDEFICS2, PerceiverResampler
from lvlm_jax.keymap import Change, Row, dense, layer_norm
from lvlm_jax.nn.linear import abstract
from tests.parity import compare

WIDTH = 32


def features(width=WIDTH):
    return np.random.default_rng(0).normal(size=(3, 17, width)).astype(np.float32)


def check(module, model, rows, what, expected, x=None):
    x = jnp.asarray(features() if x is None else x)
    shapes, _ = abstract(module, x)
    params = compare.load(rows, compare.tensors(model), shapes)
    run = jax.jit(lambda p: module.apply({"params": p}, x))
    compare.close(run(params), expected, what)
    assert compare.dead(run, params) == set()


@pytest.mark.parametrize("qk_norm", [True, False])
def test_idefics(qk_norm):
    torch.manual_seed(0)
    config = IdeficsConfig(vision_config={"embed_dim": WIDTH}, perceiver_config={"qk_layer_norms_perceiver": qk_norm})
    model = compare.perturb(IdeficsPerceiverResampler(config, WIDTH, depth=2, n_heads=4, head_dim=8, n_latents=4))
    sizes = IDEFICS | {"latents": 4, "depth": 2, "heads": 4, "head_dim": 8}
    module = PerceiverResampler(**sizes if qk_norm else sizes | {"qk_norm": None})
    rows = [Row("latents", "latents"), *layer_norm("norm", "layer_norm")]
    for i in range(2):
        a, b = f"layers/{i}", f"blocks.{i}.0"
        rows += layer_norm(f"{a}/norm_context", f"{b}.context_layer_norm")
        rows += layer_norm(f"{a}/norm_latents", f"{b}.latents_layer_norm")
        for x, y in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "output_proj")):
            rows += dense(f"{a}/attn/{x}", f"{b}.{y}")
        for x in ("q", "k") if qk_norm else ():
            rows += layer_norm(f"{a}/attn/{x}_norm", f"{b}.{x}_layer_norm")
        rows += layer_norm(f"{a}/norm_mlp", f"blocks.{i}.1.ln")
        rows += dense(f"{a}/mlp/up", f"blocks.{i}.1.fc") + dense(f"{a}/mlp/down", f"blocks.{i}.1.c_proj")
    with torch.no_grad():
        expected = model(torch.tensor(features()))
    check(module, model, rows, f"Idefics 1, qk norms {qk_norm}", expected)


def test_idefics2():
    torch.manual_seed(0)
    # Its connector is a gated MLP from the tower's width to the language model's, then the resampler.
    connector = compare.perturb(
        Idefics2Connector(
            Idefics2Config(
                vision_config={"hidden_size": 24},
                text_config={
                    "model_type": "mistral",
                    "hidden_size": WIDTH,
                    "intermediate_size": 40,
                    "num_attention_heads": 4,
                },
                perceiver_config={
                    "hidden_size": WIDTH,
                    "resampler_n_latents": 4,
                    "resampler_depth": 2,
                    "resampler_n_heads": 4,
                    "resampler_head_dim": 8,
                    "num_key_value_heads": 2,
                    "rms_norm_eps": 1e-5,
                },
            )
        )
    )
    sizes = {"latents": 4, "depth": 2, "heads": 4, "head_dim": 8, "kv_heads": 2}
    rows = [Row("latents", "latents"), Row("norm/scale", "norm.weight")]
    for i in range(2):
        a, b = f"layers/{i}", f"layers.{i}"
        rows.append(Row(f"{a}/norm_context/scale", f"{b}.input_context_norm.weight"))
        rows.append(Row(f"{a}/norm_latents/scale", f"{b}.input_latents_norm.weight"))
        rows.append(Row(f"{a}/norm_mlp/scale", f"{b}.post_attention_layernorm.weight"))
        for x in ("q", "k", "v", "o"):
            rows += dense(f"{a}/attn/{x}", f"{b}.self_attn.{x}_proj")
        for x in ("gate", "up", "down"):
            rows += dense(f"{a}/mlp/{x}", f"{b}.mlp.{x}_proj")
    x = torch.tensor(features(24))
    with torch.no_grad():
        expected, projected = connector(x, torch.ones(3, 17)), connector.modality_projection(x)
    module = PerceiverResampler(**IDEFICS2 | sizes)
    check(module, connector.perceiver_resampler, rows, "Idefics 2", expected, projected.numpy())


class Flamingo(torch.nn.Module):
    """OpenFlamingo's resampler, re-derived from its equations; names as in its checkpoints.

    latents <- latents + Attention(q = LN(latents); k, v = [LN(features), LN(latents)]), heads of their own width, no
    biases, k and v from one matrix; latents <- latents + W2 gelu(W1 LN(latents)); a last LN.
    """

    def __init__(self, width, latents, depth, heads, head_dim):
        super().__init__()
        self.heads, inner, layers = heads, heads * head_dim, []
        linear = lambda i, o: torch.nn.Linear(i, o, bias=False)  # noqa: E731
        for _ in range(depth):
            attention = torch.nn.Module()
            attention.norm_media, attention.norm_latents = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
            attention.to_q, attention.to_kv = linear(width, inner), linear(width, 2 * inner)
            attention.to_out = linear(inner, width)
            feed = [torch.nn.LayerNorm(width), linear(width, 4 * width), torch.nn.GELU(), linear(4 * width, width)]
            layers.append(torch.nn.ModuleList([attention, torch.nn.Sequential(*feed)]))
        self.latents = torch.nn.Parameter(torch.randn(latents, width))
        self.layers, self.norm = torch.nn.ModuleList(layers), torch.nn.LayerNorm(width)

    def forward(self, features):
        x = self.latents.expand(len(features), -1, -1)
        for attention, feed in self.layers:
            own = attention.norm_latents(x)
            seen = torch.cat([attention.norm_media(features), own], 1)
            k, v = attention.to_kv(seen).chunk(2, -1)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (attention.to_q(own), k, v))
            weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
            x = x + attention.to_out((weights @ v).transpose(1, 2).flatten(2))
            x = x + feed(x)
        return self.norm(x)


def test_open_flamingo():
    torch.manual_seed(0)
    # torch's fresh Linear matrices are larger than those of the other references.
    model = compare.perturb(Flamingo(WIDTH, 4, 2, 4, 8), factor=2.0)
    halves = Change(
        lambda x: tuple(part.T for part in np.split(x, 2)), lambda *parts: np.concatenate([part.T for part in parts])
    )
    rows = [Row("latents", "latents"), *layer_norm("norm", "norm")]
    for i in range(2):
        a, b = f"layers/{i}", f"layers.{i}"
        rows += layer_norm(f"{a}/norm_context", f"{b}.0.norm_media")
        rows += layer_norm(f"{a}/norm_latents", f"{b}.0.norm_latents")
        rows += dense(f"{a}/attn/q", f"{b}.0.to_q") + dense(f"{a}/attn/o", f"{b}.0.to_out")
        rows.append(Row((f"{a}/attn/k/kernel", f"{a}/attn/v/kernel"), f"{b}.0.to_kv.weight", halves))
        rows += layer_norm(f"{a}/norm_mlp", f"{b}.1.0")
        rows += dense(f"{a}/mlp/up", f"{b}.1.1") + dense(f"{a}/mlp/down", f"{b}.1.3")
    with torch.no_grad():
        expected = model(torch.tensor(features()))
    module = PerceiverResampler(**FLAMINGO | {"latents": 4, "depth": 2, "heads": 4, "head_dim": 8})
    check(module, model, rows, "OpenFlamingo (re-derived)", expected)
