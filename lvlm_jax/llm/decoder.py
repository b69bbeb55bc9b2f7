"""One causal decoder; its families are config values."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.llm.block import Block, View
from lvlm_jax.llm.config import DecoderConfig
from lvlm_jax.nn.attention import soft_cap
from lvlm_jax.nn.cache import empty_cache
from lvlm_jax.nn.embed import Embed
from lvlm_jax.nn.linear import linear, named
from lvlm_jax.nn.norms import NORMS
from lvlm_jax.nn.positions import RopeScaling, mrope_axes, rotary
from lvlm_jax.nn.ranges import Ranges, causal, sliding
from lvlm_jax.nn.stack import Opened, make_stack, run_stack
from lvlm_jax.shapes import Array, DTypeLike, Float, Int


class Decoder(nn.Module):
    """Causal language model over embeddings: LLaMA, Qwen, Mistral, Gemma, OPT, GPT, MPT, GLM, PaLM and kin.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lvlm_jax.llm import Decoder, DecoderConfig
      >>> from lvlm_jax.nn import ranges
      >>> from lvlm_jax.nn.linear import init
      >>> config = DecoderConfig(vocab=64, width=32, depth=2, heads=4, kv_heads=2, mlp_dim=64)
      >>> decoder = Decoder(config)  # at full size: Decoder(llama.PRESETS["llama2_7b"], jnp.bfloat16, scan=True)
      >>> tokens = jnp.array([[1, 17, 42, 8, 2]])
      >>> positions, sees = jnp.arange(5)[None], ranges.causal(1, 5)
      >>> params = init(decoder, jax.random.key(0), jnp.zeros((1, 5, 32)), positions, sees)
      >>> x = decoder.apply({"params": params}, tokens, method="embed_tokens")
      >>> hidden, _ = decoder.apply({"params": params}, x, positions, sees)
      >>> decoder.apply({"params": params}, hidden, method="logits").shape  # [B, T, V]
      (1, 5, 64)

    Attributes:
      block: factory of a layer, for a fusion that needs another one; default the plain `Block`.
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"
    block: Any = None

    def setup(self) -> None:
        """Embedding, layers, final norm, head."""
        c = self.config
        same = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name in Block.__annotations__}
        block = self.block or functools.partial(Block, **same | {"head_dim": c.head_width}, dtype=self.dtype)
        width = c.embed_width or c.width
        self.embed = Embed(c.vocab, width, self.dtype)
        if c.embed_width is not None:
            self.project_in = linear(c.width, (None, "embed"), dtype=self.dtype)
            self.project_out = linear(width, ("embed", None), dtype=self.dtype)
        if c.positions == "learned":
            draw = named(nn.initializers.normal(0.02), ("positions", "embed"))
            self.position_embed = self.param("position_embed", draw, (c.context + c.position_offset, c.width))
        self.layers, self.layer = make_stack(block, c.depth, self.scan, self.remat), block
        if c.final_norm:
            self.norm = NORMS[c.norm](c.norm_eps, self.dtype)
        if not c.tied:
            self.head = Head(c.vocab, width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | Int[Array, "B T A"],
        ranges: Ranges,
        cache: Any = None,
        index: Int[Array, ""] | None = None,
        *shared: Any,
        between: Any = None,
    ) -> tuple[Float[Array, "B T _"], Any]:
        """Embeddings -> (hidden states that the head reads, cache).

        They are as wide as the model, or as `DecoderConfig.embed_width` says.

        Args:
          positions: position of each embedding in its example, below the context; several counts of it where the
            config says so (`DecoderConfig.counts`).
          ranges: the keys each query sees: of `x` itself, or of the cache when one is given.
          cache: from `new_cache`; the new keys are written at `index`.
          shared: what else a `block` of another kind takes, the same in every layer.
          between: what else runs between the layers (`fusion.cross_attention.Among`): its ``before(i, x)``, or where
            they are scanned its ``weave(layers, depth, x)``.

        Raises:
          ValueError: positions counted once for a decoder that counts them several times, or the other way round.
        """
        c = self.config
        if positions.shape[2:] != _counted(c):
            takes = "[B, T]" if c.counts == 1 else f"[B, T, {c.counts}], all counts of each"
            raise ValueError(
                f"positions of shape {positions.shape}: this decoder (rotary_pairs={c.rotary_pairs!r}, "
                f"mrope={c.mrope}) takes {takes}"
            )
        if self.is_initializing():  # the table and the head are read by other methods only
            self.embed_tokens(jnp.zeros((1, 1), jnp.int32))
            self.head_kernel()
        if c.positions == "learned":
            x = x + jnp.take(self.position_embed, positions + c.position_offset, axis=0, mode="clip").astype(x.dtype)
        views = self.views(positions, ranges, cache is not None, index)
        per_layer = self._per_layer(cache)
        if between is not None and self.scan:
            stack = Opened(self.layer, self.layers.variables["params"], per_layer, (views, index, *shared), self.remat)
            x, new = between.weave(stack, c.depth, x)
        else:
            before = None if between is None else between.before
            x, new = run_stack(self.layers, c.depth, x, per_layer, views, index, *shared, before=before)
        x = self.norm(x) if c.final_norm else x
        return x if c.embed_width is None else self.project_out(x), None if cache is None else new

    def views(
        self,
        positions: Int[Array, "B T"] | Int[Array, "B T A"],
        ranges: Ranges,
        cached: bool = False,
        index: Int[Array, ""] | None = None,
    ) -> tuple[View, ...]:
        """What its global layers see, then its local ones; one view where all see the same."""
        c = self.config
        turned = functools.partial(self._turned, positions)
        far = View(ranges, turned(c.rope_theta, c.rope_scaling))
        # Without a cache the keys are the queries, so a window that holds them all cuts nothing.
        reaches = c.window is None or (not cached and positions.shape[1] <= c.window)
        if reaches and c.local_theta is None:
            return (far,)
        near = View(
            ranges if reaches else sliding(ranges, c.window, 0 if index is None else index),
            far.rope if c.local_theta is None else turned(c.local_theta),
        )
        return (far, near) if "global" in c.pattern else (near,)

    def _turned(
        self, positions: Int[Array, "B T"] | Int[Array, "B T A"], theta: float, scaling: RopeScaling | None = None
    ) -> tuple[Array, Array] | None:
        """(cos, sin) of each position, those of its two counts one after the other; None where nothing is rotated."""
        c = self.config
        if c.positions != "rotary":
            return None
        if c.mrope is not None:
            return rotary(positions, c.rotary_width, theta, scaling, mrope_axes(c.mrope, c.mrope_interleaved))
        if c.counts == 1:
            return rotary(positions, c.rotary_width, theta, scaling)
        both = [rotary(positions[..., n], c.rotary_width // 2, theta, scaling) for n in range(2)]
        cos, sin = (jnp.concatenate(parts, axis=-1) for parts in zip(*both))
        return cos, sin

    def _per_layer(self, cache: Any) -> Any:
        """Each layer's (cache, number of its view)."""
        c = self.config
        kinds = [("global", "local").index(kind) for kind in c.layer_kinds]
        if self.scan:
            return cache, jnp.asarray(kinds, jnp.int32)
        return tuple(zip(cache or (None,) * c.depth, kinds))

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding table in the layers' width, scaled where the family does."""
        x = self.embed(tokens)
        if self.config.embed_width is not None:
            x = self.project_in(x)
        # The factor is rounded before the product, as Gemma was trained.
        return x * jnp.asarray(math.sqrt(self.config.width), x.dtype) if self.config.scale_embeddings else x

    def head_kernel(self) -> Float[Array, "D V"]:
        """The output head's kernel [D, V]: for a loss that computes logits only where a label is.

        Such a loss bends them itself, by `DecoderConfig.final_softcap`.
        """
        return self.embed.kernel() if self.config.tied else self.head()

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Hidden states -> float32 scores over the vocabulary."""
        kernel = self.head_kernel().astype(hidden.dtype)
        logits = jnp.einsum("...D,DV->...V", hidden, kernel, preferred_element_type=jnp.float32)
        cap = self.config.final_softcap
        return logits if cap is None else soft_cap(logits, cap)


class Head(nn.Module):
    """The kernel [D, V] of an untied output head."""

    vocab: int
    width: int

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        return self.param("kernel", named(nn.initializers.lecun_normal(), ("embed", "vocab")), (self.width, self.vocab))


def _counted(config: DecoderConfig) -> tuple[int, ...]:
    """What stands behind [B, T] in the shape of positions."""
    return (config.counts,) if config.counts > 1 else ()


def dummy_inputs(config: DecoderConfig, length: int = 2) -> tuple[Array, Array, Ranges]:
    """Smallest inputs of the right shapes, for `init` and for shapes alone."""
    positions = jnp.zeros((1, length, *_counted(config)), jnp.int32)
    return jnp.zeros((1, length, config.width)), positions, causal(1, length)


def new_cache(
    config: DecoderConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32, scan: bool = False
) -> Any:
    """An empty cache for `batch` rows of at most `length` positions."""
    return empty_cache(config.depth, batch, config.kv_heads, length, config.head_width, dtype, scan)
