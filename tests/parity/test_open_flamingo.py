"""OpenFlamingo, re-derived: its delta over a tower and a language model of the torch library, logits of whole rows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from lvlm_jax import params as P
from lvlm_jax import vision
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.hub.open_flamingo import complete, import_delta
from lvlm_jax.hub.safetensors_io import write_folder
from lvlm_jax.llm import gpt_neox, llama, mosaic_gpt, mpt
from lvlm_jax.models.lvlm import LVLM, LVLMConfig, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.zoo import open_flamingo
from tests import tiny
from tests.parity import compare
from tests.parity.test_clip import VISION
from tests.parity.test_decoders import SIZES
from tests.parity.test_flamingo_hosts import Mosaic
from tests.parity.test_gpt import MPT, NEOX
from tests.parity.test_perceiver import Flamingo

I = tiny.IMAGE
TEXT = {**SIZES, "num_hidden_layers": 4}
MOSAIC = dataclasses.replace(tiny.MOSAIC_GPT, depth=4)
RED_PAJAMA = {"num_hidden_layers": 4, "rotary_pct": 1.0, "use_parallel_residual": False}


@dataclasses.dataclass(frozen=True)
class Host:
    """How a language model is made, and where its layers and its tables stand; `config` is ours where it has none."""

    make: Callable
    family: Any
    layers: str
    tables: tuple[str, ...]
    config: Any = None

    def layers_of(self, model):
        *above, last = self.layers.split(".")
        for name in above:
            model = getattr(model, name) if hasattr(model, name) else model[name]
        return getattr(model, last) if hasattr(model, last) else model[last]


HOSTS = {
    "llama": Host(lambda: LlamaForCausalLM(LlamaConfig(**TEXT)), llama, "model.layers", ("model.embed_tokens",)),
    "mosaic_gpt": Host(lambda: Mosaic(MOSAIC), mosaic_gpt, "transformer.blocks", ("transformer.wte",), MOSAIC),
    "gpt_neox": Host(  # both tables have "embed" in their names, and are saved
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX | RED_PAJAMA)),
        gpt_neox,
        "gpt_neox.layers",
        ("gpt_neox.embed_in", "embed_out"),
    ),
    "mpt": Host(
        lambda: MptForCausalLM(MptConfig(**MPT | {"n_layers": 4})), mpt, "transformer.blocks", ("transformer.wte",)
    ),
}
"""What the authors' sizes stand on: the first release, 3B, 4B, 9B."""


class Gated(torch.nn.Module):
    """A gated block from its equations; names as in the checkpoints.

    x <- x + tanh(a) Attention(q = LN(x); k, v = latents of the last picture before), heads of their own width, no
    biases, nothing where no picture stands before; x <- x + tanh(b) W2 gelu(W1 LN(x)).
    """

    def __init__(self, width, visual, heads, head_dim):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        linear = lambda i, o: torch.nn.Linear(i, o, bias=False)  # noqa: E731
        self.attn = torch.nn.Module()
        self.attn.norm, self.attn.to_q = torch.nn.LayerNorm(width), linear(width, inner)
        self.attn.to_kv, self.attn.to_out = linear(visual, 2 * inner), linear(inner, width)
        self.attn_gate, self.ff_gate = (torch.nn.Parameter(torch.tensor([value])) for value in (0.4, -0.7))
        feed = [torch.nn.LayerNorm(width), linear(width, 4 * width), torch.nn.GELU(), linear(4 * width, width)]
        self.ff = torch.nn.Sequential(*feed)

    def forward(self, x, media, before):
        """x [B, T, D]; media [B, N, Q, V]; before [B, T], how many pictures stand up to each position."""
        apart = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        count, latents = media.shape[1:3]
        q = apart(self.attn.to_q(self.attn.norm(x)))
        k, v = (apart(t) for t in self.attn.to_kv(media.flatten(1, 2)).chunk(2, -1))
        owner = torch.arange(1, count + 1).repeat_interleave(latents)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(
            (before[..., None] != owner)[:, None], -1e30
        )
        weights = torch.softmax(scores, -1) * (before > 0)[:, None, :, None]
        x = x + torch.tanh(self.attn_gate) * self.attn.to_out((weights @ v).transpose(1, 2).flatten(2))
        return x + torch.tanh(self.ff_gate) * self.ff(x)


class Before(torch.nn.Module):
    """A decoder layer with a gated block before it; what the block reads is set from outside."""

    def __init__(self, block, layer):
        super().__init__()
        self.gated_cross_attn_layer, self.decoder_layer, self.seen = block, layer, ()

    def forward(self, x, *args, **kwargs):
        rows = x if x.ndim == 3 else x[None]
        seen = self.gated_cross_attn_layer(rows, *self.seen)
        return self.decoder_layer(seen if x.ndim == 3 else seen[0], *args, **kwargs)


def parts(every, kind="llama"):
    """(tower, resampler, language model with gated blocks, the whole as ours)."""
    torch.manual_seed(0)
    tower = compare.perturb(CLIPVisionModel(CLIPVisionConfig(**VISION)))
    made = HOSTS[kind]
    host = compare.perturb(made.make(), seed=1, factor=2.0 if made.config else 5.0)
    resampler = compare.perturb(Flamingo(VISION["hidden_size"], 4, 2, 4, 8), factor=2.0)
    config = LVLMConfig(
        vision=dataclasses.replace(vision.clip.from_hf(tower.config.to_dict()), feature_layer=-1),
        connector=dataclasses.replace(open_flamingo.RESAMPLER, latents=4, depth=2, heads=4, head_dim=8),
        llm=made.config or made.family.from_hf(host.config.to_dict()),
        fusion=CrossAttentionConfig(every=every, heads=2, head_dim=8),
    )
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    ours = {
        "tower": compare.load(vision.clip.rows(config.vision, "", ""), compare.tensors(tower), shapes["vision"]),
        "host": compare.load(made.family.rows(config.llm, ""), saved(host, made), shapes["llm"]),
    }
    layers = made.layers_of(host)
    for i in range(every - 1, config.llm.depth, every):
        block = compare.perturb(Gated(config.llm.width, config.vision.width, 2, 8), seed=i, factor=2.0)
        layers[i] = Before(block, layers[i])
    return tower, resampler, host, config, ours


def saved(host, made):
    """A language model's weights as a file has them: of a tied head no copy, of GPT-NeoX's its old name."""
    state = compare.tensors(host, made.family.UNUSED)
    if made.family is gpt_neox:
        state["embed_out.weight"] = state.pop("lm_head.weight")
    elif made.family is not llama:
        state.pop("lm_head.weight", None)
    return state


def delta(resampler, host, form, kind="llama"):
    """What the authors save of it: "released" blocks in a list of their own, "loop" as the training loop writes it."""
    out = {f"perceiver.{key}": value for key, value in compare.tensors(resampler).items()}
    made = HOSTS[kind]
    for i, layer in enumerate(made.layers_of(host)):
        if isinstance(layer, Before):
            listed, inside = f"gated_cross_attn_layers.{i}", f"{made.layers}.{i}.gated_cross_attn_layer"
            at, own = listed if form == "released" else inside, compare.tensors(layer.gated_cross_attn_layer)
            out |= {f"lang_encoder.{at}.{key}": value for key, value in own.items()}
    tables = {"embed_out": "lm_head"}
    for name in made.tables:
        table = compare.tensors(host)[f"{tables.get(name, name)}.weight"]
        out[f"lang_encoder.{name}.weight"] = table
    if kind == "gpt_neox":  # older versions of the library save buffers, too
        out["lang_encoder.gpt_neox.layers.1.decoder_layer.attention.masked_bias"] = np.float32(-1e9)
    return out if form == "released" else {"epoch": 3, "model_state_dict": {f"module.{k}": v for k, v in out.items()}}


def answer(host, ids, mask):
    """Logits; our own re-derivation takes one row, and blocks that read what stands before in all rows."""
    if not isinstance(host, Mosaic):
        return host(ids, attention_mask=mask).logits
    rows = []
    blocks = [layer for layer in HOSTS["mosaic_gpt"].layers_of(host) if isinstance(layer, Before)]
    kept = [block.seen for block in blocks]
    for row, shown in enumerate(mask.bool()):
        for block, (media, before) in zip(blocks, kept):
            block.seen = (media[row : row + 1], before[row : row + 1, shown])
        out = host(ids[row, shown])
        rows.append(torch.zeros(len(shown), out.shape[-1]))
        rows[-1][shown] = out
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "form", "kind"),
    [
        (2, "released", "llama"),
        pytest.param(1, "loop", "llama", marks=pytest.mark.nightly),
        (1, "loop", "mosaic_gpt"),
        (2, "loop", "gpt_neox"),
        pytest.param(4, "loop", "mpt", marks=pytest.mark.nightly),
    ],
)
def test_logits_of_a_delta(every, form, kind):
    tower, resampler, host, config, ours = parts(every, kind)
    table = {"embed": {"table": ours["host"]["embed"]["table"] + 1.0}}  # the delta's goes before the host's
    host_tree = {**ours["host"], **table}
    params = complete(config, delta(resampler, host, form, kind), ours["tower"], host_tree)
    batch, pictures = tiny.batch(config, [[3, I, 4, I, 2], [I, 2, I, 6]])
    with torch.no_grad():
        features = tower(torch.tensor(pictures), output_hidden_states=True).hidden_states[-1][:, 1:]
        media = resampler(features).unflatten(0, (2, 2))
        before = torch.tensor((batch.image_index >= 0).cumsum(1))
        for layer in HOSTS[kind].layers_of(host):
            layer.seen = (media, before)
        expected = answer(host, torch.tensor(batch.tokens.astype(np.int64)), torch.tensor(batch.segments)).numpy()
    run = jax.jit(lambda p, b: LVLM(config).apply({"params": p}, b, method=tiny.logits))
    shown = batch.segments > 0
    what = f"OpenFlamingo (re-derived) on {kind}, every {every}"
    compare.close(np.asarray(run(params, batch))[shown], expected[shown], what)
    assert P.flatten(params).keys() == {path for row in open_flamingo.rows(config) for path in row.leaves}


@pytest.mark.slow
def test_a_delta_that_does_not_fit():
    config = tiny.SYSTEMS["flamingo"]
    config = dataclasses.replace(config, words=0, fusion=CrossAttentionConfig(every=2, heads=2, head_dim=8))
    weights = tiny.weights(config)
    flat = P.flatten(weights)
    found = {row.theirs: row.save(flat) for row in open_flamingo.trained_rows(config)}
    again = complete(config, found, weights["vision"], weights["llm"])
    jax.tree.map(np.testing.assert_array_equal, again, weights)
    with pytest.raises(ValueError, match=r"the delta: .*(?s:.)*not used \(1\): perceiver.frame_embs"):
        complete(config, {**found, "perceiver.frame_embs": np.zeros(3)}, weights["vision"], weights["llm"])
    less = {key: value for key, value in found.items() if key != "perceiver.latents"}
    with pytest.raises(ValueError, match=r"missing \(1\): perceiver.latents"):
        complete(config, less, weights["vision"], weights["llm"])
    grown = {**found, "lang_encoder.model.embed_tokens.weight": np.zeros((101, 32), np.float32)}
    with pytest.raises(
        ValueError, match=r"another shape than the config's: llm/embed/table \[101, 32\] for \[99, 32\]"
    ):
        complete(config, grown, weights["vision"], weights["llm"])
    with pytest.raises(ValueError, match=r"tower, language model and delta together.*differ at \['vision/"):
        complete(config, found, {}, weights["llm"])


@pytest.mark.nightly
@pytest.mark.parametrize("tied", [True, False])
def test_a_delta_on_folders(tmp_path, tied):
    """The delta's shapes tell its sizes; its table grew by two words, and so does a head that stands by itself."""
    torch.manual_seed(0)
    host = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=tied))
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path / "tower")
    host.save_pretrained(tmp_path / "host")
    host.resize_token_embeddings(101)
    resampler = Flamingo(VISION["hidden_size"], 4, 2, 1, 64)
    for i in (1, 3):
        host.model.layers[i] = Before(Gated(TEXT["hidden_size"], VISION["hidden_size"], 2, 64), host.model.layers[i])
    write_folder(tmp_path / "delta", delta(resampler, host, "released").items())
    loaded = import_delta(tmp_path / "delta", tmp_path / "host", tmp_path / "tower", image_token_id=100)
    config = loaded.config
    assert (config.fusion, config.llm.vocab) == (CrossAttentionConfig(every=2, heads=2), 101)
    assert (config.connector.latents, config.connector.depth, config.connector.heads) == (4, 2, 1)
    assert (config.vision.feature_layer, config.vision.class_feature) == (-1, False)
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    assert jax.tree.map(jax.numpy.shape, loaded.params) == jax.tree.map(jax.numpy.shape, shapes)
    np.testing.assert_array_equal(loaded.params["llm"]["embed"]["table"], host.model.embed_tokens.weight.detach())
