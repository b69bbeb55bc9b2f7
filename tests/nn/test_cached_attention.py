"""A step of decoding: reading the cache before it is written gives what reading it afterwards gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as meshes
from lvlm_jax.nn import positions
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.attention import attend_cached, plain_attend
from lvlm_jax.nn.cache import LayerCache

SLOTS, HEADS, WIDTH = 12, 4, 8

RANGES = {
    "from the start": R.cached(jnp.asarray([0, 3, 6]), jnp.int32(7)),
    "a window": R.sliding(R.cached(jnp.asarray([0, 3, 6]), jnp.int32(7)), 4, jnp.int32(6)),
    "own key unseen": R.Ranges(jnp.asarray([[0], [2], [1]]), jnp.asarray([[6], [5], [3]])),
    "nothing": R.Ranges(jnp.asarray([[0], [2], [6]]), jnp.asarray([[0], [2], [6]])),
    "all slots": R.full(3, 1, SLOTS),
}
LOOKS = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 2.0},
    "alibi": {"bias": positions.alibi(jnp.asarray([6]), SLOTS, HEADS, 8.0)},
}


def draw(groups, queries=1, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    cast = functools.partial(jnp.asarray, dtype=dtype)
    q = cast(rng.standard_normal((3, queries, HEADS, WIDTH)))
    k, v = (cast(rng.standard_normal((3, groups, queries, WIDTH))) for _ in range(2))
    cache = LayerCache(*(cast(rng.standard_normal((3, groups, SLOTS, WIDTH))) for _ in range(2)))
    return q, k, v, cache


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_read_before_written(groups, ranges, look):
    q, k, v, cache = draw(groups)
    index = jnp.int32(6)
    written = cache.write(k, v, index)
    expected = plain_attend(q, written.k, written.v, RANGES[ranges], **LOOKS[look])
    got, after = jax.jit(functools.partial(attend_cached, **LOOKS[look]))(q, k, v, cache, RANGES[ranges], index)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after, written)


def test_in_bfloat16():
    q, k, v, cache = draw(2, dtype=jnp.bfloat16)
    written = cache.write(k, v, jnp.int32(6))
    expected = plain_attend(q, written.k, written.v, RANGES["from the start"])
    got, after = attend_cached(q, k, v, cache, RANGES["from the start"], jnp.int32(6))
    assert got.dtype == after.k.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=2e-2)


def test_several_queries_and_several_devices_are_written_first():
    q, k, v, cache = draw(2, queries=3)
    ranges = R.cached(jnp.asarray([0, 3, 6]), jnp.int32(9), 3)
    written = cache.write(k, v, jnp.int32(6))
    got, after = attend_cached(q, k, v, cache, ranges, jnp.int32(6))
    np.testing.assert_array_equal(got, plain_attend(q, written.k, written.v, ranges))
    jax.tree.map(np.testing.assert_array_equal, after, written)
    q, k, v, cache = draw(2)
    one, written = RANGES["from the start"], cache.write(k, v, jnp.int32(6))
    with meshes.use(meshes.make_mesh("DP", devices=jax.devices()[:2])):
        got, _ = attend_cached(q, k, v, cache, one, jnp.int32(6))
    np.testing.assert_array_equal(got, plain_attend(q, written.k, written.v, one))


def written_first(q, k, v, cache, ranges, index):
    cache = cache.write(k, v, index)
    return plain_attend(q, cache.k, cache.v, ranges), cache


def copies(step):
    """Arrays of the cache's size that the compiled step of one row makes anew."""
    one = jax.tree.map(lambda x: x[:1], (*draw(HEADS), RANGES["from the start"]))
    text = jax.jit(step, donate_argnums=3).lower(*one, jnp.int32(6)).compile().as_text()
    assert "f32[1,4,12,8]" in text
    return [line for line in text.splitlines() if "f32[1,4,12,8]" in line.split(" copy(")[0] and " copy(" in line]


def test_a_donated_cache_is_not_copied():
    """What the order is for. Where the second line fails, the compiler no longer needs it."""
    assert not copies(attend_cached)
    assert copies(written_first)
