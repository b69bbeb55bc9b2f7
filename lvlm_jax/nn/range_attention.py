"""Attention over key ranges as a Pallas kernel for TPUs: forward and backward linear in memory.

Pure, and importable alone: queries, keys, values and two integer arrays that say which keys each query sees. Blocks of
keys that no query of a block sees are not read. No library kernel covers this on TPUs: packed rows whose pictures see
themselves whole, and prefixes of varying length, are neither causal within segments nor known before the batch is.

Scores stand transposed, keys along rows and queries along columns, so that a range, a maximum and a sum of a query are
rows of numbers and need no 128-fold copies; the accumulators are transposed back once, outside. Source of the method:
FlashAttention-2 (arXiv 2307.08691).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lvlm_jax.nn.ranges import KEPT
from lvlm_jax.shapes import Array, Float, Int

LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
LEAST = 128
"""Lanes of a TPU: block sizes and padded lengths are multiples of it."""


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    softcap: float | None
    block_q: int
    block_k: int
    interpret: bool


def range_attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B K S E"],
    v: Float[Array, "B K S E"],
    start: Int[Array, "B T"],
    stop: Int[Array, "B T"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    block_q: int = 512,
    block_k: int = 512,
    interpret: bool = False,
) -> Float[Array, "B T H E"]:
    """Softmax attention of query t over the keys start[t] <= s < stop[t]; an empty range gives zeros.

    Grouped heads: H is a multiple of K, and query head h reads key head h // (H / K). Scores are float32.

    Args:
      scale: what scores are multiplied by; default 1/sqrt(E).
      softcap: bound of the scaled scores, c * tanh(s / c).
      block_q, block_k: about how many queries and keys are worked on at a time.
      interpret: run without a TPU, slowly, for tests.
    """
    length, keys, width = q.shape[1], k.shape[2], q.shape[3]
    block_q, block_k = _block(length, block_q), _block(keys, block_k)
    options = _Options(1 / math.sqrt(width) if scale is None else scale, softcap, block_q, block_k, interpret)
    more_q, more_k = -length % block_q, -keys % block_k
    heads_first = jnp.pad(q.swapaxes(1, 2), ((0, 0), (0, 0), (0, more_q), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more_k), (0, 0))) for x in (k, v))
    start, stop = (jnp.pad(x, ((0, 0), (0, more_q))) for x in (start, jnp.minimum(stop, keys)))  # padding sees nothing
    out = _attend(options, heads_first, k, v, start, stop)
    return out[:, :, :length].swapaxes(1, 2)


def _block(length: int, wanted: int) -> int:
    """A block near the wanted one with little padding behind the last: 577 positions are one block of 640."""
    count = max(1, round(length / wanted))
    return -(-length // (count * LEAST)) * LEAST


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, q: Any, k: Any, v: Any, start: Any, stop: Any) -> Any:
    return _forward(options, q, k, v, start, stop)[0]


class _ByQueries:
    """Grid and blocks of a kernel in which each block of queries walks over the blocks of keys that it sees.

    Behind the last of them the block stays, so that nothing more is read.
    """

    def __init__(self, options: _Options, q: tuple, k: tuple, start: Any, stop: Any) -> None:
        batch, heads, length, width = q
        block_q, block_k, group = options.block_q, options.block_k, heads // k[1]
        self.grid = (batch, heads, length // block_q, k[2] // block_k)
        self.blocks = _key_blocks(start, stop, block_q, block_k)

        def key(b, i, j, low, high):
            return jnp.minimum(low[b, i] + j, jnp.maximum(high[b, i] - 1, low[b, i]))

        spec = pl.BlockSpec
        self.ends = spec((None, 1, block_q), lambda b, h, i, j, *_: (b, 0, i))
        self.row = spec((None, None, 1, block_q), lambda b, h, i, j, *_: (b, h, 0, i))
        self.queries = spec((None, None, block_q, width), lambda b, h, i, j, *_: (b, h, i, 0))
        self.queries_turned = spec((None, None, width, block_q), lambda b, h, i, j, *_: (b, h, 0, i))
        self.keys = spec((None, None, block_k, width), lambda b, h, i, j, *at: (b, h // group, key(b, i, j, *at), 0))
        self.keys_turned = spec(
            (None, None, width, block_k), lambda b, h, i, j, *at: (b, h // group, 0, key(b, i, j, *at))
        )


def _forward(options: _Options, q: Any, k: Any, v: Any, start: Any, stop: Any) -> tuple:
    batch, heads, length, width = q.shape
    at = _ByQueries(options, q.shape, k.shape, start, stop)
    out, mass = pl.pallas_call(
        functools.partial(_forward_kernel, options, at.grid[-1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=at.grid,
            in_specs=[at.ends, at.ends, at.queries, at.keys, at.keys_turned],
            out_specs=[at.queries_turned, at.row],
            scratch_shapes=[pltpu.VMEM((rows, options.block_q), jnp.float32) for rows in (1, 1, width)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, width, length), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        interpret=options.interpret,
        name="range_attention_forward",
        compiler_params=_parallel(3),
    )(*at.blocks, start[:, None], stop[:, None], q, k, v.swapaxes(2, 3))
    return out.swapaxes(2, 3), mass


def _forward_kernel(options, steps, low, high, start, stop, q, k, v, out, mass, top, total, sums):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(low[b, i] + j < high[b, i])
    def _():
        scores, seen = _scores(options, q[...], k[...], start[...], stop[...], low[b, i] + j)
        scores = jnp.where(seen, scores, LOWEST)
        new = jnp.maximum(top[...], scores.max(0, keepdims=True))
        shrink = jnp.exp(top[...] - new)
        probs = jnp.where(seen, jnp.exp(scores - new), 0.0)
        top[...] = new
        total[...] = shrink * total[...] + probs.sum(0, keepdims=True)
        sums[...] = shrink * sums[...] + _dot(v[...], probs.astype(v.dtype))

    @pl.when(j == steps - 1)
    def _():
        some = total[...] > 0
        divisor = jnp.where(some, total[...], 1.0)
        out[...] = (sums[...] / divisor).astype(out.dtype)
        mass[...] = jnp.where(some, top[...] + jnp.log(divisor), 0.0)


def _scores(options, q, k, start, stop, block):
    """([keys, queries] scaled scores, which of them are seen)."""
    scores = _dot(k, q, turned=True) * options.scale
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    at = block * options.block_k + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return scores, (at >= start) & (at < stop)


def _dot(a: Any, b: Any, turned: bool = False) -> Any:
    """a @ b, or a @ b.T, in float32."""
    dims = (((1,), (1 if turned else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, precision=precision)


def _rule_forward(options, q, k, v, start, stop):
    # Both: without the mass the backward pass would run the whole forward kernel for it.
    out, mass = (checkpoint_name(x, KEPT) for x in _forward(options, q, k, v, start, stop))
    return out, (q, k, v, start, stop, out, mass)


def _rule_backward(options, kept, slope):
    q, k, v, start, stop, out, mass = kept
    own = (out.astype(jnp.float32) * slope.astype(jnp.float32)).sum(-1)[:, :, None]
    of_q = _backward_queries(options, q, k, v, start, stop, slope, mass, own)
    of_k, of_v = _backward_keys(options, q, k, v, start, stop, slope, mass, own)
    return of_q, of_k, of_v, None, None


_attend.defvjp(_rule_forward, _rule_backward)


def _backward_queries(options, q, k, v, start, stop, slope, mass, own):
    """The gradient of the queries: each block of them walks over the keys that it sees."""
    batch, heads, length, width = q.shape
    at = _ByQueries(options, q.shape, k.shape, start, stop)
    out = pl.pallas_call(
        functools.partial(_queries_kernel, options, at.grid[-1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=at.grid,
            in_specs=[at.ends, at.ends, at.queries, at.keys, at.keys_turned, at.keys, at.queries, at.row, at.row],
            out_specs=at.queries_turned,
            scratch_shapes=[pltpu.VMEM((width, options.block_q), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, width, length), q.dtype),
        interpret=options.interpret,
        name="range_attention_backward_queries",
        compiler_params=_parallel(3),
    )(*at.blocks, start[:, None], stop[:, None], q, k, k.swapaxes(2, 3), v, slope, mass, own)
    return out.swapaxes(2, 3)


def _queries_kernel(options, steps, low, high, start, stop, q, k, k_turned, v, slope, mass, own, out, sums):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(low[b, i] + j < high[b, i])
    def _():
        _, slopes = _slopes(options, q, k, v, start, stop, low[b, i] + j, slope, mass, own)
        sums[...] += _dot(k_turned[...], slopes.astype(k_turned.dtype))

    @pl.when(j == steps - 1)
    def _():
        out[...] = sums[...].astype(out.dtype)


def _slopes(options, q, k, v, start, stop, block, slope, mass, own):
    """([keys, queries] probabilities, the gradient of the unscaled scores)."""
    scores, seen = _scores(options, q[...], k[...], start[...], stop[...], block)
    probs = jnp.where(seen, jnp.exp(jnp.where(seen, scores - mass[...], 0.0)), 0.0)
    slopes = probs * (_dot(v[...], slope[...], turned=True) - own[...])
    if options.softcap is not None:
        slopes *= 1 - (scores / options.softcap) ** 2
    return probs, slopes * options.scale


def _backward_keys(options, q, k, v, start, stop, slope, mass, own):
    """The gradients of keys and values: each block of them walks over the queries of all heads that read it."""
    batch, heads, length, width = q.shape
    block_q, block_k = options.block_q, options.block_k
    kv_heads = k.shape[1]
    group, blocks = heads // kv_heads, length // block_q
    low, high = _key_blocks(start, stop, block_q, block_k)
    first, last = _query_blocks(low, high, k.shape[2] // block_k)

    def at(b, h, i, j, low, high, first, last):
        """(query head, block of queries) of step j; behind the last block the block stays, so that nothing is read."""
        return h * group + j // blocks, jnp.clip(j % blocks, first[b, i], jnp.maximum(last[b, i] - 1, first[b, i]))

    def query_block(b, h, i, j, *prefetched):
        head, block = at(b, h, i, j, *prefetched)
        return b, head, block, 0

    def query_row(b, h, i, j, *prefetched):
        head, block = at(b, h, i, j, *prefetched)
        return b, head, 0, block

    def query_ends(b, h, i, j, *prefetched):
        return b, 0, at(b, h, i, j, *prefetched)[1]

    keys = pl.BlockSpec((None, None, block_k, width), lambda b, h, i, j, *_: (b, h, i, 0))
    queries = pl.BlockSpec((None, None, block_q, width), query_block)
    row, ends = pl.BlockSpec((None, None, 1, block_q), query_row), pl.BlockSpec((None, 1, block_q), query_ends)
    return pl.pallas_call(
        functools.partial(_keys_kernel, options, group * blocks, blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, kv_heads, k.shape[2] // block_k, group * blocks),
            in_specs=[ends, ends, queries, keys, keys, queries, row, row],
            out_specs=[keys, keys],
            scratch_shapes=[pltpu.VMEM((block_k, width), jnp.float32) for _ in range(2)],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        interpret=options.interpret,
        name="range_attention_backward_keys",
        compiler_params=_parallel(3),
    )(low, high, first, last, start[:, None], stop[:, None], q, k, v, slope, mass, own)


def _keys_kernel(
    options, steps, blocks, low, high, first, last, start, stop, q, k, v, slope, mass, own, of_k, of_v, sums_k, sums_v
):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    block = j % blocks

    @pl.when(j == 0)
    def _():
        sums_k[...] = jnp.zeros_like(sums_k)
        sums_v[...] = jnp.zeros_like(sums_v)

    @pl.when((low[b, block] <= i) & (i < high[b, block]))
    def _():
        probs, slopes = _slopes(options, q, k, v, start, stop, i, slope, mass, own)
        sums_v[...] += _dot(probs.astype(slope.dtype), slope[...])
        sums_k[...] += _dot(slopes.astype(q.dtype), q[...])

    @pl.when(j == steps - 1)
    def _():
        of_k[...] = sums_k[...].astype(of_k.dtype)
        of_v[...] = sums_v[...].astype(of_v.dtype)


def _key_blocks(start: Any, stop: Any, block_q: int, block_k: int) -> tuple[Any, Any]:
    """First block of keys that a block of queries sees and one past the last, [B, T / block_q]; equal where none."""
    start, stop = (x.reshape(x.shape[0], -1, block_q) for x in (start, stop))
    some = stop > start
    low = jnp.where(some, start, jnp.iinfo(jnp.int32).max).min(-1) // block_k
    high = -(-jnp.where(some, stop, 0).max(-1) // block_k)
    return jnp.where(some.any(-1), low, 0).astype(jnp.int32), high.astype(jnp.int32)


def _query_blocks(low: Any, high: Any, count: int) -> tuple[Any, Any]:
    """First block of queries that sees a block of keys and one past the last, [B, count]."""
    block = jnp.arange(count)[None, :, None]
    sees = (low[:, None] <= block) & (block < high[:, None])
    index = jnp.arange(low.shape[1])
    first = jnp.where(sees, index, low.shape[1]).min(-1)
    last = jnp.where(sees, index + 1, 0).max(-1)
    return jnp.where(last > 0, first, 0).astype(jnp.int32), last.astype(jnp.int32)


def _parallel(axes: int) -> Any:
    """All axes of the grid but the last may run in any order."""
    return pltpu.CompilerParams(dimension_semantics=("parallel",) * axes + ("arbitrary",))
