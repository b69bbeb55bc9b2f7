"""The TPU kernel, interpreted, against plain attention: the same numbers and gradients on any ranges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as meshes
from lvlm_jax.nn import range_attention as kernel
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.attention import attend, plain_attend
from lvlm_jax.nn.range_attention import range_attention
from lvlm_jax.nn.stack import REMAT


def _random_ranges(rng, batch, length, keys):
    ends = np.sort(rng.integers(0, keys + 1, (2, batch, length)), axis=0)
    empty = rng.random((batch, length)) < 0.1
    return tuple(jnp.asarray(np.where(empty, 0, end), jnp.int32) for end in ends)


def _packed(rng, batch, length):
    """Segments of random lengths with padding behind them."""
    rows = [np.repeat(np.arange(1, 6), rng.integers(1, length // 5 + 1, 5))[:length] for _ in range(batch)]
    return jnp.asarray(np.stack([np.pad(row, (0, length - len(row))) for row in rows]), jnp.int32)


def _patterns(rng, batch, length):
    segments = _packed(rng, batch, length)
    pictures = jnp.asarray(rng.random((batch, length // 16)) < 0.5).repeat(16, 1).astype(jnp.int32)
    pictures = jnp.pad(pictures, ((0, 0), (0, length - pictures.shape[1])))
    return {
        "causal": R.causal(batch, length),
        "packed": R.packed_causal(segments),
        "pictures": R.packed_blocks(segments, pictures),
        "window": R.sliding(R.packed_causal(segments), 50),
        "random": R.Ranges(*_random_ranges(rng, batch, length, length)),
        "nothing": R.Ranges(jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, length), jnp.int32)),
    }


@pytest.mark.parametrize(
    "pattern", [pytest.param("causal", marks=pytest.mark.slow), "packed", "pictures", "window", "random", "nothing"]
)
@pytest.mark.parametrize(("length", "heads", "kv_heads", "softcap"), [(256, 4, 2, None), (200, 2, 2, 5.0)])
def test_equals_plain_attention(pattern, length, heads, kv_heads, softcap):
    rng = np.random.default_rng(length)
    ranges = _patterns(rng, 2, length)[pattern]
    q, up = (jnp.asarray(rng.normal(size=(2, length, heads, 32)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, kv_heads, length, 32)), jnp.float32) for _ in range(2))

    def ours(q, k, v):
        return range_attention(
            q, k, v, ranges.start, ranges.stop, softcap=softcap, block_q=128, block_k=128, interpret=True
        )

    def plain(q, k, v):
        return plain_attend(q, k, v, ranges, softcap=softcap)

    out, back = jax.vjp(ours, q, k, v)
    expected, expected_back = jax.vjp(plain, q, k, v)
    for name, got, want in zip("oqkv", (out, *back(up)), (expected, *expected_back(up))):
        np.testing.assert_allclose(got, want, atol=2e-5 * max(1.0, float(jnp.abs(want).max())), err_msg=name)


def test_blocks_outside_the_ranges_are_not_read():
    """A NaN in keys that nobody sees would spread through any product with them."""
    q = jnp.ones((1, 256, 1, 32))
    k = v = jnp.ones((1, 1, 384, 32)).at[:, :, 256:].set(jnp.nan)
    ends = jnp.broadcast_to(jnp.arange(1, 257), (1, 256))
    run = lambda q, k, v: range_attention(q, k, v, ends * 0, ends, block_q=128, block_k=128, interpret=True)  # noqa: E731
    out, back = jax.vjp(run, q, k, v)
    assert np.isfinite(out).all()
    of_q, of_k, of_v = back(jnp.ones_like(out))
    assert np.isfinite(of_q).all()
    assert np.isfinite(of_k[:, :, :256]).all()
    assert not of_v[:, :, 256:].any()


@pytest.mark.parametrize(("preset", "kv_heads"), [("FSDP", 2), ("FSDP_TP", 2), ("FSDP_TP", 1)])
def test_attend_takes_it_on_tpus_and_cuts_it_over_the_mesh(monkeypatch, preset, kv_heads):
    calls = []

    def interpreted(q, *rest, **options):
        calls.append(q.shape)
        return range_attention(q, *rest, **options, interpret=True)

    monkeypatch.setattr(meshes, "platform", lambda: "tpu")
    monkeypatch.setattr(kernel, "range_attention", interpreted)
    rng = np.random.default_rng(0)
    ranges = R.packed_causal(_packed(rng, 8, 128))
    q = jnp.asarray(rng.normal(size=(8, 128, 4, 32)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(8, kv_heads, 128, 32)), jnp.float32) for _ in range(2))
    mesh = meshes.make_mesh(preset)
    with meshes.use(mesh):
        got = jax.jit(lambda q, k, v: attend(q, k, v, ranges))(q, k, v)
    np.testing.assert_allclose(got, plain_attend(q, k, v, ranges), atol=2e-5)
    ways = mesh.shape["tensor"] if kv_heads % mesh.shape["tensor"] == 0 else 1
    assert calls == [(8 // (mesh.size // mesh.shape["tensor"]), 128, 4 // ways, 32)]


def test_a_step_of_decoding_is_left_to_plain_products(monkeypatch):
    monkeypatch.setattr(meshes, "platform", lambda: "tpu")
    x = jnp.ones((1, 1, 2, 32))
    attend(x, x.swapaxes(1, 2), x.swapaxes(1, 2), R.cached(jnp.zeros(1, jnp.int32), jnp.int32(1)))


@pytest.mark.parametrize(("length", "block"), [(577, 640), (2048, 512), (2432, 512), (100, 128), (32768, 512)])
def test_blocks_leave_little_padding(length, block):
    assert kernel._block(length, 512) == block


@pytest.mark.parametrize(("policy", "keeps"), [("full", False), ("attention", True), ("dots", True)])
def test_a_policy_that_keeps_attention_keeps_all_that_its_backward_pass_reads(policy, keeps):
    """The output and the mass of each query; without either, the forward kernel would run again."""
    q, kv = jnp.ones((1, 128, 4, 32)), jnp.ones((1, 2, 128, 32))
    ends = jnp.zeros((1, 128), jnp.int32), jnp.full((1, 128), 128, jnp.int32)

    @functools.partial(jax.checkpoint, policy=REMAT[policy])
    def layer(q):
        return jnp.sin(range_attention(jnp.cos(q), kv, kv, *ends, interpret=True))

    kept = {leaf.shape for leaf in jax.tree.leaves(jax.vjp(layer, q)[1])}
    assert ((1, 4, 1, 128) in kept, (1, 4, 128, 32) in kept) == (keeps, keeps)
