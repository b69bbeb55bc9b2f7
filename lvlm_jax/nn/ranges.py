"""Attention patterns as key ranges: the first key a query sees and one past the last.

A range is two integers a query, so a pattern costs O(T) where a dense mask costs O(T S), and packed, causal, prefix-LM,
padded and bidirectional attention are one thing. An empty range (start == stop) gives zeros.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from lvlm_jax.shapes import Array, Bool, Int, pytree

Kind = Literal["full", "causal", "packed_causal", "general"]

KEPT = "attention"
"""Name of what attention gives, by which a remat policy keeps it (`stack.REMAT`)."""


@pytree
@dataclasses.dataclass(frozen=True)
class Ranges:
    """Query t sees the keys start[b, t] <= s < stop[b, t].

    `kind` is static and says how they were made, so that a backend may take a shortcut that is right for that kind.
    `whole` is the first key that no window cuts off: where a query's prefix begins, the query itself behind it; None
    where windows cut all alike.
    """

    start: Int[Array, "B T"]
    stop: Int[Array, "B T"]
    kind: Kind = dataclasses.field(default="general", metadata={"static": True})
    whole: Int[Array, "B T"] | None = None

    def dense(self, keys: int) -> Bool[Array, "B T S"]:
        """The mask these ranges stand for."""
        s = jnp.arange(keys)
        return (s >= self.start[..., None]) & (s < self.stop[..., None])

    def general(self) -> "Ranges":
        """The same ranges without the note of how they were made."""
        return Ranges(self.start, self.stop)


def full(batch: int, queries: int, keys: int) -> Ranges:
    """Every query sees every key."""
    zeros = jnp.zeros((batch, queries), jnp.int32)
    return Ranges(zeros, zeros + keys, kind="full")


def shown(segments: Int[Array, "B S"]) -> Ranges:
    """One query a row sees the keys from the first to the last that is no padding (0), all of them where all is.

    A row of padding alone is in no loss, but its numbers must stay finite: an empty range would leave nothing to scale.
    """
    keys = segments.shape[1]
    real = segments > 0
    first, last = jnp.argmax(real, axis=1), keys - jnp.argmax(real[:, ::-1], axis=1)
    some = real.any(axis=1)
    start, stop = jnp.where(some, first, 0), jnp.where(some, last, keys)
    return Ranges(start[:, None].astype(jnp.int32), stop[:, None].astype(jnp.int32))


def causal(batch: int, length: int) -> Ranges:
    """Every query sees itself and all before."""
    stop = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), (batch, length))
    return Ranges(jnp.zeros_like(stop), stop, kind="causal")


def _borders(*ids: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """First position of the run each position is in, and one past its last. A run ends where any of the ids changes."""
    t = jnp.arange(ids[0].shape[1], dtype=jnp.int32)
    change = functools.reduce(jnp.logical_or, [x[:, 1:] != x[:, :-1] for x in ids])
    new = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(new, t, 0), axis=1)
    last = jnp.pad(new[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    stop = jax.lax.cummin(jnp.where(last, t + 1, ids[0].shape[1]), axis=1, reverse=True)
    return first, stop


def _hide_padding(segments: Array, start: Array, stop: Array, kind: Kind) -> Ranges:
    shown = segments > 0
    return Ranges(jnp.where(shown, start, 0), jnp.where(shown, stop, 0), kind=kind)


def packed_full(segments: Int[Array, "B T"]) -> Ranges:
    """Every position sees its whole segment; padding (0) sees nothing."""
    return packed_runs(segments)


def packed_runs(segments: Int[Array, "B T"], *ids: Int[Array, "B T"]) -> Ranges:
    """Every position sees the neighbours that have its segment and all its ids; padding (0) sees nothing.

    Windows of a picture are such runs where its patches stand window by window: the ids are a patch's window, by row
    and by column.
    """
    return _hide_padding(segments, *_borders(segments, *ids), "general")


def choose(options: Sequence[Ranges], which: int | Int[Array, ""]) -> Ranges:
    """One of several patterns: by its number where layers run one by one, by selection where they are traced as one."""
    if isinstance(which, int):
        return options[which]
    same = [option.general() for option in options]
    return jax.tree.map(lambda *leaves: jax.lax.select_n(which, *leaves), *same)


def packed_causal(segments: Int[Array, "B T"]) -> Ranges:
    """Causal within each segment; padding (0) sees nothing."""
    first, _ = _borders(segments)
    stop = jnp.broadcast_to(jnp.arange(1, segments.shape[1] + 1, dtype=jnp.int32), segments.shape)
    return _hide_padding(segments, first, stop, "packed_causal")


def packed_cross(segments: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Ranges:
    """Cross-attention of packed rows: every query sees the keys of its own segment; padding (0) sees nothing.

    Args:
      segments: of the queries.
      keys: of what they look at; each segment's positions stand side by side.
    """
    same = segments[:, :, None] == keys[:, None, :]
    start = jnp.argmax(same, axis=-1).astype(jnp.int32)
    return _hide_padding(segments, start, start + same.sum(-1, dtype=jnp.int32), "general")


def packed_prefix(segments: Int[Array, "B T"], prefix: Bool[Array, "B T"]) -> Ranges:
    """Prefix-LM within each segment: the prefix sees itself whole, what follows is causal.

    No window cuts the prefix (PaliGemma 2 in the torch library).

    Args:
      prefix: True on the leading positions of each segment that attend to one another.
    """
    ranges = packed_blocks(segments, prefix.astype(jnp.int32))
    first, _ = _borders(segments)
    own = jnp.arange(segments.shape[1], dtype=jnp.int32)
    return dataclasses.replace(ranges, whole=jnp.where(prefix, first, own))


def packed_blocks(segments: Int[Array, "B T"], blocks: Int[Array, "B T"]) -> Ranges:
    """Causal within each segment, save that each block sees itself whole: Gemma 3's pictures amid text.

    A window cuts blocks as it cuts all else (Gemma 3 in the torch library; its pictures are shorter than its windows).

    Args:
      blocks: 0 for what is causal; neighbours of one segment with the same number above 0 are a block.
    """
    first, _ = _borders(segments)
    here = jnp.arange(1, segments.shape[1] + 1, dtype=jnp.int32)
    _, block_stop = _borders(segments, blocks)
    return _hide_padding(segments, first, jnp.where(blocks > 0, block_stop, here), "general")


def sliding(ranges: Ranges, window: int, first: Int[Array, ""] | int = 0) -> Ranges:
    """The same ranges cut so that no query sees further back than `window` keys, itself the last of them.

    What `Ranges.whole` keeps is not cut.

    Args:
      first: the key slot of the first query: 0 for whole rows, the cache's write index when decoding.
    """
    own = first + jnp.arange(ranges.start.shape[1], dtype=jnp.int32)
    near = own - window + 1 if ranges.whole is None else jnp.minimum(own - window + 1, ranges.whole)
    start = jnp.minimum(jnp.maximum(ranges.start, near), ranges.stop)
    return Ranges(start.astype(jnp.int32), ranges.stop)


def media(
    segments: Int[Array, "B T"], pictures: Int[Array, "B T"], tokens: int, scope: Literal["last", "all"]
) -> Ranges:
    """Text looks at visual tokens that stand apart: those of the last picture before it, or of all before it.

    "Before" takes in the position where the picture stands, and ends where the segment does. What stands before the
    first picture sees nothing, as padding does.

    Args:
      pictures: number of the picture that stands at a position, -1 where none does. For "all", pictures of a segment
        must be numbered one after the other.
      tokens: keys of each picture; picture n has the keys n*tokens ... (n+1)*tokens-1.

    Source: Flamingo (arXiv 2204.14198), section 3.1.3, "last"; flamingo-pytorch has both.
    """
    t = jnp.arange(segments.shape[1], dtype=jnp.int32)
    first, _ = _borders(segments)
    there = pictures >= 0
    last = jax.lax.cummax(jnp.where(there, t, -1), axis=1)
    at = last if scope == "last" else jnp.take_along_axis(_next(there), first, axis=1)
    number = lambda at: jnp.take_along_axis(pictures, jnp.clip(at, 0, len(t) - 1), axis=1)  # noqa: E731
    start, stop = number(at) * tokens, (number(last) + 1) * tokens
    seen = (last >= first) & (segments > 0)
    return Ranges(jnp.where(seen, start, 0).astype(jnp.int32), jnp.where(seen, stop, 0).astype(jnp.int32))


def _next(there: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The nearest position from each on where `there` is True, T where none follows."""
    t = jnp.arange(there.shape[1], dtype=jnp.int32)
    return jax.lax.cummin(jnp.where(there, t, len(t)), axis=1, reverse=True)


def cached(start: Int[Array, "B"], stop: Int[Array, ""], queries: int = 1) -> Ranges:
    """Decoding: `queries` new positions, the last of which sees the cache up to `stop` (exclusive), causally.

    Args:
      start: first real position of each row (the rows are padded on the left).
      stop: one past the newest position in the cache.
    """
    ends = stop - queries + 1 + jnp.arange(queries, dtype=jnp.int32)
    ends = jnp.broadcast_to(ends, (start.shape[0], queries)).astype(jnp.int32)
    return Ranges(jnp.minimum(start[:, None], ends), ends, kind="general")


def queries_apart(segments: Int[Array, "B T"], queries: int) -> Ranges:
    """Learned queries, then a text: neither sees the other (a Q-Former's uni-modal mask, for its contrastive loss).

    Args:
      segments: 0 where the text is padding, which stands at its end: queries and text are then one range of keys.
      queries: how many stand before the text; 0 for a text alone.
    """
    return packed_full(_behind(segments, queries, 2))


def queries_together(segments: Int[Array, "B T"], queries: int) -> Ranges:
    """Learned queries and a text that all see one another (a Q-Former's bidirectional mask, for matching).

    Arguments as `queries_apart`'s.
    """
    return packed_full(_behind(segments, queries, 1))


def queries_causal(segments: Int[Array, "B T"], queries: int) -> Ranges:
    """Learned queries that see one another, then a text that sees them and itself causally: a prefix-LM.

    A Q-Former's multimodal causal mask, for its generating loss. Arguments as `queries_apart`'s.
    """
    whole = _behind(segments, queries, 1)
    return packed_prefix(whole, jnp.broadcast_to(jnp.arange(whole.shape[1]) < queries, whole.shape))


def _behind(segments: Int[Array, "B T"], queries: int, text: int) -> Int[Array, "B S"]:
    """Segments of queries (1) and of the text behind them (`text`)."""
    return jnp.pad(jnp.where(segments > 0, text, 0), ((0, 0), (queries, 0)), constant_values=1)
