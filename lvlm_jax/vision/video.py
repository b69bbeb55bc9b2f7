"""Towers that read clips: a number of frames at a time, joined over time.

VideoChat's is EVA's giant, frame by frame. Beside its last blocks runs a query that reads all tokens of the clip: the
global multi-head relation aggregator of UniFormerV2 (arXiv 2211.09552, section 3.3), of which VideoChat (arXiv
2305.06355) leaves the local ones out. VideoChat2's (UMT, arXiv 2303.16058) is a plain transformer over the patches of
all frames together, with the sines of their places. Frames come as vision rows that follow one another.
Source: OpenGVLab/Ask-Anything, video_chat/models/eva_vit.py and video_chat2/models/blip2/vit.py.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.keymap import SAME, TRANSPOSE, Change, Row, dense, joined, layer_norm, patches
from lvlm_jax.mesh import constrain
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.attention import Attention
from lvlm_jax.nn.linear import named
from lvlm_jax.nn.mlp import Mlp
from lvlm_jax.nn.norms import LayerNorm
from lvlm_jax.nn.stack import STREAM, Layers, Opened, make_stack, run_stack
from lvlm_jax.shapes import Array, DTypeLike, Float, Int
from lvlm_jax.vision import blip2_vit
from lvlm_jax.vision.vit import ViTConfig, trunk_of

GLOBAL_EPS = 1e-5
"""Of the norms around the global query."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig(ViTConfig):
    """A tower that reads `frames` vision rows as one clip, and gives the features of the clip.

    global_blocks: a query reads the tokens of all frames behind each of the last so many blocks, and stands behind
    them. joint: instead, the patches of all frames are one row, placed by sines in time and space, which a tower
    trained on `trained_frames` frames stretches over others. final_eps: epsilon of the last norm.
    """

    frames: int = 8
    global_blocks: int = 0
    joint: bool = False
    trained_frames: int = 4
    final_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("frames", "trained_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a clip has at least one frame")
        if not 0 <= self.global_blocks <= self.depth:
            raise ValueError(
                f"global_blocks={self.global_blocks}: at most one behind each of depth={self.depth} blocks"
            )
        if self.joint and (self.class_token or self.global_blocks):
            raise ValueError(
                f"joint=True reads patches alone, here class_token={self.class_token} and global_blocks="
                f"{self.global_blocks}; set class_token=False and global_blocks=0"
            )
        if not self.joint and (not self.class_feature or self.feature_layer != -1):
            raise ValueError(
                f"a clip's frames are read whole, here class_feature={self.class_feature} and feature_layer="
                f"{self.feature_layer}; set class_feature=True and feature_layer=-1"
            )

    def is_basic_but(self, *names: str) -> bool:
        """Never: what reads clips is no ViT of pictures."""
        return False

    @property
    def features(self) -> int:
        """Features of a clip: each frame's, then the global query."""
        return self.frames * (self.patches + self.class_token) + (self.global_blocks > 0)

    def places(self, path: str) -> int:
        """Positions of a vision row at which the kernel at `path` is multiplied; a query's own count once a frame."""
        alone = path.startswith("globals/") and not any(f"/{name}/" in path for name in ("k", "v", "neighbours"))
        return 1 if alone else self.patches

    @property
    def attention_flops(self) -> int:
        """FLOPs of attention's two products over a vision row, forward."""
        if self.joint:
            return 4 * self.depth * self.patches**2 * self.frames * self.width
        return super().attention_flops + 4 * self.global_blocks * self.patches * self.width

    def build(self, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module."""
        return VideoTower(self, dtype, scan, remat)


class GlobalBlock(nn.Module):
    """A clip's query reads the tokens of its frames, to whose patches their neighbours in time and space are added."""

    grid: int
    heads: int
    mlp_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, query: Float[Array, "M 1 D"], _: Any, tokens: Float[Array, "M L S D"]
    ) -> tuple[Float[Array, "M 1 D"], None]:
        clips, frames, _, width = tokens.shape
        norm = functools.partial(LayerNorm, GLOBAL_EPS, self.dtype)
        tokens = norm(name="norm_tokens")(tokens)
        near = Neighbours(self.dtype, name="neighbours")
        place = (clips, frames, self.grid, self.grid, width)
        moved = tokens[:, :, 1:] + near(tokens[:, :, 1:].reshape(place)).reshape(clips, frames, -1, width)
        tokens = jnp.concatenate([tokens[:, :, :1], moved], axis=2).reshape(clips, -1, width)
        attention = functools.partial(Attention, qkv_bias=True, out_bias=True, out_std=0.0, dtype=self.dtype)
        attention = attention(self.heads, self.heads, width // self.heads, name="attn")
        everything = R.full(clips, 1, tokens.shape[1])
        query = query + attention(norm(name="norm1")(query), everything, context=tokens)[0]
        mlp = Mlp(self.mlp_dim, "gelu", out_std=0.0, dtype=self.dtype, name="mlp")
        return query + mlp(norm(name="norm2")(query)), None


class Neighbours(nn.Module):
    """A convolution over three frames, rows and columns, each value by itself; beyond the clip there are zeros."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "M L Y X D"]) -> Float[Array, "M L Y X D"]:
        width = x.shape[-1]
        draw = named(nn.initializers.variance_scaling(1.0, "fan_in", "normal"), (None,) * 4 + ("embed",))
        kernel = self.param("kernel", draw, (3, 3, 3, 1, width))
        bias = self.param("bias", named(nn.initializers.zeros, ("embed",)), (width,))
        out = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(1, 1, 1),
            padding="SAME",
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            feature_group_count=width,
        )
        return out + bias.astype(self.dtype)


class GlobalBlocks(nn.Module):
    """The query of a clip and its blocks, beside the last of a trunk's.

    Parameters: ``token``, ``layers``.
    """

    config: ClipConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """The query and the blocks."""
        c = self.config
        self.token = self.param("token", named(nn.initializers.zeros, (None, "embed")), (1, c.width))
        self.block = functools.partial(GlobalBlock, grid=c.grid, heads=c.heads, mlp_dim=c.mlp_dim, dtype=self.dtype)
        self.layers = make_stack(self.block, c.global_blocks, self.scan, self.remat)

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "M 1 D"]:
        """All blocks on the same tokens: to make the parameters."""
        return run_stack(self.layers, self.config.global_blocks, self._query(x), None, self._clips(x))[0]

    def beside(
        self, stack: nn.Module, block: functools.partial, x: Float[Array, "N S D"], shared: tuple
    ) -> tuple[Float[Array, "N S D"], Float[Array, "M 1 D"]]:
        """Runs a trunk's stack of `block` with these beside its last -> (its output, the query).

        shared: what each of the stack's layers gets.
        """
        c, query = self.config, self._query(x)
        first = c.depth - c.global_blocks
        if isinstance(stack, Layers):
            held = [query]

            def before(layer: int, x: Array) -> Array:
                if layer > first:
                    number = layer - 1 - first
                    held[0] = self.layers(held[0], None, range(number, number + 1), self._clips(x))[0]
                return x

            x, _ = run_stack(stack, c.depth, x, None, *shared, before=before)
            return x, held[0]
        trunk = Opened(block, stack.variables["params"], None, shared, self.remat)
        mine = Opened(self.block, self.layers.variables["params"], None, (), self.remat)

        def both(state: tuple, row: tuple) -> tuple[tuple, None]:
            x, _ = trunk.layer(state[0], (row[0], None))
            return (x, mine._replace(shared=(self._clips(x),)).layer(state[1], (row[1], None))[0]), None

        cut = lambda part: jax.tree.map(lambda leaf: leaf[part], trunk.params)  # noqa: E731
        alone = lambda x, row: (trunk.layer(x, (row, None))[0], None)  # noqa: E731
        x, _ = jax.lax.scan(alone, constrain(x, STREAM), cut(slice(first)))
        (x, query), _ = jax.lax.scan(both, (x, query), (cut(slice(first, None)), mine.params))
        return x, query

    def _query(self, x: Float[Array, "N S D"]) -> Float[Array, "M 1 D"]:
        return jnp.broadcast_to(self.token.astype(self.dtype), (len(x) // self.config.frames, 1, x.shape[-1]))

    def _clips(self, x: Float[Array, "N S D"]) -> Float[Array, "M L S D"]:
        return x.reshape(-1, self.config.frames, *x.shape[1:])


class VideoTower(nn.Module):
    """A trunk that reads clips.

    Parameters: ``trunk``, ``post_norm``; ``globals`` where the config has global blocks.
    """

    config: ClipConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """The trunk, the global blocks, the last norm."""
        c = self.config
        self.trunk = trunk_of(c, self.dtype, self.scan, self.remat)
        self.post_norm = LayerNorm(c.final_eps, self.dtype)
        if c.global_blocks:
            self.globals = GlobalBlocks(c, self.dtype, self.scan, self.remat)

    def features(
        self, patches: Float[Array, "N P C"], positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]
    ) -> Float[Array, "M Q D"]:
        """What a vision-language model reads of each clip of `frames` vision rows that follow one another.

        Raises:
          ValueError: vision rows that are no whole clips.
        """
        c, rows = self.config, len(patches)
        if rows % c.frames:
            raise ValueError(
                f"{rows} vision rows are no whole clips of frames={c.frames}: give each group of a batch a multiple of "
                "them (data.pictures over data.groups)"
            )
        x = self._joint(patches, positions, segments) if c.joint else self._apart(patches, positions, segments)
        normed = self.post_norm(x) if c.feature_norm or self.is_initializing() else x
        return normed if c.feature_norm else x

    def __call__(
        self, patches: Float[Array, "N P C"], positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]
    ) -> Float[Array, "M Q D"]:
        """The same as `features`."""
        return self.features(patches, positions, segments)

    def _apart(self, patches: Array, positions: Array, segments: Array) -> Array:
        c, held = self.config, []
        through = None

        def beside(stack: nn.Module, block: functools.partial, x: Array, shared: tuple) -> Array:
            x, query = self.globals.beside(stack, block, x, shared)
            held.append(query)
            return x

        if c.global_blocks and not self.is_initializing():
            through = beside
        x = self.trunk(patches, positions, segments, through=through)
        if c.global_blocks and self.is_initializing():
            held.append(self.globals(x))
        return jnp.concatenate([x.reshape(-1, c.frames * x.shape[1], x.shape[2]), *held], axis=1)

    def _joint(self, patches: Array, positions: Array, segments: Array) -> Array:
        c = self.config
        patches, positions, segments = (
            x.reshape(-1, c.frames * x.shape[1], *x.shape[2:]) for x in (patches, positions, segments)
        )
        places = jnp.asarray(sines(c.frames, c.patches, c.width, c.trained_frames))
        return self.trunk(patches, positions, segments, take=c.depth + 1 + c.feature_layer, places=places)


def sines(frames: int, per: int, width: int, trained: int) -> Float[np.ndarray, "P D"]:
    """Sines and cosines of the places of `frames` x `per` patches, counted through `trained` frames.

    Where frames are others than those, the table is stretched over time, linearly between the centres of frames; one
    frame alone is read as a picture, at the first frame's places.
    """
    counted = 1 if frames == 1 else trained
    wave = 10000.0 ** (2 * (np.arange(width) // 2) / width)
    angle = np.arange(counted * per)[:, None] / wave
    table = np.where(np.arange(width) % 2, np.cos(angle), np.sin(angle)).reshape(counted, per, width)
    at = np.clip((np.arange(frames) + 0.5) * counted / frames - 0.5, 0, counted - 1)
    low = np.floor(at).astype(int)
    share = (at - low)[:, None, None]
    mixed = (1 - share) * table[low] + share * table[np.minimum(low + 1, counted - 1)]
    return mixed.reshape(frames * per, width).astype(np.float32)


_EVA = dataclasses.asdict(blip2_vit.PRESETS["blip2_vit_g14_224"])

PRESETS: dict[str, ClipConfig] = {
    # video_chat/configs/config_7b.json
    "videochat_eva_g14_224": ClipConfig(**_EVA, frames=8, global_blocks=8),
    # video_chat2/configs/config.json: 24 blocks, of which the last is not read (return_index -2)
    "videochat2_umt_l16_224": ClipConfig(
        image_size=224,
        patch_size=16,
        width=1024,
        depth=23,
        heads=16,
        mlp_dim=4096,
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
        frames=16,
        final_eps=1e-12,
    ),
}
"""Towers of VideoChat and VideoChat2, each from the config of the authors named beside it."""

# ---------------------------------------------------------------------------------------------------------------------
# Keys


def _frame_patches(size: int) -> Change:
    """`keymap.patches`, of a convolution over one frame at a time."""
    plain = patches(size)
    return Change(lambda x: plain.load(x.reshape(*x.shape[:2], size, size)), lambda x: plain.save(x)[:, :, None])


_CONV = Change(lambda x: x.transpose(2, 3, 4, 1, 0), lambda x: x.transpose(4, 3, 0, 1, 2))
"""A convolution over time and space: torch keeps [out, in, time, height, width], we keep in and out last."""


def rows(
    config: ClipConfig, ours: str = "vision", theirs: str = "visual_encoder.", norm: str = "ln_vision"
) -> list[Row]:
    """The key table under the authors' names, which are EVA's own.

    Args:
      ours: path of the tower's parameters.
      theirs, norm: prefix of its keys, and of its last norm's.
    """
    kernel = f"{ours}/trunk/patch_embed/kernel"
    place = f"{theirs}patch_embed.proj.weight"
    out = [
        row
        for row in blip2_vit.authors_rows(config, ours, theirs, norm)
        if row.leaves[0] != kernel and (config.class_token or not row.theirs.endswith(("cls_token", "pos_embed")))
    ]
    return [*out, Row(kernel, place, _frame_patches(config.patch_size)), *_global_rows(config, ours, theirs)]


def _global_rows(config: ClipConfig, ours: str, theirs: str) -> list[Row]:
    if not config.global_blocks:
        return []
    token = Change(lambda x: x.reshape(1, -1), lambda x: x[None])
    out = [Row(f"{ours}/globals/token", f"{theirs}gmhra_cls_token", token)]
    for i in range(config.global_blocks):
        a, b = f"{ours}/globals/layers/{i}", f"{theirs}gmhra.{i}"
        heads = [f"{a}/attn/{x}" for x in "qkv"]
        out += [
            Row(f"{a}/neighbours/kernel", f"{b}.dpe.weight", _CONV),
            Row(f"{a}/neighbours/bias", f"{b}.dpe.bias"),
            Row(tuple(f"{x}/kernel" for x in heads), f"{b}.attn.in_proj_weight", joined(3, TRANSPOSE)),
            Row(tuple(f"{x}/bias" for x in heads), f"{b}.attn.in_proj_bias", joined(3, SAME)),
            *dense(f"{a}/attn/o", f"{b}.attn.out_proj", bias=True),
            *dense(f"{a}/mlp/up", f"{b}.mlp.c_fc", bias=True),
            *dense(f"{a}/mlp/down", f"{b}.mlp.c_proj", bias=True),
        ]
        for name, number in (("norm1", 1), ("norm2", 2), ("norm_tokens", 3)):
            out += layer_norm(f"{a}/{name}", f"{b}.ln_{number}")
    return out


__all__ = ["PRESETS", "ClipConfig", "GlobalBlock", "VideoTower", "rows", "sines"]
