"""The vision transformer trunk, fed with patches.

One trunk serves them all: CLIP (class token, norm before block 1, quick-GELU), SigLIP (neither; tanh-GELU), SigLIP 2
(pictures of any shape), plain ViT, DINOv2 (layer scale, registers) and EVA (no key bias; rotary positions and inner
norms, or norms behind the branches). They differ in field values only. Source: ViT (arXiv 2010.11929).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn import grids
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.linear import linear, named
from lvlm_jax.nn.norms import LayerNorm
from lvlm_jax.nn.positions import Turned, rotary_2d
from lvlm_jax.nn.stack import make_stack, run_stack
from lvlm_jax.shapes import Array, Bool, DTypeLike, Float, Int
from lvlm_jax.vision.blocks import Block, MapHead

Pool = Literal["class", "token", "token_twice", "tanh", "map", "mean", "none", "raw"]
Resize = Literal["none", "linear_antialias", "cubic", "cubic_antialias"]
ROTARY_THETA = 10000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a vision tower.

    `feature_layer` and `class_feature` say what a vision-language model reads: the output of that layer, counted as the
    public configs do (-1 the last block, -2 the one before, before any final norm), and whether the class token stays.
    `feature_norm` puts the final norm behind the last block, as a tower without pooling ends (PaliGemma).

    `pool` is how a picture becomes one vector: "class" the class token, which alone meets the final norm (CLIP);
    "token" the class token of the normed whole (ViT, DINOv2), "tanh" through a dense layer and tanh besides,
    "token_twice" through the final norm once more (BLIP-2); "map" a learned probe (SigLIP); "mean" and "none" the mean
    of the patches, meant as such or for want of a head; "raw" that of a tower without a final norm (CogVLM).

    `rotary_grid` turns queries and keys of patches by their place as well, scaled to a grid of so many rows and columns
    (that of pre-training); class token and registers stay. `key_bias`, `inner_norm` and `norm_after` as `Block`'s.

    `resize` is how the position table comes to pictures of other grids than its own, each picture of a row to its own
    (a key of `grids.RESIZES`, with `resize_offset`); "none" reads the table as it is. `max_patches` are the patches of
    a vision row where that is not the table's grid. `classes` is the width of a classifier behind the pooled vector.
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
    pool: Pool = "class"
    layer_scale: bool = False
    gated: bool = False
    registers: int = 0
    mask_token: bool = False
    key_bias: bool = True
    inner_norm: bool = False
    norm_after: bool = False
    rotary_grid: int | None = None
    resize: Resize = "none"
    resize_offset: float = 0.0
    max_patches: int | None = None
    classes: int = 0
    frames: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.class_token and self.pool in ("class", "token", "token_twice", "tanh"):
            raise ValueError(f"pool={self.pool!r} reads the class token, but class_token is False")
        if self.max_patches is not None and self.resize == "none":
            raise ValueError(
                f"max_patches={self.max_patches} is for pictures of other grids than the table's, but resize='none' "
                f"reads the table of {self.grid} x {self.grid} as it is; leave it out, or choose a resize"
            )
        if self.resize_offset and self.resize != "cubic":
            raise ValueError(
                f"resize_offset={self.resize_offset} is read by resize='cubic' alone, here it is {self.resize!r}; "
                "leave it out"
            )
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}")
        if self.rotary_grid is not None and self.width // self.heads % 4:
            raise ValueError(
                f"rotary_grid={self.rotary_grid} turns pairs of values by row and by column, but a head has "
                f"{self.width // self.heads} values (width={self.width}, heads={self.heads}), no multiple of 4"
            )
        if self.inner_norm and not self.gated:
            raise ValueError("inner_norm=True stands inside a gated feed-forward, but gated is False")
        if not 0 < self.patch_size <= self.image_size:
            raise ValueError(f"patch_size={self.patch_size} does not fit image_size={self.image_size}")
        if not -1 - self.depth <= self.feature_layer <= -1:
            raise ValueError(
                f"feature_layer={self.feature_layer}: -1 is the last of depth={self.depth} layers, {-1 - self.depth} "
                "the embeddings before the first"
            )
        if self.feature_norm and (self.feature_layer != -1 or self.pool == "raw"):
            raise ValueError(
                f"feature_norm=True reads the end of the tower, feature_layer=-1, not {self.feature_layer}, behind its "
                f"final norm, which pool={self.pool!r} has only where it is not 'raw'"
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a vision row (P): a picture of the table's grid, or as many as any may have."""
        return self.grid**2 if self.max_patches is None else self.max_patches

    @property
    def is_basic(self) -> bool:
        """Whether the trunk is that of ViT, CLIP and SigLIP."""
        return self.is_basic_but()

    def is_basic_but(self, *names: str) -> bool:
        """Whether every field that ViT, CLIP and SigLIP do not have is at its default, save the named ones."""
        return all(getattr(self, name) == default for name, default in _BEYOND_BASIC.items() if name not in names)

    @property
    def values(self) -> int:
        """Values of a patch (C)."""
        return 3 * self.patch_size**2

    @property
    def features(self) -> int:
        """Visual tokens that a vision-language model reads from one picture."""
        return self.patches + (self.class_token and self.class_feature)

    def places(self, path: str) -> int:
        """Positions of a vision row at which the kernel at `path`, below the tower, is multiplied."""
        return self.patches

    @property
    def attention_flops(self) -> int:
        """FLOPs of attention's two products over a vision row, forward."""
        return 4 * self.depth * self.patches**2 * self.width

    def build(self, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module."""
        return VisionTower(self, dtype, scan, remat)


_RARE = (
    *("layer_scale", "gated", "registers", "mask_token", "resize"),
    *("key_bias", "inner_norm", "norm_after", "rotary_grid"),
)
_BEYOND_BASIC = {field.name: field.default for field in dataclasses.fields(ViTConfig) if field.name in _RARE}
"""What only some of the towers have -> its value in the others."""


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
      grid: side of the learned position table.
      registers: how many learned tokens stand between the class token and the patches, without a position.
      resize: how each picture reads the table at its own grid, see `ViTConfig`, as for the fields above it.
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
    layer_scale: bool = False
    gated: bool = False
    registers: int = 0
    mask_token: bool = False
    key_bias: bool = True
    inner_norm: bool = False
    norm_after: bool = False
    rotary_grid: int | None = None
    resize: Resize = "none"
    resize_offset: float = 0.0
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
        masked: Bool[Array, "N P"] | None = None,
        places: Float[Array, "P D"] | None = None,
        through: Callable | None = None,
    ) -> Float[Array, "N Q D"]:
        """Raw output of the first `take` blocks (default all): class token, registers, patches.

        Args:
          patches: normalised pixels in (row, column, channel) order.
          positions: (row, column) of each patch.
          segments: 0 padding, 1.. the pictures that share the row.
          masked: patches to hide behind the mask token, for training by what is hidden.
          places: added to the patches instead of a learned table's, where there is no class token.
          through: how the stack is run, (stack, block, x, what its layers share) -> x, instead of `run_stack`.
        """
        x = linear(self.width, ("patch", "embed"), use_bias=self.patch_bias, dtype=self.dtype, name="patch_embed")(
            patches
        )
        if self.mask_token:
            token = self.param("mask_embed", named(nn.initializers.zeros, ("embed",)), (self.width,))
            x = x if masked is None else jnp.where(masked[..., None], token.astype(self.dtype), x)
        turns = self._turns(positions, segments)
        if places is None:
            x, segments = self._placed(x, positions, segments)
        else:
            x += places.astype(self.dtype)
        if self.pre_norm:
            x = LayerNorm(self.norm_eps, self.dtype, name="pre_norm")(x)
        block = functools.partial(
            Block,
            heads=self.heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            layer_scale=self.layer_scale,
            gated=self.gated,
            key_bias=self.key_bias,
            inner_norm=self.inner_norm,
            norm_after=self.norm_after,
            dtype=self.dtype,
        )
        stack = make_stack(block, self.depth, self.scan, self.remat, name="layers")
        shared = R.packed_full(segments), turns
        if through is not None:
            return through(stack, block, x, shared)
        return run_stack(stack, self.depth, x, None, *shared, take=take)[0]

    def _turns(self, positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]) -> tuple[Turned, Turned] | None:
        """How patches are rotated, behind a class token and registers that are not: those stand at an angle of zero."""
        if self.rotary_grid is None:
            return None
        sides = self.grid if self.resize == "none" else grids.picture_grids(positions, segments)
        places = positions / sides * self.rotary_grid
        places = jnp.pad(places, ((0, 0), (self.class_token + self.registers, 0), (0, 0)))
        return rotary_2d(places, self.width // self.heads, ROTARY_THETA)

    def _placed(
        self, x: Float[Array, "N P D"], positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]
    ) -> tuple[Float[Array, "N Q D"], Int[Array, "N Q"]]:
        """Patches with their positions behind class token and registers, and the segments of all."""
        init = nn.initializers.normal(0.02)
        table = self.param(
            "position_embed", named(init, ("positions", "embed")), (self.grid**2 + self.class_token, self.width)
        )
        own = table[int(self.class_token) :]
        if self.resize == "none":
            places = own[positions[..., 0] * self.grid + positions[..., 1]]
        else:
            places = grids.resized(own, positions, segments, self.grid, self.resize, self.resize_offset)
        parts = [x + places.astype(self.dtype)]
        if self.registers:
            parts.insert(0, self.param("register_embed", named(init, (None, "embed")), (self.registers, self.width)))
        if self.class_token:
            token = self.param("class_embed", named(init, ("embed",)), (self.width,)) + table[0]
            parts.insert(0, token[None])
        spread = [jnp.broadcast_to(part.astype(self.dtype), (len(x), *part.shape[-2:])) for part in parts]
        ids = [jnp.broadcast_to(segments[:, :1], (len(x), part.shape[-2])) for part in parts[:-1]]
        return jnp.concatenate(spread, axis=1), jnp.concatenate([*ids, segments], axis=1)


def trunk_of(config: ViTConfig, dtype: DTypeLike, scan: bool, remat: str) -> ViT:
    """The trunk of a tower."""
    same = (
        *("grid", "width", "depth", "heads", "mlp_dim", "activation", "norm_eps", "class_token", "pre_norm"),
        *("patch_bias", "layer_scale", "gated", "registers", "mask_token", "key_bias", "inner_norm", "norm_after"),
        *("rotary_grid", "resize", "resize_offset"),
    )
    return ViT(**{name: getattr(config, name) for name in same}, dtype=dtype, scan=scan, remat=remat)


class VisionTower(nn.Module):
    """A ViT with what pools it: features for a language model, or one vector a picture.

    Parameters beyond the trunk's: ``post_norm``, and where the config asks for them ``head`` (SigLIP), ``pooler`` and
    ``classifier`` (ViT).
    """

    config: ViTConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """The trunk, its final norm and its pooling head."""
        c = self.config
        self.trunk = trunk_of(c, self.dtype, self.scan, self.remat)
        self.post_norm = LayerNorm(c.norm_eps, self.dtype)
        if c.pool == "map":
            self.head = MapHead(c.heads, c.mlp_dim, c.activation, c.norm_eps, self.dtype)
        if c.pool == "tanh":
            self.pooler = linear(c.width, ("embed", None), use_bias=True, dtype=self.dtype)
        if c.classes:
            self.classifier = linear(c.classes, ("embed", None), use_bias=True, dtype=self.dtype)

    def __call__(
        self,
        patches: Float[Array, "N P C"],
        positions: Int[Array, "N P 2"],
        segments: Int[Array, "N P"],
        masked: Bool[Array, "N P"] | None = None,
    ) -> tuple[Float[Array, "N T D"], Float[Array, "N D"]]:
        """(last hidden state, pooled vector), with the final norm where the public model has it.

        The vector is that of a row's one picture; `masked` as `ViT` takes it.
        """
        x, pooled = self._pooled(self.trunk(patches, positions, segments, masked=masked), segments)
        if self.config.classes and self.is_initializing():
            self.classifier(pooled)
        return x, pooled

    def _pooled(self, x: Float[Array, "N T D"], segments: Int[Array, "N P"]) -> tuple[Array, Array]:
        pool = self.config.pool
        if pool == "class":
            return x, self.post_norm(x[:, 0])
        x = x if pool == "raw" else self.post_norm(x)
        if pool == "token":
            return x, x[:, 0]
        if pool == "token_twice":
            return x, self.post_norm(x[:, 0])
        if pool == "tanh":
            return x, jnp.tanh(self.pooler(x[:, 0]))
        patches = x[:, x.shape[1] - segments.shape[1] :]
        if pool == "map":
            return x, self.head(patches, segments)
        shown = (segments > 0)[..., None]
        return x, jnp.where(shown, patches, 0).sum(1) / jnp.maximum(shown.sum(1), 1)

    def logits(self, pooled: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """Pooled vectors -> scores of the classes, for a tower that has some."""
        return self.classifier(pooled)

    def features(
        self, patches: Float[Array, "N P C"], positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]
    ) -> Float[Array, "N Q D"]:
        """What a vision-language model reads: the output of `feature_layer`.

        Registers are dropped, the class token too unless it is kept.
        """
        c = self.config
        if self.is_initializing():
            self(patches, positions, segments)
        x = self.trunk(patches, positions, segments, take=c.depth + 1 + c.feature_layer)
        x = self.post_norm(x) if c.feature_norm else x
        first = x.shape[1] - patches.shape[1]
        return jnp.concatenate([x[:, :1], x[:, first:]], 1) if c.class_token and c.class_feature else x[:, first:]


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
