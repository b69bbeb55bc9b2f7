"""A vision transformer for pictures at their own resolution, several of which share a vision row.

A picture is a segment of a row of patches; two frames of a video are one picture whose patches hold both (a still one
is there twice). Patches come in an order in which neighbours that become one token follow one another, and windows,
where the tower has some (`processing.native`). Nothing depends on a picture's shape but positions and segments: one
compiled program serves all shapes.
Source: Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923), Qwen3-VL (arXiv 2511.21631).
"""

import dataclasses
import functools
import math
import operator
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.nn import grids
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.linear import linear, named
from lvlm_jax.nn.positions import rotary_2d
from lvlm_jax.nn.stack import make_stack, run_stack
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.shapes import Array, DTypeLike, Float, Int
from lvlm_jax.vision.blocks import Block

ROTARY_THETA = 10000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeViTConfig:
    """Sizes of a tower; the defaults are Qwen2-VL's make.

    patch_frames: pictures that a patch reads. merge: side of the square of patches that becomes one token behind the
    tower. `norm` is a key of `nn.norms.NORMS`. window: side of the squares, in patches, within which a block attends,
    save those blocks that `whole` names; None lets all see the whole picture. position_grid: side of a learned table of
    places, resized to each picture's grid; queries and keys are rotated by their place in any case. taps: blocks whose
    output is read beside the last one's. max_patches: patches of a vision row (P), the most that a picture may have.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    activation: str = "quick_gelu"
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    gated: bool = False
    patch_bias: bool = False
    patch_frames: int = 2
    merge: int = 2
    window: int | None = None
    whole: tuple[int, ...] = ()
    position_grid: int | None = None
    taps: tuple[int, ...] = ()
    max_patches: int = 5120
    frames: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(
                f"width={self.width} with heads={self.heads}: heads are rotated by row and by column in pairs, so each "
                "must have a multiple of 4 values"
            )
        if self.max_patches < 1 or self.max_patches % self.merge**2:
            raise ValueError(
                f"max_patches={self.max_patches} does not divide into tokens of merge x merge = {self.merge**2} patches"
            )
        if self.window is not None and (self.window < self.merge or self.window % self.merge):
            raise ValueError(f"window={self.window} patches are no multiple of merge={self.merge}, so tokens are cut")
        if self.whole and self.window is None:
            raise ValueError(f"whole={self.whole} with window=None: every block sees the whole picture; leave it out")
        for name in ("whole", "taps"):
            if wrong := [i for i in getattr(self, name) if not 0 <= i < self.depth]:
                raise ValueError(f"{name} names block {wrong[0]}, but the tower has depth={self.depth}, from 0 on")

    # What a ViT's config tells, the same for every such tower.
    class_token = class_feature = feature_norm = False
    feature_layer = -1
    resize = "linear_corners"

    @property
    def grid(self) -> int:
        """Side of the largest square picture that a vision row holds, in patches."""
        return math.isqrt(self.max_patches)

    @property
    def image_size(self) -> int:
        """The same in pixels."""
        return self.grid * self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a vision row (P)."""
        return self.max_patches

    @property
    def values(self) -> int:
        """Values of a patch (C), in (frame, row, column, channel) order."""
        return 3 * self.patch_frames * self.patch_size**2

    @property
    def features(self) -> int:
        """Features of a vision row that a connector reads."""
        return self.max_patches

    def places(self, path: str) -> int:
        """Positions of a vision row at which the kernel at `path`, below the tower, is multiplied."""
        return self.max_patches

    @property
    def attention_flops(self) -> int:
        """FLOPs of attention's two products over a vision row that one picture fills, forward."""
        whole = self.depth if self.window is None else len(self.whole)
        seen = whole * self.max_patches + (self.depth - whole) * (self.window or 0) ** 2
        return 4 * seen * self.max_patches * self.width

    def build(self, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module."""
        return NativeViT(self, dtype, scan, remat)


class NativeViT(nn.Module):
    """The tower over patches.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lvlm_jax.nn.linear import init
      >>> from lvlm_jax.vision.native import NativeViT, NativeViTConfig
      >>> config = NativeViTConfig(patch_size=2, width=16, depth=2, heads=2, mlp_dim=32, taps=(0,), max_patches=12)
      >>> patches = jnp.zeros((1, 12, 24))  # two pictures of 2 x 2 patches, and room for one more
      >>> positions = jnp.array([[[0, 0], [0, 1], [1, 0], [1, 1]] * 3])
      >>> segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0]])
      >>> tower = NativeViT(config)
      >>> params = init(tower, jax.random.key(0), patches, positions, segments)
      >>> tower.apply({"params": params}, patches, positions, segments, method="features").shape  # last block and tap
      (1, 12, 32)

    Parameters: ``patch_embed``, ``layers``; ``position_embed`` where the config has a table.
    """

    config: NativeViTConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(
        self, patches: Float[Array, "N P C"], positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]
    ) -> tuple[Float[Array, "N P D"], tuple[Float[Array, "N P D"], ...]]:
        """(output of the last block, outputs of the tapped ones).

        Args:
          patches: normalised pixels in (frame, row, column, channel) order, window by window.
          positions: (row, column) of each patch in its picture.
          segments: 0 padding, 1.. the pictures that share the row.
        """
        c = self.config
        x = linear(c.width, ("patch", "embed"), use_bias=c.patch_bias, dtype=self.dtype, name="patch_embed")(patches)
        if c.position_grid is not None:
            draw = named(nn.initializers.normal(0.02), ("positions", "embed"))
            table = self.param("position_embed", draw, (c.position_grid**2, c.width))
            x = x + grids.resized(table, positions, segments, c.position_grid, c.resize).astype(self.dtype)
        turns = rotary_2d(positions.astype(jnp.float32), c.width // c.heads, ROTARY_THETA)
        ranges: tuple[R.Ranges, ...] = (R.packed_full(segments),)
        if c.window is not None:
            windows = positions // c.window
            ranges = (*ranges, R.packed_runs(segments, windows[..., 0], windows[..., 1]))
        block = functools.partial(
            Block,
            heads=c.heads,
            mlp_dim=c.mlp_dim,
            activation=c.activation,
            norm_eps=c.norm_eps,
            gated=c.gated,
            norm=c.norm,
            pairs="half",
            kept=bool(c.taps),
            dtype=self.dtype,
        )
        stack = make_stack(block, c.depth, self.scan, self.remat, name="layers")
        which = [int(c.window is not None and i not in c.whole) for i in range(c.depth)]
        per_layer = jnp.asarray(which, jnp.int32) if self.scan else tuple(which)
        x, kept = run_stack(stack, c.depth, x, per_layer, ranges[0] if c.window is None else ranges, turns)
        return x, tuple(jax.tree.map(operator.itemgetter(i), kept) if self.scan else kept[i] for i in c.taps)

    def features(
        self, patches: Float[Array, "N P C"], positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]
    ) -> Float[Array, "N P F"]:
        """What a connector reads: the last block's output and behind it, along the last axis, the tapped ones'."""
        x, taps = self(patches, positions, segments)
        return jnp.concatenate([x, *taps], axis=-1)


def check_pictures(config: object, spec: ImageSpec) -> None:
    """Raises ValueError where pictures are not prepared as the tower reads them: neighbours, frames or windows differ.

    Args:
      config: of any tower; only `NativeViTConfig` says anything of it.
    """
    native = spec.native
    if isinstance(config, NativeViTConfig) != (native is not None):
        raise ValueError(
            f"a tower of {type(config).__name__} with pictures prepared by fit={spec.fit!r}: pictures keep their own "
            "resolution (fit='native') for a NativeViTConfig, and for it alone"
        )
    named = (("merge", "merge"), ("patch_frames", "frames"), ("window", "window"))
    for ours, theirs in named if native is not None else ():
        if getattr(config, ours) != getattr(native, theirs):
            raise ValueError(
                f"vision.{ours}={getattr(config, ours)}, but pictures are prepared with image.native.{theirs}="
                f"{getattr(native, theirs)}: patches would not stand where the tower takes them to; make them equal"
            )
