"""One encoder-decoder language model; its families are config values."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.llm.decoder import Head
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.attention import Attention
from lvlm_jax.nn.cache import LayerCache, empty_cache
from lvlm_jax.nn.embed import Embed
from lvlm_jax.nn.mlp import GatedMlp, Mlp
from lvlm_jax.nn.norms import RMSNorm
from lvlm_jax.nn.ranges import Ranges
from lvlm_jax.nn.relative import RelativeBias
from lvlm_jax.nn.stack import make_stack, run_stack
from lvlm_jax.shapes import Array, DTypeLike, Float, Int, pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """Sizes of an encoder-decoder, and the parts in which releases differ; the defaults are those of T5 1.1.

    Sizes: `depth` layers read, `decoder_depth` write; `context` is the longest sequence it was trained for, and bounds
    nothing, since positions are relative.

    Parts: a `gated` feed-forward or a plain one. `buckets` of distances up to `furthest`, see `nn.relative`. A `tied`
    head is the embedding. `scale_output` multiplies what goes into the head by 1/sqrt(width).

    `start_id`: the token that stands before the first one written.
    """

    vocab: int
    width: int
    depth: int
    decoder_depth: int
    heads: int
    head_dim: int
    mlp_dim: int
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    gated: bool = True
    norm_eps: float = 1e-6
    buckets: int = 32
    furthest: int = 128
    tied: bool = False
    scale_output: bool = False
    context: int = 512
    start_id: int = 0

    @property
    def head_width(self) -> int:
        """Width of one head (E), by the name that decoders have for it."""
        return self.head_dim

    @property
    def final_softcap(self) -> None:
        """Its logits are not bent, as some decoders' are (`DecoderConfig.final_softcap`)."""

    def __post_init__(self) -> None:
        # Of an encoder half of the buckets look ahead, and half of each half hold one distance.
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"buckets={self.buckets}: a multiple of 4, so that they divide into both directions")
        if self.furthest <= self.buckets // 2:
            raise ValueError(
                f"furthest={self.furthest} is within the {self.buckets // 2} distances that buckets={self.buckets} tell"
                " apart one by one; it must be above that"
            )


@pytree
@dataclasses.dataclass(frozen=True)
class Written:
    """What a layer of the decoder keeps: keys of what is written, and of what the encoder read (None: not yet)."""

    own: LayerCache
    source: LayerCache | None = None


class Block(nn.Module):
    """Pre-norm block: attention, attention over `context` where it is a decoder's (`cross`), then a feed-forward."""

    heads: int
    head_dim: int
    mlp_dim: int
    activation: str
    gated: bool
    norm_eps: float
    cross: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Written | None,
        ranges: Ranges,
        bias: Float[Array, "H T S"],
        seen: Ranges | None,
        context: Float[Array, "B P D"] | None,
        index: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Written | None]:
        own, source = (None, None) if cache is None else (cache.own, cache.source)
        norm = functools.partial(RMSNorm, self.norm_eps, self.dtype)
        # The bias of positions takes the place of a scale.
        attention = functools.partial(Attention, self.heads, self.heads, self.head_dim, scale=1.0, dtype=self.dtype)
        out, own = attention(name="attn")(norm(name="norm1")(x), ranges, bias=bias, cache=own, index=index)
        x = x + out
        if self.cross:
            if context is None and source is None:
                raise ValueError("the first call needs context=, what the encoder gave: no keys of it are cached yet")
            out, source = attention(name="cross")(norm(name="norm_cross")(x), seen, context=context, cache=source)
            x = x + out
        if self.gated:
            mlp = GatedMlp(self.mlp_dim, self.activation, self.dtype, name="mlp")
        else:
            mlp = Mlp(self.mlp_dim, self.activation, use_bias=False, dtype=self.dtype, name="mlp")
        x = x + mlp(norm(name="norm2")(x))
        return x, None if cache is None else Written(own, source)


class Layers(nn.Module):
    """A stack with its bias of positions and its final norm: the encoder, or the decoder (`cross`)."""

    config: EncoderDecoderConfig
    cross: bool = False
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        ranges: Ranges,
        seen: Ranges | None = None,
        context: Float[Array, "B P D"] | None = None,
        cache: Any = None,
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        c = self.config
        same = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name in Block.__annotations__}
        block = functools.partial(Block, **same, cross=self.cross, dtype=self.dtype)
        depth = c.decoder_depth if self.cross else c.depth
        keys = x.shape[1] if cache is None else jax.tree.leaves(cache)[0].shape[-2]
        relative = RelativeBias(c.heads, c.buckets, c.furthest, causal=self.cross, name="relative")
        bias = relative(x.shape[1], keys, 0 if index is None else index)
        stack = make_stack(block, depth, self.scan, self.remat, name="layers")
        x, new = run_stack(stack, depth, x, cache, ranges, bias, seen, context, index)
        return RMSNorm(c.norm_eps, self.dtype, name="norm")(x), None if cache is None else new


class EncoderDecoder(nn.Module):
    """A language model that reads with one stack and writes with another: T5 and Flan-T5.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lvlm_jax.llm import EncoderDecoder, EncoderDecoderConfig
      >>> from lvlm_jax.nn.linear import init
      >>> config = EncoderDecoderConfig(
      ...     vocab=64, width=32, depth=2, decoder_depth=2, heads=4, head_dim=8, mlp_dim=64
      ... )
      >>> model = EncoderDecoder(config)  # at full size: EncoderDecoder(t5.PRESETS["flan_t5_xl"], jnp.bfloat16)
      >>> read, written = jnp.array([[17, 42, 8, 2, 1]]), jnp.array([[config.start_id, 9, 33]])
      >>> x, ones = jnp.zeros((1, 5, 32)), jnp.ones((1, 5), jnp.int32)
      >>> params = init(model, jax.random.key(0), x, ones, written, ones[:, :3])
      >>> x = model.apply({"params": params}, read, method="embed_tokens")  # soft tokens of pictures may stand before
      >>> hidden = model.apply({"params": params}, x, ones, written, ones[:, :3])
      >>> model.apply({"params": params}, hidden, method="logits").shape  # [B, T, V]; position t scores token t + 1
      (1, 3, 64)

    Parameters: ``embed``, ``encoder``, ``decoder``, and ``head`` where it is not tied.
    """

    config: EncoderDecoderConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """Embedding, both stacks, head."""
        c = self.config
        self.embed = Embed(c.vocab, c.width, self.dtype)
        self.encoder = Layers(c, False, self.dtype, self.scan, self.remat)
        self.decoder = Layers(c, True, self.dtype, self.scan, self.remat)
        if not c.tied:
            self.head = Head(c.vocab, c.width)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        segments: Int[Array, "B S"],
        tokens: Int[Array, "B T"],
        token_segments: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Embeddings to read and tokens to write -> the decoder's hidden states, for `logits` or a loss.

        Args:
          segments, token_segments: 0 is padding; examples packed into a row have numbers, the same on both sides.
          tokens: each example's begin with `start_id`, so that position t predicts token t + 1.
        """
        return self.write(self.embed(tokens), token_segments, self.encode(x, segments), segments)

    def write(
        self,
        y: Float[Array, "B T D"],
        token_segments: Int[Array, "B T"],
        context: Float[Array, "B S D"],
        segments: Int[Array, "B S"],
    ) -> Float[Array, "B T D"]:
        """Embeddings of what is written, and what `encode` gave -> hidden states; segments as above."""
        if self.is_initializing():  # read by other methods only
            self.head_kernel()
        seen = R.packed_cross(token_segments, segments)
        hidden, _ = self.decoder(y, R.packed_causal(token_segments), seen, context)
        return self._scaled(hidden)

    def encode(self, x: Float[Array, "B S D"], segments: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Embeddings -> what the decoder looks at."""
        return self.encoder(x, R.packed_full(segments))[0]

    def decode(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B S"],
        cache: Any,
        index: Int[Array, ""],
        context: Float[Array, "B S D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The next tokens of rows that hold one example each -> (hidden states, cache).

        Args:
          segments: of what was read; 0 is padding.
          cache: from `new_cache`, or what the call before gave.
          index: the cache slot of the first of these tokens, the same for all rows; the very first is `start_id`.
          context: what `encode` gave; needed in the first call alone, which keeps its keys and values.
        """
        rows, count = tokens.shape
        own = R.cached(jnp.zeros(rows, jnp.int32), index + count, count)
        seen = R.packed_cross(jnp.ones_like(tokens), (segments > 0).astype(jnp.int32))
        hidden, cache = self.decoder(self.embed(tokens), own, seen, context, cache, index)
        return self._scaled(hidden), cache

    def embed_tokens(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Rows of the embedding table."""
        return self.embed(tokens)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The output head's kernel [D, V]: for a loss that computes logits only where a label is."""
        return self.embed.kernel() if self.config.tied else self.head()

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Hidden states -> float32 scores over the vocabulary."""
        kernel = self.head_kernel().astype(hidden.dtype)
        return jnp.einsum("...D,DV->...V", hidden, kernel, preferred_element_type=jnp.float32)

    def _scaled(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return hidden * self.config.width**-0.5 if self.config.scale_output else hidden


def new_cache(
    config: EncoderDecoderConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32, scan: bool = False
) -> Any:
    """An empty cache of the decoder for `batch` rows of at most `length` written positions, the start included."""
    own = empty_cache(config.decoder_depth, batch, config.heads, length, config.head_dim, dtype, scan)
    return Written(own) if scan else tuple(map(Written, own))
