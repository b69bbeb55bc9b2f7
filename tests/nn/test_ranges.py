"""Every attention pattern against its meaning, written as loops over positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as meshes
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.attention import attend

# Packed, padded at both ends and inside, one segment alone, all padding.
SEGMENTS = np.array(
    [
        [1, 1, 1, 2, 2, 2, 2, 3, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 2, 2, 0, 0, 3, 3, 3],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    np.int32,
)


def loops(rule, segments=SEGMENTS):
    """Mask [B, T, S]: what `rule(row, query, key)` says wherever both are real and of one segment."""
    rows, length = segments.shape
    mask = np.zeros((rows, length, length), bool)
    for b in range(rows):
        for t in range(length):
            for s in range(length):
                real = segments[b, t] > 0 and segments[b, t] == segments[b, s]
                mask[b, t, s] = real and rule(b, t, s)
    return mask


def test_full_and_causal():
    assert R.full(2, 3, 5).dense(5).all()
    assert R.full(2, 3, 5).dense(5).shape == (2, 3, 5)
    np.testing.assert_array_equal(R.causal(2, 4).dense(4)[1], np.tril(np.ones((4, 4), bool)))


def test_packed_full():
    mask = R.packed_full(jnp.asarray(SEGMENTS)).dense(10)
    np.testing.assert_array_equal(mask, loops(lambda b, t, s: True))


def test_packed_causal():
    mask = R.packed_causal(jnp.asarray(SEGMENTS)).dense(10)
    np.testing.assert_array_equal(mask, loops(lambda b, t, s: s <= t))


@pytest.mark.parametrize("seed", range(5))
def test_packed_prefix(seed):
    rng = np.random.default_rng(seed)
    prefix = np.zeros(SEGMENTS.shape, bool)
    for b, row in enumerate(SEGMENTS):
        for segment in set(row) - {0}:
            at = np.flatnonzero(row == segment)
            prefix[b, at[: rng.integers(0, len(at) + 1)]] = True
    mask = R.packed_prefix(jnp.asarray(SEGMENTS), jnp.asarray(prefix)).dense(10)
    np.testing.assert_array_equal(mask, loops(lambda b, t, s: s <= t or (prefix[b, t] and prefix[b, s])))


@pytest.mark.parametrize("seed", range(5))
def test_packed_blocks(seed):
    """Pictures amid text; two may stand side by side, and a number may be used again in another segment."""
    rng = np.random.default_rng(seed)
    blocks = np.repeat(rng.integers(0, 3, (len(SEGMENTS), 5)), 2, axis=1)
    runs = np.cumsum(np.pad(blocks[:, 1:] != blocks[:, :-1], ((0, 0), (1, 0))), axis=1)
    mask = R.packed_blocks(jnp.asarray(SEGMENTS), jnp.asarray(blocks, jnp.int32)).dense(10)
    together = lambda b, t, s: blocks[b, t] > 0 and runs[b, t] == runs[b, s]  # noqa: E731
    np.testing.assert_array_equal(mask, loops(lambda b, t, s: s <= t or together(b, t, s)))


@pytest.mark.parametrize("queries", [0, 3])
def test_learned_queries_before_a_text(queries):
    """A Q-Former's three masks, and a text alone; texts of 4, 2 and 0 words."""
    text = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], np.int32)
    whole = np.pad(text, ((0, 0), (queries, 0)), constant_values=1)
    first = lambda t: t < queries  # noqa: E731
    rules = {
        R.queries_apart: lambda b, t, s: first(t) == first(s),
        R.queries_together: lambda b, t, s: True,
        R.queries_causal: lambda b, t, s: first(s) or (not first(t) and s <= t),
    }
    masks = jax.jit(lambda text: [pattern(text, queries).dense(queries + 4) for pattern in rules])(jnp.asarray(text))
    for mask, (pattern, rule) in zip(masks, rules.items()):
        np.testing.assert_array_equal(mask, loops(rule, whole), err_msg=pattern.__name__)


@pytest.mark.parametrize("window", [1, 3, 10, 50])
def test_sliding(window):
    segments = jnp.asarray(SEGMENTS)
    blocks = np.tile([0, 1, 1, 1, 1, 0, 2, 2, 2, 0], (len(SEGMENTS), 1))
    near = lambda t, s: s > t - window  # noqa: E731
    mask = R.sliding(R.packed_causal(segments), window).dense(10)
    np.testing.assert_array_equal(mask, loops(lambda b, t, s: s <= t and near(t, s)))
    cut = R.packed_blocks(segments, jnp.asarray(blocks, jnp.int32))
    together = lambda b, t, s: blocks[b, t] > 0 and blocks[b, t] == blocks[b, s]  # noqa: E731
    mask = R.sliding(cut, window).dense(10)
    np.testing.assert_array_equal(mask, loops(lambda b, t, s: (s <= t or together(b, t, s)) and near(t, s)))
    assert (R.sliding(cut, window).start <= R.sliding(cut, window).stop).all()


@pytest.mark.parametrize("window", [1, 3, 10, 50])
def test_sliding_leaves_a_prefix_whole(window):
    prefix = np.zeros(SEGMENTS.shape, bool)
    for b, row in enumerate(SEGMENTS):
        for segment in set(row) - {0}:
            at = np.flatnonzero(row == segment)
            prefix[b, at[: len(at) // 2 + b % 2]] = True
    kept = R.sliding(R.packed_prefix(jnp.asarray(SEGMENTS), jnp.asarray(prefix)), window)
    expected = loops(lambda b, t, s: (s <= t and s > t - window) or (prefix[b, t] and prefix[b, s]))
    np.testing.assert_array_equal(kept.dense(10), expected)


def test_packed_cross():
    """Each segment's queries see its keys; a segment without keys, and padding, see nothing."""
    queries = np.array([[1, 1, 2, 3, 3, 0], [2, 1, 1, 1, 4, 0], [0, 0, 0, 0, 0, 0]], np.int32)
    keys = np.array([[1, 2, 2, 2, 3, 0, 0], [0, 0, 1, 2, 2, 3, 3], [1, 1, 1, 0, 0, 0, 0]], np.int32)
    mask = np.asarray(R.packed_cross(jnp.asarray(queries), jnp.asarray(keys)).dense(7))
    wanted = (queries[:, :, None] == keys[:, None, :]) & (queries > 0)[:, :, None]
    np.testing.assert_array_equal(mask, wanted)


@pytest.mark.parametrize("window", [2, 4, 50])
def test_sliding_over_a_cache(window):
    """Three new queries at slots 5, 6 and 7 of a cache of ten; the last row begins at slot 6."""
    start = np.array([0, 2, 6], np.int32)
    ranges = R.sliding(R.cached(jnp.asarray(start), jnp.int32(8), 3), window, jnp.int32(5))
    mask = np.asarray(ranges.dense(10))
    for b, q in np.ndindex(3, 3):
        own = 5 + q
        assert mask[b, q].tolist() == [start[b] <= s <= own and s > own - window for s in range(10)]


@pytest.mark.parametrize("queries", [1, 3])
def test_cached(queries):
    start, stop = np.array([0, 2, 6], np.int32), 7
    mask = np.asarray(R.cached(jnp.asarray(start), jnp.int32(stop), queries).dense(10))
    for b in range(3):
        for q in range(queries):
            newest = stop - queries + q
            assert mask[b, q].tolist() == [start[b] <= s <= newest for s in range(10)]


def softmax_loops(q, k, v, mask, bias=None):
    """Attention of each query on its own, in float64; a query that sees nothing gives zeros."""
    bias = np.zeros((q.shape[2], q.shape[1], k.shape[2])) if bias is None else bias
    out = np.zeros(q.shape, np.float64)
    per = q.shape[2] // k.shape[1]
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        if len(seen):
            scores = k[b, h // per, seen].astype(np.float64) @ q[b, t, h] / np.sqrt(q.shape[-1])
            scores = scores + bias[h, t, seen]
            weights = np.exp(scores - scores.max())
            out[b, t, h] = (weights / weights.sum()) @ v[b, h // per, seen]
    return out


def test_attend_with_a_scale_and_a_cap():
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 6, 1, 8)).astype(np.float32) * 3
    scores = 2.0 * np.tanh(0.5 * q[0, :, 0].astype(np.float64) @ k[0, :, 0].T / 2.0)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    heads_first = lambda x: jnp.asarray(x.swapaxes(1, 2))  # noqa: E731
    out = attend(jnp.asarray(q), heads_first(k), heads_first(v), R.full(1, 6, 6), scale=0.5, softcap=2.0)
    np.testing.assert_allclose(out[0, :, 0], weights @ v[0, :, 0], atol=2e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend(kv_heads):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(5, 10, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 5, kv_heads, 10, 8)).astype(np.float32)
    patterns = {
        "full": R.full(5, 10, 10),
        "causal": R.causal(5, 10),
        "packed causal": R.packed_causal(jnp.asarray(SEGMENTS)),
        "packed full": R.packed_full(jnp.asarray(SEGMENTS)),
    }
    for name, ranges in patterns.items():
        expected = softmax_loops(q, k, v, np.asarray(ranges.dense(10)))
        out = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), ranges)
        np.testing.assert_allclose(out, expected, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_attend_with_a_bias(monkeypatch, platform):
    """On TPUs too, whose kernel knows none."""
    monkeypatch.setattr(meshes, "platform", lambda: platform)
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 130, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 2, 130, 8)).astype(np.float32)
    bias = rng.normal(size=(4, 130, 130)).astype(np.float32)
    ranges = R.packed_causal(jnp.asarray([[1] * 50 + [2] * 75 + [0] * 5]))
    out = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), ranges, bias=jnp.asarray(bias))
    np.testing.assert_allclose(out, softmax_loops(q, k, v, np.asarray(ranges.dense(130)), bias), atol=2e-6)


def test_a_query_that_sees_nothing_gives_zeros():
    ones = jnp.ones((1, 3, 1, 4))
    ranges = R.packed_causal(jnp.asarray([[0, 1, 1]], jnp.int32))
    out = attend(ones, jnp.ones((1, 1, 3, 4)), jnp.ones((1, 1, 3, 4)), ranges)
    assert (out[0, 0] == 0).all()
    assert (out[0, 1:] == 1).all()
