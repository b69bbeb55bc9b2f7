"""One causal decoder; its families are config values."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.nn.attention import Attention, soft_cap
from lvlm_jax.nn.cache import LayerCache, empty_cache
from lvlm_jax.nn.embed import Embed
from lvlm_jax.nn.linear import named
from lvlm_jax.nn.mlp import GatedMlp
from lvlm_jax.nn.norms import NORMS
from lvlm_jax.nn.positions import ROTATIONS, RopeScaling, rotary
from lvlm_jax.nn.ranges import Ranges, sliding
from lvlm_jax.nn.stack import make_stack, run_stack
from lvlm_jax.shapes import Array, DTypeLike, Float, Int, pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder, and the parts in which families differ; the defaults are LLaMA's.

    Sizes: `context` is the longest sequence it was trained for; `head_dim` None means width / heads.

    Parts: `norm` is a key of `nn.norms.NORMS`, used throughout; `post_norms` adds one behind each branch, `qk_norm` one
    for each head's queries and keys ("head_layer": a layer norm with weights of each head's own). `order` says where
    norms stand (`Block`). `scale_embeddings` multiplies token embeddings (not what stands beside them) by
    sqrt(width). Scores are divided by sqrt(`query_scalar`), default the head width, and bent by `attn_softcap`; logits
    by `final_softcap`.

    Positions: the first `rotary_fraction` of a head is rotated, in pairs as `rotary_pairs` says. `pattern` repeats over
    the layers: a "global" one sees all before, a "local" one the last `window` positions, rotated by `local_theta`
    without scaling where that is given.

    `public`: the public ``model_type`` to write where several hold the same values; None takes the first that does.
    """

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
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm: Literal["rms", "offset_rms"] = "rms"
    qk_norm: bool | Literal["head_layer"] = False
    post_norms: bool = False
    order: Literal["pre", "swin"] = "pre"
    scale_embeddings: bool = False
    query_scalar: int | None = None
    attn_softcap: float | None = None
    final_softcap: float | None = None
    window: int | None = None
    pattern: tuple[str, ...] = ("global",)
    local_theta: float | None = None
    rotary_fraction: float = 1.0
    rotary_pairs: Literal["half", "interleaved"] = "half"
    public: str | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} do not divide into groups of kv_heads={self.kv_heads}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}; change one, or set head_dim")
        if self.head_width % 2:
            raise ValueError(f"heads of width {self.head_width} cannot be rotated in pairs; choose an even head_dim")
        if not 0 < self.rotary_width <= self.head_width or self.rotary_width % 2:
            raise ValueError(
                f"rotary_fraction={self.rotary_fraction} rotates {self.rotary_width} of {self.head_width} values of a "
                "head; it must be an even number of them, at least 2"
            )
        if self.post_norms and self.order != "pre":
            raise ValueError(f"post_norms=True with order={self.order!r}: only order='pre' norms its branches again")
        for name in ("attn_softcap", "final_softcap"):
            if (cap := getattr(self, name)) is not None and cap <= 0:
                raise ValueError(f"{name}={cap}: scores are bent into (-cap, cap); None leaves them as they are")
        if not self.pattern or not set(self.pattern) <= {"global", "local"}:
            raise ValueError(f"pattern={self.pattern!r}: a tuple of 'global' and 'local', repeated over the layers")
        if ("local" in self.pattern) != (self.window is not None):
            raise ValueError(
                f"pattern={self.pattern!r} and window={self.window}: local layers, and only they, need one"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: a local layer sees at least its own position")
        if self.local_theta is not None and self.window is None:
            raise ValueError(
                f"local_theta={self.local_theta} rotates local layers, and pattern={self.pattern!r} has none"
            )

    @property
    def head_width(self) -> int:
        """Width of one head (E)."""
        return self.head_dim or self.width // self.heads

    @property
    def rotary_width(self) -> int:
        """How many values of a head are rotated."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """ "global" or "local" for each layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.depth))

    def holds(self, parts: Mapping[str, Any], optional: Iterable[str] = ()) -> bool:
        """Whether it has exactly these `parts`, and beside them at most the `optional` ones; the rest is LLaMA's."""
        found = self.parts
        extra = found.keys() - set(optional) - parts.keys()
        return not extra and all(found.get(name) == value for name, value in parts.items())

    @property
    def parts(self) -> dict[str, Any]:
        """The values in which it differs from LLaMA's decoder, sizes apart."""
        fields = [f for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING and f.name not in _COMMON]
        return {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}


_COMMON = ("head_dim", "norm_eps", "rope_theta", "rope_scaling", "tied", "context", "public")
"""Fields with a default that every family has."""


@pytree
@dataclasses.dataclass(frozen=True)
class View:
    """What a kind of layer sees: the keys of each query, and (cos, sin) of each position."""

    ranges: Ranges
    rope: tuple[Array, Array]


Which = int | Int[Array, ""]


def choose(views: Sequence[View], which: Which) -> View:
    """The view of one kind: by its number where layers run one by one, by selection where they are traced as one."""
    if len(views) == 1:
        return views[0]
    if isinstance(which, int):
        return views[which]
    same = [View(view.ranges.general(), view.rope) for view in views]
    return jax.tree.map(lambda *leaves: jax.lax.select_n(which, *leaves), *same)


class Block(nn.Module):
    """Decoder block: attention, then a gated MLP, with norms in one of these orders.

    pre: x + attn(norm1(x)), then the same with the MLP and norm2; with `post_norms`, each branch is normed again before
    it is added. swin: x + norm1(attn(x)), then the same (Swin V2, arXiv 2111.09883; Chameleon 34B).
    """

    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    qkv_bias: bool = False
    activation: str = "silu"
    norm: str = "rms"
    order: str = "pre"
    qk_norm: bool | str = False
    post_norms: bool = False
    query_scalar: int | None = None
    attn_softcap: float | None = None
    rotary_pairs: str = "half"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: tuple[LayerCache | None, Which],
        views: tuple[View, ...],
        index: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        cache, which = layer
        view = choose(views, which)
        norm = functools.partial(NORMS[self.norm], self.norm_eps, self.dtype)
        after = norm if self.post_norms else lambda name: lambda branch: branch
        attention = Attention(
            self.heads,
            self.kv_heads,
            self.head_dim,
            qkv_bias=self.qkv_bias,
            qk_norm=self.norm if self.qk_norm is True else self.qk_norm or None,
            qk_norm_eps=self.norm_eps,
            scale=None if self.query_scalar is None else self.query_scalar**-0.5,
            softcap=self.attn_softcap,
            dtype=self.dtype,
            name="attn",
        )
        rotate = lambda heads: ROTATIONS[self.rotary_pairs](heads, *view.rope)  # noqa: E731
        mlp = GatedMlp(self.mlp_dim, self.activation, self.dtype, name="mlp")
        seen = x if self.order == "swin" else norm(name="norm1")(x)
        out, cache = attention(seen, view.ranges, rotate=rotate, cache=cache, index=index)
        if self.order == "swin":
            x = x + norm(name="norm1")(out)
            return x + norm(name="norm2")(mlp(x)), cache
        x = x + after(name="post_norm1")(out)
        return x + after(name="post_norm2")(mlp(norm(name="norm2")(x))), cache


class Decoder(nn.Module):
    """Causal language model over embeddings: LLaMA, Qwen, Mistral, Gemma and kin.

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
        self.embed = Embed(c.vocab, c.width, self.dtype)
        self.layers = make_stack(block, c.depth, self.scan, self.remat)
        self.norm = NORMS[c.norm](c.norm_eps, self.dtype)
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
        views = self.views(positions, ranges, cache is not None, index)
        x, new = run_stack(self.layers, c.depth, x, self._per_layer(cache), views, index)
        return self.norm(x), None if cache is None else new

    def views(
        self, positions: Int[Array, "B T"], ranges: Ranges, cached: bool = False, index: Int[Array, ""] | None = None
    ) -> tuple[View, ...]:
        """What its global layers see, then its local ones; one view where all see the same."""
        c = self.config
        turned = functools.partial(rotary, positions, c.rotary_width)
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

    def _per_layer(self, cache: Any) -> Any:
        """Each layer's (cache, number of its view)."""
        c = self.config
        kinds = [("global", "local").index(kind) for kind in c.layer_kinds]
        if self.scan:
            return cache, jnp.asarray(kinds, jnp.int32)
        return tuple(zip(cache or (None,) * c.depth, kinds))

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding table, scaled where the family does."""
        x = self.embed(tokens)
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


def new_cache(
    config: DecoderConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32, scan: bool = False
) -> Any:
    """An empty cache for `batch` rows of at most `length` positions."""
    return empty_cache(config.depth, batch, config.kv_heads, length, config.head_width, dtype, scan)
