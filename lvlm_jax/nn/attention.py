"""Attention over key ranges, and the multi-head layer that every tower and decoder uses."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lvlm_jax import mesh as meshes
from lvlm_jax.nn import positions
from lvlm_jax.nn.cache import LayerCache
from lvlm_jax.nn.linear import linear
from lvlm_jax.nn.norms import NORMS, LayerNorm
from lvlm_jax.nn.ranges import KEPT, Ranges
from lvlm_jax.shapes import Array, DTypeLike, Float, Int

Rotate = Callable[[Array], Array]

KERNEL_FROM = 128
"""Queries from which on the TPU kernel pays; a step of decoding has one."""


def attend(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B K S E"],
    v: Float[Array, "B K S E"],
    ranges: Ranges,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "H T S"] | None = None,
) -> Float[Array, "B T H E"]:
    """Softmax attention of each query over its key range; grouped heads (H a multiple of K).

    On TPUs by a kernel whose memory is linear in the positions (`nn.range_attention`), elsewhere, and where scores have
    a bias, in plain products.
    Keys stand heads-first, as the cache holds them. Scores and softmax are float32. A query with an empty range gets
    zeros (a softmax over nothing would be uniform).

    Args:
      scale: what scores are multiplied by; default 1/sqrt(E).
      softcap: bound of the scaled scores, see `soft_cap`.
      bias: what is added to them then, the same for all rows.
    """
    if bias is None and meshes.platform() == "tpu" and q.shape[1] >= KERNEL_FROM:
        return _on_tpu(q, k, v, ranges, scale, softcap)
    return checkpoint_name(plain_attend(q, k, v, ranges, scale=scale, softcap=softcap, bias=bias), KEPT)


def _on_tpu(q: Any, k: Any, v: Any, ranges: Ranges, scale: float | None, softcap: float | None) -> Any:
    """The range kernel on each device's rows and heads: the partitioner cannot cut a kernel by itself."""
    from lvlm_jax.nn import range_attention as kernel  # Pallas takes its time to load

    run = functools.partial(kernel.range_attention, scale=scale, softcap=softcap)
    mesh = meshes.active()
    if mesh is None or mesh.size == 1:
        return run(q, k, v, ranges.start, ranges.stop)
    cut = functools.partial(meshes.spec, mesh)
    queries = cut(("batch", None, "heads", None), (*q.shape[:2], k.shape[1], 1))  # heads go where their keys go
    keys = cut(("batch", "kv_heads", None, None), k.shape)
    ends = cut(("batch", None), ranges.start.shape)
    whole = jax.shard_map(
        run, mesh=mesh, in_specs=(queries, keys, keys, ends, ends), out_specs=queries, check_vma=False
    )
    return whole(q, k, v, ranges.start, ranges.stop)


def plain_attend(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B K S E"],
    v: Float[Array, "B K S E"],
    ranges: Ranges,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "H T S"] | None = None,
) -> Float[Array, "B T H E"]:
    """`attend` in plain products, on any device: scores of all queries and keys stand in memory at once."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = jnp.einsum("BTKRE,BKSE->BKRTS", _grouped(q, k), k, preferred_element_type=jnp.float32)
    probs = _weights(scores, ranges, scale, softcap, bias)
    return jnp.einsum("BKRTS,BKSE->BTKRE", probs.astype(v.dtype), v).reshape(q.shape)


def attend_cached(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B K T E"],
    v: Float[Array, "B K T E"],
    cache: LayerCache,
    ranges: Ranges,
    index: Int[Array, ""],
    **look: Any,
) -> tuple[Float[Array, "B T H E"], LayerCache]:
    """Writes the new keys and values at `index`, and `attend`s over the cache; what stands in `look` is `attend`'s."""
    mesh = meshes.active()
    if q.shape[1] == 1 and meshes.platform() == "cpu" and (mesh is None or mesh.size == 1):
        return _step_in_place(q, k, v, cache, ranges, index, **look)
    cache = cache.write(k, v, index)
    return attend(q, cache.k, cache.v, ranges, **look), cache


def _step_in_place(
    q: Float[Array, "B 1 H E"],
    k: Float[Array, "B K 1 E"],
    v: Float[Array, "B K 1 E"],
    cache: LayerCache,
    ranges: Ranges,
    index: Int[Array, ""],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "H 1 S"] | None = None,
) -> tuple[Float[Array, "B 1 H E"], LayerCache]:
    """`attend_cached` for one query a row, which reads the cache before it writes it.

    So a donated cache is written where it lies. Written first, XLA on CPU (jax 0.10.2 to 0.12.0.1) copies, where there
    is one row, a layer's keys four times a step and its values once.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    one, k, v = _grouped(q, k)[:, 0], k.astype(cache.k.dtype), v.astype(cache.v.dtype)
    scores = jnp.einsum("BKRE,BKSE->BKRS", one, cache.k, preferred_element_type=jnp.float32)
    own = (one.astype(jnp.float32) * k.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    here = jnp.arange(cache.k.shape[2]) == index
    scores = jnp.where(here, own, scores)[:, :, :, None]
    probs = _weights(scores, ranges, scale, softcap, bias)[:, :, :, 0].astype(v.dtype)
    out = jnp.einsum("BKRS,BKSE->BKRE", jnp.where(here, 0, probs), cache.v)
    out += jnp.where(here, probs, 0).sum(axis=-1, keepdims=True) * v
    # Never above the index; but the compiler does not know, and so writes behind the reading.
    read = -jnp.isposinf(out.ravel()[0]).astype(index.dtype)
    return out.reshape(q.shape), cache.write(k, v, jnp.maximum(index, read))


def _grouped(q: Float[Array, "B T H E"], k: Float[Array, "B K S E"]) -> Float[Array, "B T K R E"]:
    """The queries of each head of keys."""
    batch, queries, heads, width = q.shape
    return q.reshape(batch, queries, k.shape[1], heads // k.shape[1], width)


def _weights(
    scores: Float[Array, "B K R T S"], ranges: Ranges, scale: float, softcap: float | None, bias: Array | None
) -> Float[Array, "B K R T S"]:
    """Products of queries and keys -> how much each query takes of each value."""
    scores = scores * scale
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32).reshape(*scores.shape[1:3], *bias.shape[1:])
    if ranges.kind != "full":
        seen = ranges.dense(scores.shape[-1])[:, None, None]
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1)
    if ranges.kind not in ("full", "causal"):
        probs = jnp.where((ranges.stop > ranges.start)[:, None, None, :, None], probs, 0.0)
    return probs


def soft_cap(x: Float[Array, "*B"], cap: float) -> Float[Array, "*B"]:
    """Scores bent smoothly into (-cap, cap), for attention and for the output head alike.

    Source: Gemma 2 (arXiv 2408.00118), section 2.
    """
    return cap * jnp.tanh(x / cap)


def split_heads(x: Float[Array, "B T F"], heads: int) -> Float[Array, "B T H E"]:
    """[B, T, H*E] -> [B, T, H, E]."""
    return x.reshape(*x.shape[:-1], heads, -1)


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads and an explicit cache.

    Self-attention, or cross-attention when `context` is given. The cache is a value: it comes in and goes out. With a
    `context`, what goes out are the context's keys and values; given back without an `index`, they are read as they
    stand, and the context is not needed again.
    `qk_norm`, a key of `norms.NORMS`, normalises each head's queries and keys. `scale`, `softcap` and `bias` are
    `attend`'s. `clip` cuts queries, keys and values to [-clip, clip]. With `alibi` scores fall with the distance
    between query and key (`positions.alibi`). `key_bias` False leaves keys without the bias that `qkv_bias` gives.
    `inner_norm` is the epsilon of a layer norm of all heads together, before the output product (EVA-02, arXiv
    2303.11331).
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    key_bias: bool = True
    inner_norm: float | None = None
    qk_norm: str | None = None
    qk_norm_eps: float = 1e-5
    scale: float | None = None
    softcap: float | None = None
    clip: float | None = None
    alibi: float | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        ranges: Ranges,
        *,
        rotate: Rotate | None = None,
        context: Float[Array, "B S F"] | None = None,
        cache: LayerCache | None = None,
        index: Int[Array, ""] | None = None,
        bias: Float[Array, "H T S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        project = functools.partial(linear, use_bias=self.qkv_bias, dtype=self.dtype)
        cut = (lambda x: x) if self.clip is None else (lambda x: jnp.clip(x, -self.clip, self.clip))
        norm = lambda name: lambda heads: heads  # noqa: E731
        if self.qk_norm:
            norm = functools.partial(NORMS[self.qk_norm], self.qk_norm_eps, self.dtype, axes=(None,))
        turn = rotate or (lambda heads: heads)
        q = split_heads(cut(project(self.heads * self.head_dim, ("embed", "heads"), name="q")(x)), self.heads)
        q = turn(norm(name="q_norm")(q))
        if cache is None or index is not None:
            wide = functools.partial(project, self.kv_heads * self.head_dim, ("embed", "kv_heads"))
            source = x if context is None else context
            k = cut(wide(use_bias=self.qkv_bias and self.key_bias, name="k")(source))
            k, v = split_heads(k, self.kv_heads), split_heads(cut(wide(name="v")(source)), self.kv_heads)
            k, v = turn(norm(name="k_norm")(k)).swapaxes(1, 2), v.swapaxes(1, 2)
            if context is not None:
                cache = LayerCache(k, v)
        keys = x.shape[1] if cache is None else cache.k.shape[-2]
        if self.alibi is not None:
            slots = jnp.arange(x.shape[1]) + (0 if cache is None else index)
            bias = positions.alibi(slots, keys, self.heads, self.alibi)
        look = {"scale": self.scale, "softcap": self.softcap, "bias": bias}
        if cache is None:
            out = attend(q, k, v, ranges, **look)
        elif index is None or context is not None:
            out = attend(q, cache.k, cache.v, ranges, **look)
        else:
            out, cache = attend_cached(q, k, v, cache, ranges, index, **look)
        out = out.reshape(*x.shape[:-1], self.heads * self.head_dim)
        if self.inner_norm is not None:
            out = LayerNorm(self.inner_norm, self.dtype, axes=("heads",), name="norm")(out)
        out = linear(x.shape[-1], ("heads", "embed"), use_bias=self.out_bias, dtype=self.dtype, name="o")(out)
        return out, cache
