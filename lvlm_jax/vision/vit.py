"""The pre-norm vision transformer trunk, fed with patches.

One trunk serves CLIP (class token, norm before block 1, quick-GELU) and SigLIP (neither; tanh-GELU): they differ in
field values only. Source: ViT (arXiv 2010.11929).
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.attention import Attention
from lvlm_jax.nn.linear import linear, named
from lvlm_jax.nn.mlp import Mlp
from lvlm_jax.nn.norms import LayerNorm
from lvlm_jax.nn.positions import resize_positions
from lvlm_jax.nn.stack import make_stack, run_stack
from lvlm_jax.shapes import Array, DTypeLike, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a vision tower.

    `feature_layer` and `class_feature` say what a vision-language model reads: the output of that layer, counted as the
    public configs do (-1 the last block, -2 the one before, before any final norm), and whether the class token stays.
    `feature_norm` puts the final norm behind the last block, as a tower without pooling ends (PaliGemma).
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    feature_layer: int = -2
    class_feature: bool = False
    feature_norm: bool = False
    pool: Literal["class", "map", "none"] = "class"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}")
        if not 0 < self.patch_size <= self.image_size:
            raise ValueError(f"patch_size={self.patch_size} does not fit image_size={self.image_size}")
        if not -1 - self.depth <= self.feature_layer <= -1:
            raise ValueError(
                f"feature_layer={self.feature_layer}: -1 is the last of depth={self.depth} layers, {-1 - self.depth} "
                "the embeddings before the first"
            )
        if self.feature_norm and self.feature_layer != -1:
            raise ValueError(
                f"feature_norm=True reads the end of the tower, feature_layer=-1, not {self.feature_layer}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a picture (P)."""
        return self.grid**2

    @property
    def values(self) -> int:
        """Values of a patch (C)."""
        return 3 * self.patch_size**2

    @property
    def features(self) -> int:
        """Visual tokens that a vision-language model reads from one picture."""
        return self.patches + (self.class_token and self.class_feature)


class Block(nn.Module):
    """Pre-norm encoder block."""

    heads: int
    mlp_dim: int
    activation: str
    norm_eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], _: Any, ranges: R.Ranges) -> tuple[Float[Array, "B T D"], None]:
        norm = functools.partial(LayerNorm, self.norm_eps, self.dtype)
        attention = functools.partial(Attention, qkv_bias=True, out_bias=True, dtype=self.dtype, name="attn")
        attention = attention(self.heads, self.heads, x.shape[-1] // self.heads)
        x = x + attention(norm(name="norm1")(x), ranges)[0]
        return x + Mlp(self.mlp_dim, self.activation, dtype=self.dtype, name="mlp")(norm(name="norm2")(x)), None


class ViT(nn.Module):
    """Vision transformer over patches.

    Example:
      >>> import jax
      >>> from lvlm_jax.nn.linear import init
      >>> from lvlm_jax.vision import ViT, patchify
      >>> images = jax.random.normal(jax.random.key(0), (3, 32, 32, 3))
      >>> patches, positions, segments = patchify(images, patch=8)
      >>> vit = ViT(grid=4, width=32, depth=2, heads=4, mlp_dim=64)
      >>> params = init(vit, jax.random.key(1), patches, positions, segments)
      >>> vit.apply({"params": params}, patches, positions, segments).shape  # [N, 1+P, D]
      (3, 17, 32)

    Attributes:
      grid: side of the learned position table; pictures whose grid is `run_grid` read it resized.
      final_norm: whether a "post_norm" exists (it normalises what the pooled output reads).
    """

    grid: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    activation: str = "gelu"
    norm_eps: float = 1e-6
    class_token: bool = True
    pre_norm: bool = False
    patch_bias: bool = True
    run_grid: int | None = None
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "N P C"],
        positions: Int[Array, "N P 2"],
        segments: Int[Array, "N P"],
        take: int | None = None,
    ) -> Float[Array, "N Q D"]:
        """Raw output of the first `take` blocks (default all), the class token first where there is one.

        Args:
          patches: normalised pixels in (row, column, channel) order.
          positions: (row, column) of each patch.
          segments: 0 padding, 1.. the pictures that share the row.
        """
        init = nn.initializers.normal(0.02)
        x = linear(self.width, ("patch", "embed"), use_bias=self.patch_bias, dtype=self.dtype, name="patch_embed")(
            patches
        )
        table = self.param(
            "position_embed", named(init, ("positions", "embed")), (self.grid**2 + self.class_token, self.width)
        )
        grid = self.run_grid or self.grid
        places = resize_positions(table[int(self.class_token) :], grid, self.grid)
        x = x + places[positions[..., 0] * grid + positions[..., 1]].astype(self.dtype)
        if self.class_token:
            token = self.param("class_embed", named(init, ("embed",)), (self.width,)) + table[0]
            token = jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
            segments = jnp.concatenate([segments[:, :1], segments], axis=1)
        if self.pre_norm:
            x = LayerNorm(self.norm_eps, self.dtype, name="pre_norm")(x)
        block = functools.partial(
            Block,
            heads=self.heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
        )
        stack = make_stack(block, self.depth, self.scan, self.remat, name="layers")
        return run_stack(stack, self.depth, x, None, R.packed_full(segments), take=take)[0]


class MapHead(nn.Module):
    """Attention pooling with one learned probe, as SigLIP pools (arXiv 2303.15343)."""

    heads: int
    mlp_dim: int
    activation: str
    norm_eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N D"]:
        width = x.shape[-1]
        probe = self.param("probe", named(nn.initializers.xavier_uniform(), (None, "embed")), (1, width))
        q = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, width))
        attention = Attention(
            self.heads, self.heads, width // self.heads, qkv_bias=True, out_bias=True, dtype=self.dtype, name="attn"
        )
        pooled = attention(q, R.full(x.shape[0], 1, x.shape[1]), context=x)[0]
        normed = LayerNorm(self.norm_eps, self.dtype, name="norm")(pooled)
        return (pooled + Mlp(self.mlp_dim, self.activation, dtype=self.dtype, name="mlp")(normed))[:, 0]


class VisionTower(nn.Module):
    """A ViT with what pools it: features for a language model, or one vector a picture.

    Parameters beyond the trunk's: ``post_norm`` and, for SigLIP, ``head``.
    """

    config: ViTConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """The trunk, its final norm and its pooling head."""
        c = self.config
        self.trunk = ViT(
            grid=c.grid,
            width=c.width,
            depth=c.depth,
            heads=c.heads,
            mlp_dim=c.mlp_dim,
            activation=c.activation,
            norm_eps=c.norm_eps,
            class_token=c.class_token,
            pre_norm=c.pre_norm,
            patch_bias=c.patch_bias,
            dtype=self.dtype,
            scan=self.scan,
            remat=self.remat,
        )
        self.post_norm = LayerNorm(c.norm_eps, self.dtype)
        if c.pool == "map":
            self.head = MapHead(c.heads, c.mlp_dim, c.activation, c.norm_eps, self.dtype)

    def __call__(
        self, patches: Float[Array, "N P C"], positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]
    ) -> tuple[Float[Array, "N T D"], Float[Array, "N D"]]:
        """(last hidden state, pooled vector), with the final norm where the public model has it."""
        c = self.config
        x = self.trunk(patches, positions, segments)
        if c.pool == "class":
            return x, self.post_norm(x[:, 0])
        x = self.post_norm(x)
        return x, (self.head(x) if c.pool == "map" else x.mean(1))

    def features(
        self, patches: Float[Array, "N P C"], positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]
    ) -> Float[Array, "N Q D"]:
        """What a vision-language model reads: the output of `feature_layer`, class token dropped unless kept."""
        c = self.config
        if self.is_initializing():
            self(patches, positions, segments)
        x = self.trunk(patches, positions, segments, take=c.depth + 1 + c.feature_layer)
        x = self.post_norm(x) if c.feature_norm else x
        return x[:, 1:] if c.class_token and not c.class_feature else x


def patchify(
    images: Float[Array, "N Y X 3"], patch: int
) -> tuple[Float[Array, "N P C"], Int[Array, "N P 2"], Int[Array, "N P"]]:
    """Normalised pictures of one size -> (patches, positions, segments), the simple case of a batch's vision fields."""
    n, height, width, _ = images.shape
    if height % patch or width % patch:
        raise ValueError(f"a picture of {height}x{width} does not divide into patches of {patch}")
    rows, cols = height // patch, width // patch
    x = images.reshape(n, rows, patch, cols, patch, 3).swapaxes(2, 3).reshape(n, rows * cols, patch * patch * 3)
    where = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(cols), indexing="ij"), -1).reshape(-1, 2)
    return x, jnp.broadcast_to(where, (n, *where.shape)), jnp.ones((n, rows * cols), jnp.int32)
