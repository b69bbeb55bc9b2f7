"""VideoChat's and VideoChat2's towers against small ones in torch, written from their description; VideoChat whole.

Blocks are EVA's: no bias for keys, GELU. Beside the last of them a query of the clip reads all tokens of all frames.
"""

import copy
import dataclasses
import math
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2QFormerConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from lvlm_jax import params as P
from lvlm_jax.connectors import qformer
from lvlm_jax.llm import llama
from lvlm_jax.models.lvlm import LVLM, LVLMConfig, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.vision import video
from lvlm_jax.vision.video import ClipConfig
from lvlm_jax.zoo import minigpt4, videochat
from tests import tiny
from tests.parity import compare
from tests.parity.test_decoders import SIZES
from tests.parity.test_qformer import QUERIES, WIDTH
from tests.parity.test_qformer import SIZES as QFORMER

pytestmark = pytest.mark.slow

I = tiny.IMAGE
FRAMES, SIDE, PATCH, HEADS, DEPTH, EXTRA = 4, 28, 7, 4, 3, 6
GRID = SIDE // PATCH
EVA = ClipConfig(
    image_size=SIDE,
    patch_size=PATCH,
    width=WIDTH,
    depth=DEPTH,
    heads=HEADS,
    mlp_dim=64,
    activation="gelu",
    norm_eps=1e-6,
    pre_norm=False,
    patch_bias=True,
    pool="token_twice",
    feature_layer=-1,
    feature_norm=True,
    class_feature=True,
    frames=FRAMES,
    global_blocks=2,
)
UMT = ClipConfig(
    image_size=SIDE,
    patch_size=PATCH,
    width=WIDTH,
    depth=DEPTH,
    heads=HEADS,
    mlp_dim=64,
    activation="gelu",
    norm_eps=1e-6,
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    key_bias=False,
    pool="none",
    feature_layer=-1,
    feature_norm=True,
    joint=True,
    frames=FRAMES,
    trained_frames=3,
    final_eps=1e-12,
)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        heads = [y.unflatten(-1, (HEADS, -1)).transpose(-2, -3) for y in (q + self.q_bias, k, v + self.v_bias)]
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(-2, -3).flatten(-2))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-6), nn.LayerNorm(WIDTH, 1e-6)
        self.attn, self.mlp = Attention(), Mlp()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Relation(nn.Module):
    """A query per clip; the patches get what a 3 x 3 x 3 convolution makes of their surroundings, value by value."""

    def __init__(self):
        super().__init__()
        self.dpe = nn.Conv3d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        layers = {"c_fc": nn.Linear(WIDTH, 64), "gelu": nn.GELU(), "c_proj": nn.Linear(64, WIDTH)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, query, frames):
        """query [M, 1, D]; frames [M, T, 1+P, D]."""
        seen = []
        for clip in self.ln_3(frames):
            volume = clip[:, 1:].unflatten(1, (GRID, GRID)).permute(3, 0, 1, 2)  # D, time, rows, columns
            near = self.dpe(volume[None])[0].permute(1, 2, 3, 0).flatten(1, 2)
            seen.append(torch.cat([clip[:, :1], clip[:, 1:] + near], dim=1).flatten(0, 1))
        seen = torch.stack(seen)
        query = query + self.attn(self.ln_1(query), seen, seen, need_weights=False)[0]
        return query + self.mlp(self.ln_2(query))


class Tower(nn.Module):
    def __init__(self, joint):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, WIDTH, (1, PATCH, PATCH), (1, PATCH, PATCH))})
        self.blocks, self.joint = nn.ModuleList(Block() for _ in range(DEPTH)), joint
        if not joint:
            self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
            self.pos_embed = nn.Parameter(torch.randn(1, 1 + GRID**2, WIDTH))
            self.gmhra_cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
            self.gmhra = nn.ModuleList(Relation() for _ in range(2))

    def forward(self, pixels):
        """[M, T, 3, height, width] -> [M, Q, D], before the last norm."""
        x = self.patch_embed["proj"](pixels.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)  # M, T, P, D
        if self.joint:
            x = (x + stretched(x.shape[1])).flatten(1, 2)
            for block in self.blocks:
                x = block(x)
            return x
        x = torch.cat([self.cls_token.expand(*x.shape[:2], 1, -1), x], dim=2) + self.pos_embed
        query = self.gmhra_cls_token.expand(len(x), 1, -1)
        for number, block in enumerate(self.blocks):
            x = block(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            if number >= DEPTH - len(self.gmhra):
                query = self.gmhra[number - DEPTH + len(self.gmhra)](query, x)
        return torch.cat([x.flatten(1, 2), query], dim=1)


def stretched(frames):
    """Sines of places counted through 3 frames, at the middles of others: [T, P, D]."""
    table = torch.empty(3, GRID**2, WIDTH, dtype=torch.float64)
    for frame, patch, value in np.ndindex(*table.shape):
        angle = (frame * GRID**2 + patch) / 10000 ** (2 * (value // 2) / WIDTH)
        table[frame, patch, value] = math.cos(angle) if value % 2 else math.sin(angle)
    moved = F.interpolate(table.permute(1, 2, 0), size=frames, mode="linear").permute(2, 0, 1)
    return moved.float()


class Whole(nn.Module):
    def __init__(self, joint=False):
        super().__init__()
        self.visual_encoder = Tower(joint)
        self.ln_vision = nn.LayerNorm(WIDTH, 1e-12 if joint else 1e-5)

    def forward(self, pixels):
        return self.ln_vision(self.visual_encoder(pixels))


def clips(count, frames=FRAMES):
    return np.random.default_rng(0).normal(size=(count, frames, 3, SIDE, SIDE)).astype(np.float32)


def rows_of(pixels):
    """Frames as vision rows: patches, positions, segments."""
    flat = pixels.reshape(-1, *pixels.shape[2:]).transpose(0, 2, 3, 1)
    cut = np.stack([tiny.cut(picture, PATCH) for picture in flat])
    grid = np.stack(np.meshgrid(*[np.arange(GRID)] * 2, indexing="ij"), -1).reshape(1, -1, 2).astype(np.int32)
    return jnp.asarray(cut), jnp.broadcast_to(grid, (len(cut), *grid.shape[1:])), jnp.ones(cut.shape[:2], jnp.int32)


def tower(config, model):
    module = config.build(jnp.float32)
    shapes, _ = abstract(module, *rows_of(clips(1)))
    return module, compare.load(video.rows(config), compare.tensors(model), {"vision": shapes})


@pytest.mark.parametrize("config", [EVA, UMT], ids=["eva", "umt"])
def test_a_tower(config):
    torch.manual_seed(0)
    model = compare.perturb(Whole(config.joint))
    module, params = tower(config, model)
    pixels = clips(2)
    expected = model(torch.tensor(pixels))
    assert expected.shape[1] == config.features
    run = tiny.jit(lambda p: module.apply({"params": p["vision"]}, *rows_of(pixels), method="features"))
    compare.close(run(params), expected, f"{'UMT' if config.joint else 'GMHRA'}, features of clips")
    dead = compare.dead(run, params)
    assert {path for path in dead if not path.endswith("k/bias")} == set()
    scanned = config.build(jnp.float32, scan=True)
    stacked = P.stack_layers(params["vision"])
    got = tiny.jit(lambda p: scanned.apply({"params": p}, *rows_of(pixels), method="features"))(stacked)
    compare.close(got, expected, "the same, scanned")

    pull = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    exact = copy.deepcopy(model).double()  # two roundings of long sums would be compared otherwise
    (exact(torch.tensor(pixels).double()) * torch.tensor(pull)).sum().backward()
    theirs = compare.load(video.rows(config), compare.gradients(exact), params)
    loss = lambda p: (scanned.apply({"params": p}, *rows_of(pixels), method="features") * pull).sum()  # noqa: E731
    ours = P.unstack_layers(tiny.jit(jax.grad(loss))(stacked))
    flat = [
        {path: leaf for path, leaf in P.flatten(tree).items() if not path.endswith("k/bias")}
        for tree in (ours, theirs["vision"])
    ]
    assert flat[0].keys() == flat[1].keys()
    compare.close(*(np.concatenate([np.ravel(leaf) for leaf in one.values()]) for one in flat), "gradients")


def test_a_picture_is_read_as_a_clip_of_one_frame():
    """A tower on sines reads a picture at the first frame's places (`img_pos_embed`), unstretched."""
    np.testing.assert_allclose(video.sines(1, 16, WIDTH, 3), video.sines(3, 16, WIDTH, 3)[:16], atol=1e-7)
    np.testing.assert_allclose(video.sines(4, 16, WIDTH, 3).reshape(4, 16, -1), stretched(4), atol=1e-6)


class VideoChat(Whole):
    def __init__(self):
        super().__init__()
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(**QFORMER))
        self.query_tokens = nn.Parameter(torch.randn(1, QUERIES, 24))
        self.extra_query_tokens = nn.Parameter(torch.zeros(1, EXTRA, 24))
        self.llama_proj = nn.Linear(24, SIZES["hidden_size"])
        self.llama_model = LlamaForCausalLM(LlamaConfig(**SIZES))

    def forward(self, batch, pixels, start=None):
        seen = super().forward(torch.tensor(pixels))
        queries = torch.cat([self.query_tokens, self.extra_query_tokens], 1).expand(len(seen), -1, -1)
        tokens = self.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        tokens = self.llama_proj(tokens).flatten(0, 1)
        x = self.llama_model.get_input_embeddings()(torch.tensor(batch.tokens, dtype=torch.long))
        if start is not None:
            x = torch.where(torch.tensor(batch.tokens == start)[..., None], torch.full_like(x, float(start)), x)
        index = torch.tensor(batch.image_index, dtype=torch.long)
        x = torch.where((index >= 0)[..., None], tokens[index.clamp(min=0)], x)
        mask = torch.tensor((batch.segments > 0).astype(np.int64))
        places = torch.tensor(batch.positions, dtype=torch.long)
        return self.llama_model(inputs_embeds=x, attention_mask=mask, position_ids=places).logits


@pytest.mark.parametrize("start", [None, 7])
def test_the_whole_model(start):
    """Queries of 6 and 6 more make 3 positions of each of a clip's 4 vision rows; two clips, in two rows."""
    torch.manual_seed(0)
    model = compare.perturb(VideoChat())
    reads = qformer.from_hf(model.qformer.config.to_dict(), QUERIES)
    config = LVLMConfig(
        vision=EVA,
        connector=dataclasses.replace(reads, extra=EXTRA),
        llm=llama.from_hf(model.llama_model.config.to_dict()),
        compat_bos_bug=start,
    )
    assert videochat.fits(config)
    assert config.visual_tokens == 3
    rows = [*video.rows(EVA), *minigpt4.projection_rows(), *minigpt4.host_rows(config)]
    rows += qformer.rows(config.connector, "connector/qformer")
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    params = compare.load(rows, compare.tensors(model), shapes)
    batch, pixels = tiny.batch(config, [[3, I, I, I, I, 4], [2, I, I, I, I, 6], [9]], pad="left")
    batch.tokens[:, -8] = 7
    with torch.no_grad():
        expected = model(batch, pixels.reshape(-1, FRAMES, *pixels.shape[1:]), start).numpy()
    run = tiny.jit(lambda p, b: LVLM(config).apply({"params": p}, b, method=tiny.logits))
    shown, batch = batch.segments > 0, jax.tree.map(jnp.asarray, batch)
    compare.close(np.asarray(run(params, batch))[shown], expected[shown], f"VideoChat, start token {start}, logits")
