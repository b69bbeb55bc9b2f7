"""One causal decoder; its families are config values."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn.attention import Attention
from lvlm_jax.nn.cache import LayerCache, empty_cache
from lvlm_jax.nn.embed import Embed
from lvlm_jax.nn.linear import named
from lvlm_jax.nn.mlp import GatedMlp
from lvlm_jax.nn.norms import RMSNorm
from lvlm_jax.nn.positions import RopeScaling, rotary, rotate_half
from lvlm_jax.nn.ranges import Ranges
from lvlm_jax.nn.stack import make_stack, run_stack
from lvlm_jax.shapes import Array, DTypeLike, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder. `context` is the longest sequence it was trained for."""

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_dim: int
    head_dim: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    tied: bool = False
    context: int = 4096

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} do not divide into groups of kv_heads={self.kv_heads}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}; change one, or set head_dim")
        if self.head_width % 2:
            raise ValueError(f"heads of width {self.head_width} cannot be rotated in pairs; choose an even head_dim")

    @property
    def head_width(self) -> int:
        """Width of one head (E)."""
        return self.head_dim or self.width // self.heads


class Block(nn.Module):
    """Pre-norm decoder block: attention, then a gated MLP."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    qkv_bias: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache | None,
        ranges: Ranges,
        rope: tuple[Array, Array],
        index: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        norm = functools.partial(RMSNorm, self.norm_eps, self.dtype)
        attention = Attention(
            self.heads, self.kv_heads, self.head_dim, qkv_bias=self.qkv_bias, dtype=self.dtype, name="attn"
        )
        rotate = lambda heads: rotate_half(heads, *rope)  # noqa: E731
        out, cache = attention(norm(name="norm1")(x), ranges, rotate=rotate, cache=cache, index=index)
        x = x + out
        return x + GatedMlp(self.mlp_dim, dtype=self.dtype, name="mlp")(norm(name="norm2")(x)), cache


class Decoder(nn.Module):
    """Causal language model over embeddings: LLaMA, Vicuna, Qwen2 and kin.

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
        block = self.block or functools.partial(
            Block,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_width,
            mlp_dim=c.mlp_dim,
            norm_eps=c.norm_eps,
            qkv_bias=c.qkv_bias,
            dtype=self.dtype,
        )
        self.embed = Embed(c.vocab, c.width, self.dtype)
        self.layers = make_stack(block, c.depth, self.scan, self.remat)
        self.norm = RMSNorm(c.norm_eps, self.dtype)
        if not c.tied:
            self.head = Head(c.vocab, c.width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        ranges: Ranges,
        cache: Any = None,
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Embeddings -> (hidden states after the final norm, cache).

        Args:
          positions: rotary position of each embedding.
          ranges: the keys each query sees: of `x` itself, or of the cache when one is given.
          cache: from `new_cache`; the new keys are written at `index`.
        """
        c = self.config
        if self.is_initializing():  # the table and the head are read by other methods only
            self.embed(jnp.zeros((1, 1), jnp.int32))
            self.head_kernel()
        rope = rotary(positions, c.head_width, c.rope_theta, c.rope_scaling)
        x, new = run_stack(self.layers, c.depth, x, cache, ranges, rope, index)
        return self.norm(x), None if cache is None else new

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding table."""
        return self.embed(tokens)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The output head's kernel [D, V]: for a loss that computes logits only where a label is."""
        return self.embed.kernel() if self.config.tied else self.head()

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Hidden states -> float32 scores over the vocabulary."""
        kernel = self.head_kernel().astype(hidden.dtype)
        return jnp.einsum("...D,DV->...V", hidden, kernel, preferred_element_type=jnp.float32)


class Head(nn.Module):
    """The kernel [D, V] of an untied output head."""

    vocab: int
    width: int

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        return self.param("kernel", named(nn.initializers.lecun_normal(), ("embed", "vocab")), (self.width, self.vocab))


def new_cache(
    config: DecoderConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32, scan: bool = False
) -> Any:
    """An empty cache for `batch` rows of at most `length` positions."""
    return empty_cache(config.depth, batch, config.kv_heads, length, config.head_width, dtype, scan)
