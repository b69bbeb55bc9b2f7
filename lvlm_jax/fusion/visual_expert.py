"""The visual expert: in every layer a second set of weights for the positions of pictures (CogVLM, arXiv 2311.03079).

A picture stands in the text as a begin vector, its visual tokens and an end vector. The begin vector and the tokens go
through the expert's projections and feed-forward, all else through the language model's own; attention runs over both
together, causally. The tokens of a picture share one position, so that a picture takes three of the model's context.

Where pictures stand differs from row to row, and rows are packed, so no span is static. What is static is the room: a
group of R rows holds at most N*Q visual tokens. So the language weights run over all R*T positions, as in the plain
decoder, and the expert over N*Q gathered ones: less than the 2*R*T of running both and selecting, nothing beside the
plain decoder in text alone and in decoding, and every gather stays within a group. (A grouped product over positions
sorted by expert would save the language weights' N*Q too, but wants both experts' weights in one array.)
Source: CogVLM's hub code (modeling_cogvlm.py), whose rule "visual if the next one is visual" is the same where a row
shows one picture; here every picture has its own begin and end.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.keymap import TRANSPOSE, Change, Row, dense, joined
from lvlm_jax.llm.decoder import DecoderConfig, View
from lvlm_jax.nn.attention import attend, split_heads
from lvlm_jax.nn.cache import LayerCache
from lvlm_jax.nn.linear import linear, named
from lvlm_jax.nn.mlp import GatedMlp
from lvlm_jax.nn.norms import RMSNorm
from lvlm_jax.nn.positions import ROTATIONS
from lvlm_jax.shapes import Array, DTypeLike, Float, Int, pytree

ENDS = 2
"""Positions of a picture beside its visual tokens: its begin and its end."""


class Ends(nn.Module):
    """The learned vectors around each picture's visual tokens: [N, Q, D] -> [N, Q+2, D]."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, visual: Float[Array, "N Q D"]) -> Float[Array, "N _ D"]:
        rows, _, width = visual.shape
        draw = named(nn.initializers.normal(width**-0.5), ("embed",))
        first, last = (
            jnp.broadcast_to(self.param(name, draw, (width,)).astype(self.dtype), (rows, 1, width))
            for name in ("begin", "end")
        )
        return jnp.concatenate([first, visual.astype(self.dtype), last], axis=1)


@pytree
@dataclasses.dataclass(frozen=True)
class Routing:
    """Which positions the expert computes.

    slots: the place among the gathered that belongs to a position, -1 where the language weights compute it. places:
    of each gathered one the position in its group's rows, laid end to end; past them for one that stands nowhere.
    """

    slots: Int[Array, "B T"]
    places: Int[Array, "G M"]

    def gather(self, x: Float[Array, "B T D"]) -> Float[Array, "G M D"]:
        """The positions of pictures."""
        flat = x.reshape(self.places.shape[0], -1, x.shape[-1])
        return jnp.take_along_axis(flat, jnp.minimum(self.places, flat.shape[1] - 1)[..., None], axis=1)

    def overlay(self, text: Float[Array, "B T F"], seen: Float[Array, "G M F"]) -> Float[Array, "B T F"]:
        """What the language weights gave, with the expert's in the places of pictures."""
        slots = self.slots.reshape(seen.shape[0], -1)
        taken = jnp.take_along_axis(seen, jnp.maximum(slots, 0)[..., None], axis=1).reshape(text.shape)
        return jnp.where((self.slots >= 0)[..., None], taken, text)


def routing(image_index: Int[Array, "B T"], groups: int, pictures: int, visual_tokens: int) -> Routing | None:
    """The routing of a batch, None of one without room for pictures.

    Args:
      image_index: of a `Batch`, each visual token in one position of its group at most: a picture that several rows
        show stands in several vision rows.
      pictures: vision rows of a group (N). visual_tokens: positions of one (Q), begin and end among them.
    """
    if not pictures:
        return None
    last = image_index % visual_tokens == visual_tokens - 1
    slots = jnp.where((image_index >= 0) & ~last, image_index, -1)
    flat = slots.reshape(groups, -1)
    size = flat.shape[1]
    nowhere = jnp.full((groups, pictures * visual_tokens), size, jnp.int32)
    put = jax.vmap(lambda places, at: places.at[jnp.where(at < 0, places.size, at)].set(jnp.arange(size), mode="drop"))
    return Routing(slots, put(nowhere, flat))


def skipped(positions: Int[Array, "B T"], image_index: Int[Array, "B T"], visual_tokens: int) -> Int[Array, "B T"]:
    """How far the shared positions of pictures fall behind: position minus this is the one to rotate by.

    Args:
      positions: within the example, restarting at 0.
      visual_tokens: positions of a picture, begin and end among them.
    """
    place = image_index % visual_tokens
    again = (image_index >= 0) & (place > 1) & (place < visual_tokens - 1)  # every visual token but the first
    count = jnp.cumsum(again, axis=1, dtype=jnp.int32)
    start = jnp.maximum(jnp.arange(positions.shape[1]) - positions, 0)
    return count - jnp.take_along_axis(count - again, start, axis=1)


@pytree
@dataclasses.dataclass(frozen=True)
class Cache:
    """The decoder's cache, and how far each row's next position has fallen behind (`skipped`)."""

    text: Any
    skipped: Int[Array, "B"]


class Projections(nn.Module):
    """One expert's projections of attention."""

    heads: int
    kv_heads: int
    head_dim: int
    width: int
    qkv_bias: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Queries, keys, values, output."""
        project = functools.partial(linear, use_bias=self.qkv_bias, dtype=self.dtype)
        self.q = project(self.heads * self.head_dim, ("embed", "heads"))
        self.k = project(self.kv_heads * self.head_dim, ("embed", "kv_heads"))
        self.v = project(self.kv_heads * self.head_dim, ("embed", "kv_heads"))
        self.o = linear(self.width, ("heads", "embed"), dtype=self.dtype)

    def qkv(self, x: Float[Array, "*B D"]) -> tuple[Array, Array, Array]:
        """Before attention."""
        return self.q(x), self.k(x), self.v(x)

    def out(self, x: Float[Array, "*B F"]) -> Float[Array, "*B D"]:
        """Behind it."""
        return self.o(x)


class Block(nn.Module):
    """LLaMA's decoder block, with ``expert_attn`` and ``expert_mlp`` beside ``attn`` and ``mlp``."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    qkv_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: tuple[LayerCache | None, Any],
        views: tuple[View, ...],
        index: Int[Array, ""] | None,
        routing: Routing | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        (view,), (cache, _) = views, layer
        norm = functools.partial(RMSNorm, self.norm_eps, self.dtype)
        project = functools.partial(
            Projections, self.heads, self.kv_heads, self.head_dim, x.shape[-1], self.qkv_bias, self.dtype
        )
        mine, expert = project(name="attn"), project(name="expert_attn")
        q, k, v = self._routed(mine.qkv, expert.qkv, norm(name="norm1")(x), routing)
        rotate = lambda heads: ROTATIONS["half"](heads, *view.rope)  # noqa: E731
        q, k = rotate(split_heads(q, self.heads)), rotate(split_heads(k, self.kv_heads))
        k, v = k.swapaxes(1, 2), split_heads(v, self.kv_heads).swapaxes(1, 2)
        if cache is not None:
            cache = cache.write(k, v, index)
            k, v = cache.k, cache.v
        out = attend(q, k, v, view.ranges).reshape(*x.shape[:-1], self.heads * self.head_dim)
        x = x + self._routed(mine.out, expert.out, out, routing)
        feed = functools.partial(GatedMlp, self.mlp_dim, "silu", self.dtype)
        out = self._routed(feed(name="mlp"), feed(name="expert_mlp"), norm(name="norm2")(x), routing)
        return x + out, cache

    def _routed(self, mine: Callable, expert: Callable, x: Array, routing: Routing | None) -> Any:
        """The language weights over all, the expert's over pictures."""
        out = mine(x)
        if routing is None:
            if self.is_initializing():
                expert(x)
            return out
        return jax.tree.map(routing.overlay, out, expert(routing.gather(x)))


def block(config: DecoderConfig, dtype: DTypeLike) -> functools.partial:
    """What `Decoder` takes as ``block=``.

    Raises:
      ValueError: a decoder with parts that LLaMA has not.
    """
    check(config)
    same = ("heads", "kv_heads", "mlp_dim", "norm_eps", "qkv_bias")
    values = {name: getattr(config, name) for name in same}
    return functools.partial(Block, **values, head_dim=config.head_width, dtype=dtype)


def check(config: DecoderConfig) -> None:
    """Raises ValueError for a decoder whose layers are not LLaMA's."""
    if other := config.parts.keys() - {"qkv_bias"}:
        raise ValueError(
            f"a visual expert stands beside LLaMA's layers; this decoder differs in {', '.join(sorted(other))} "
            "(qkv_bias alone may differ)"
        )


def from_language(leaves: Mapping[str, Array], wanted: Iterable[str]) -> dict[str, Array]:
    """A plain decoder's leaves by path, with those of the expert among the `wanted` ones: copies of the decoder's own.

    So CogVLM starts: the expert does at first what the language model does.
    """
    language = {path: path.replace("/expert_", "/") for path in wanted if "/expert_" in path and path not in leaves}
    return {**leaves, **{path: jnp.copy(leaves[own]) for path, own in language.items() if own in leaves}}


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def rows(config: DecoderConfig, ours: str = "llm", theirs: str = "model.", head: str = "lm_head.weight") -> list[Row]:
    """The key table of CogVLM's language model, its experts and the head; arguments as `llm.llama.rows`.

    Raises:
      ValueError: grouped keys, which one fused tensor of three equal parts cannot hold.
    """
    if config.kv_heads != config.heads:
        raise ValueError(f"kv_heads={config.kv_heads} of heads={config.heads}: CogVLM's files have as many of both")
    base = f"{ours}/" if ours else ""
    out = [Row(f"{base}embed/table", f"{theirs}embed_tokens.weight")]
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}layers.{i}"
        for name, norm in (("norm1", "input"), ("norm2", "post_attention")):
            out.append(Row(f"{a}/{name}/scale", f"{b}.{norm}_layernorm.weight"))
        for kind, prefix in (("language", ""), ("vision", "expert_")):
            x, y = f"{a}/{prefix}attn", f"{b}.self_attn.{kind}_expert"
            fused = tuple(f"{x}/{name}" for name in "qkv")
            out.append(Row(tuple(f"{p}/kernel" for p in fused), f"{y}_query_key_value.weight", joined(3, TRANSPOSE)))
            if config.qkv_bias:
                out.append(Row(tuple(f"{p}/bias" for p in fused), f"{y}_query_key_value.bias", joined(3)))
            out += dense(f"{x}/o", f"{y}_dense")
            for name in ("gate", "up", "down"):
                out += dense(f"{a}/{prefix}mlp/{name}", f"{b}.mlp.{kind}_mlp.{name}_proj")
    out.append(Row(f"{base}norm/scale", f"{theirs}norm.weight"))
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


_VECTOR = Change(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, -1))


def ends_rows(ours: str = "ends", theirs: str = "model.vision") -> list[Row]:
    """The vectors around pictures, [1, 1, D] there."""
    return [Row(f"{ours}/{name}", f"{theirs}.{key}", _VECTOR) for name, key in (("begin", "boi"), ("end", "eoi"))]
