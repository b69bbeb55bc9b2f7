"""Gated cross-attention: text looks at pictures between the layers of a language model that stays as it was.

A picture is one position of the text, and that position's embedding stays text. The blocks are a stack of their own
beside the decoder's; with closed gates, as they begin, the whole is the language model alone, bit by bit.
Source: Flamingo (arXiv 2204.14198), section 3.1.2; OpenFlamingo (arXiv 2308.01390); Idefics (arXiv 2306.16527).
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.attention import Attention
from lvlm_jax.nn.cache import LayerCache, empty_cache
from lvlm_jax.nn.linear import named
from lvlm_jax.nn.mlp import ACTIVATIONS, GatedMlp, Mlp
from lvlm_jax.nn.norms import NORMS
from lvlm_jax.nn.stack import Opened, make_stack, run_stack, weave
from lvlm_jax.shapes import Array, DTypeLike, Float, Int, pytree

Place = Literal["before_first", "before_last", "after_first"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig:
    """Gated blocks among the layers of a decoder; the defaults are OpenFlamingo's.

    Of every `every` layers one has a block: it stands before the first of them (Flamingo, Idefics: i % every == 0),
    before the last (OpenFlamingo: (i + 1) % every == 0) or after the first (flamingo-pytorch). `scope`: text sees the
    last picture before it, or all of them. `gate`: one number a branch, or one for each value of the width. `gated`:
    the feed-forward is SwiGLU's form. `mlp_dim` None is four times the width; `qk_norm` is a key of `nn.norms.NORMS`.
    """

    every: int = 1
    place: Place = "before_last"
    scope: Literal["last", "all"] = "last"
    heads: int = 8
    head_dim: int = 64
    mlp_dim: int | None = None
    gate: Literal["scalar", "vector"] = "scalar"
    activation: str = "gelu"
    gated: bool = False
    bias: bool = False
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    qk_norm: Literal["layer", "rms"] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: a block stands among every so many layers, at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: the activations are {', '.join(ACTIVATIONS)}")

    @property
    def at(self) -> int:
        """The layer of a group before which its block stands; `every` is behind the last."""
        return {"before_first": 0, "before_last": self.every - 1, "after_first": 1}[self.place]

    @property
    def behind(self) -> int:
        """1 where a block stands behind the layer that brings it, 0 where it stands before it."""
        return int(self.place == "after_first")

    def spots(self, depth: int) -> tuple[int, ...]:
        """Before which layers of a decoder the blocks stand; `depth` is behind the last."""
        return tuple(i + self.behind for i in range(depth) if i % self.every == self.at - self.behind)


@pytree
@dataclasses.dataclass(frozen=True)
class Media:
    """Pictures as the blocks read them, and which of them each position sees.

    ranges: of the B*T/G positions of each of G groups, into the keys of the group. tokens: the visual tokens of each
    group [G, S, F]. With neither tokens nor kept keys (`MediaCache.kept`) there is no picture.
    """

    ranges: R.Ranges
    tokens: Float[Array, "G S F"] | None


@pytree
@dataclasses.dataclass(frozen=True)
class MediaCache:
    """What decoding keeps: the decoder's cache, each block's keys and values, and the range that new tokens see."""

    text: Any
    kept: Any
    start: Int[Array, "B"]
    stop: Int[Array, "B"]

    def media(self, queries: int) -> Media:
        """New tokens see what the newest position saw."""
        wide = lambda ends: jnp.broadcast_to(ends[:, None], (len(ends), queries))  # noqa: E731
        keys = jax.tree.leaves(self.kept)  # [G, K, S, E]; with a leading axis of the blocks where they are scanned
        return Media(grouped(R.Ranges(wide(self.start), wide(self.stop)), keys[0].shape[-4] if keys else 1), None)


def new_cache(
    config: CrossAttentionConfig, depth: int, text: Any, rows: int, groups: int, keys: int, dtype: DTypeLike
) -> MediaCache:
    """The cache of a decoder of `depth` layers, and room for the keys and values of each block's pictures."""
    blocks = len(config.spots(depth))
    scan = isinstance(text, LayerCache)
    kept = empty_cache(blocks, groups, config.heads, keys, config.head_dim, dtype, scan) if keys else None
    nothing = jnp.zeros((rows,), jnp.int32)
    return MediaCache(text, kept, nothing, nothing)


def grouped(ranges: R.Ranges, groups: int) -> R.Ranges:
    """Ranges of rows as those of their groups' positions in a line: a group's keys are there once for all its rows."""
    return R.Ranges(ranges.start.reshape(groups, -1), ranges.stop.reshape(groups, -1))


class GatedBlock(nn.Module):
    """Cross-attention to the pictures, then a feed-forward, each behind a gate that begins closed."""

    heads: int
    head_dim: int
    mlp_dim: int
    gate: str = "scalar"
    activation: str = "gelu"
    gated: bool = False
    bias: bool = False
    norm: str = "layer"
    norm_eps: float = 1e-5
    qk_norm: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], kept: LayerCache | None, media: Media
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        norm = functools.partial(NORMS[self.norm], self.norm_eps, self.dtype)
        if media.tokens is not None or kept is not None:
            attention = Attention(
                self.heads,
                self.heads,
                self.head_dim,
                qkv_bias=self.bias,
                out_bias=self.bias,
                qk_norm=self.qk_norm,
                qk_norm_eps=self.norm_eps,
                dtype=self.dtype,
                name="attn",
            )
            queries = norm(name="norm1")(x).reshape(len(media.ranges.start), -1, x.shape[-1])
            out, kept = attention(queries, media.ranges, context=media.tokens, cache=kept)
            # A position that sees no picture gets nothing, a bias included.
            seen = (media.ranges.stop > media.ranges.start)[..., None]
            x = x + self._opening("attn_gate", x) * jnp.where(seen, out, 0).reshape(x.shape)
        if self.gated:
            mlp = GatedMlp(self.mlp_dim, self.activation, self.dtype, self.bias, name="mlp")
        else:
            mlp = Mlp(self.mlp_dim, self.activation, self.bias, self.dtype, name="mlp")
        return x + self._opening("mlp_gate", x) * mlp(norm(name="norm2")(x)), kept

    def _opening(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "*D"]:
        """How far a gate is open: the tanh of its parameter."""
        shape, axes = ((), ()) if self.gate == "scalar" else ((x.shape[-1],), ("embed",))
        return jnp.tanh(self.param(name, named(nn.initializers.zeros, axes), shape)).astype(x.dtype)


class CrossAttention(nn.Module):
    """The gated blocks of a decoder of `depth` layers, a stack of their own.

    Parameters: ``layers/0``, ``layers/1`` ..., one a block in the order of the decoder's layers.
    """

    config: CrossAttentionConfig
    width: int
    depth: int
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """The stack."""
        c = self.config
        self.spots = c.spots(self.depth)
        same = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name in GatedBlock.__annotations__}
        sizes = same | {"mlp_dim": c.mlp_dim or 4 * self.width}
        self.block = functools.partial(GatedBlock, **sizes, dtype=self.dtype)
        self.layers = make_stack(self.block, len(self.spots), self.scan, self.remat)

    def __call__(self, x: Float[Array, "B T D"], media: Media) -> Float[Array, "B T D"]:
        """All blocks in a row, to make their parameters."""
        return run_stack(self.layers, len(self.spots), x, None, media)[0]

    def among(self, media: Media, kept: Any = None) -> "Among":
        """The blocks to be run among a decoder's layers.

        Args:
          kept: `MediaCache.kept`, instead of tokens.
        """
        return Among(self, media, kept)

    def run(self, number: int, x: Float[Array, "B T D"], media: Media, kept: Any) -> tuple[Array, LayerCache | None]:
        """One block of a stack that is not scanned."""
        x, (out,) = self.layers(x, kept, range(number, number + 1), media)
        return x, out

    def opened(self, media: Media, kept: Any) -> Opened:
        """The scanned stack laid open."""
        return Opened(self.block, self.layers.variables["params"], kept, (media,), self.remat)


class Among:
    """What `Decoder` takes as `between`: one pass of the blocks, which collects the keys and values they made."""

    def __init__(self, blocks: CrossAttention, media: Media, kept: Any):
        self.blocks, self.media, self.kept = blocks, media, kept
        self.made: Any = ()

    def before(self, layer: int, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The block before a layer, where one stands there."""
        if layer not in self.blocks.spots:
            return x
        x, made = self.blocks.run(self.blocks.spots.index(layer), x, self.media, self.kept)
        self.made = (*self.made, made)
        return x

    def weave(self, layers: Opened, depth: int, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Any]:
        """The scanned form of both stacks."""
        c = self.blocks.config
        x, outs, self.made = weave(layers, self.blocks.opened(self.media, self.kept), c.every, c.at, x)
        return x, outs
