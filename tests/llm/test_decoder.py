"""The families that no test of a whole model runs: cached decoding, scanned layers, packing, windows, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as M
from lvlm_jax import params as P
from lvlm_jax.llm import chatglm_6b
from lvlm_jax.llm.decoder import Decoder, new_cache
from lvlm_jax.nn import lora
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.linear import abstract
from tests import tiny

LENGTH = 20
# Four rows: whole, padded on the left, and two that hold several examples.
SEGMENTS = np.array([[1] * 20, [0] * 7 + [1] * 13, [1] * 4 + [2] * 11 + [3] * 5, [1] * 9 + [2] * 9 + [0] * 2], np.int32)
# Where learned positions are looked up, each example begins anew.
POSITIONS = np.array([[(row[:t] == row[t]).sum() for t in range(LENGTH)] for row in SEGMENTS], np.int32)
LEFT = np.repeat([0, 2, 7, 11], 1)
WINDOWED = [name for name, config in tiny.DECODERS.items() if config.window]
SLOW, NIGHTLY = pytest.mark.slow, pytest.mark.nightly
# What has parts that no other has runs in CI; biased scores in the default run, which windows and rotations are in.
LATER = dict.fromkeys(("opt_350m", "palm", "chatglm_6b", "chinchilla"), SLOW)
LATER |= dict.fromkeys(("opt", "gpt_neox", "glm4", "mosaic_gpt"), NIGHTLY)
FAMILIES = [pytest.param(name, marks=LATER[name]) if name in LATER else name for name in tiny.DECODERS]


def scores(decoder, tokens, positions, ranges, cache=None, index=None):
    if decoder.config.counts == 2:  # a context of five, of which what follows fills the place 3
        positions = chatglm_6b.count(positions, jnp.full((1, 1), 5), jnp.full((1, 1), 3))
    hidden, cache = decoder(decoder.embed_tokens(tokens), positions, ranges, cache, index)
    return decoder.logits(hidden), cache


@functools.cache
def make(name):
    decoder = Decoder(tiny.DECODERS[name])
    shapes, _ = abstract(decoder, *batch(1), method=scores)
    return decoder, tiny.randomize(shapes)


def batch(rows):
    tokens = np.random.default_rng(0).integers(1, 99, (rows, LENGTH)).astype(np.int32)
    return jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(LENGTH), (rows, LENGTH)), R.causal(rows, LENGTH)


@functools.partial(tiny.jit, static_argnames="decoder")
def run(decoder, params, *inputs):
    return decoder.apply({"params": params}, *inputs, method=scores)


def scanned(name, remat="none"):
    decoder, params = make(name)
    return Decoder(decoder.config, scan=True, remat=remat), P.stack_layers(params)


@pytest.mark.parametrize(
    ("name", "scan"),
    [pytest.param(name, False, marks=LATER[name]) if name in LATER else (name, False) for name in tiny.DECODERS]
    + [(WINDOWED[0], True), pytest.param("mpt", True, marks=NIGHTLY)],
)
def test_prefill_and_decode_equal_the_full_pass(name, scan):
    """Rows padded on the left; the last eleven tokens one by one, then two and three at once: past any window."""
    decoder, params = scanned(name) if scan else make(name)
    tokens, positions, _ = batch(len(LEFT))
    start = jnp.asarray(LEFT, jnp.int32)
    positions = jnp.maximum(positions - start[:, None], 0)
    shown = np.arange(LENGTH) >= LEFT[:, None]
    whole = R.packed_causal(jnp.asarray(shown, jnp.int32))
    full = np.asarray(run(decoder, params, tokens, positions, whole)[0])
    at = LENGTH - 8
    cache = new_cache(decoder.config, len(LEFT), LENGTH, scan=scan)
    first = jax.tree.map(lambda x: x[:, :at], whole)
    got, cache = run(decoder, params, tokens[:, :at], positions[:, :at], first, cache, jnp.int32(0))
    tiny.close(np.asarray(got)[shown[:, :at]], full[:, :at][shown[:, :at]], full)
    for width in (1, 1, 1, 2, 3):
        new = slice(at, at + width)
        seen = R.cached(start, jnp.int32(at + width), width)
        got, cache = run(decoder, params, tokens[:, new], positions[:, new], seen, cache, jnp.int32(at))
        tiny.close(got, full[:, new], full)
        at += width
    assert at == LENGTH


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_examples_equal_examples_alone(name):
    decoder, params = make(name)
    tokens, positions, _ = batch(len(SEGMENTS))
    # Else only distances count, and positions need not begin anew.
    anew = decoder.config.positions == "learned" or decoder.config.counts == 2
    counted = jnp.asarray(POSITIONS) if anew else positions
    packed = run(decoder, params, tokens, counted, R.packed_causal(jnp.asarray(SEGMENTS)))[0]
    row, where = 2, slice(4, 15)
    alone = run(decoder, params, tokens[row : row + 1, where], positions[:1, :11], R.causal(1, 11))[0]
    tiny.close(packed[row, where], alone[0])


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_hides_what_is_further_back(name):
    """An edited token moves what its layers' windows carry on, and nothing beyond; a global layer sees it from afar."""
    config = tiny.DECODERS[name]
    decoder, params = make(name)
    tokens, positions, ranges = batch(1)
    edited = tokens.at[0, 0].add(1)
    moved = [np.asarray(run(decoder, params, x, positions, ranges)[0]) for x in (tokens, edited)]
    last = np.flatnonzero(np.abs(moved[0] - moved[1]).max(-1)[0] > 1e-6)[-1]
    reach = config.depth * (config.window - 1) if "global" not in config.layer_kinds else LENGTH
    assert last == min(reach, LENGTH - 1)


def loss(params, decoder, tokens, positions, ranges):
    logits, _ = decoder.apply({"params": params}, tokens, positions, ranges, method=scores)
    own = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    return -own.mean()


@functools.cache
def plain(name):
    """Loss and gradients of packed rows on one device, layer by layer."""
    decoder, params = make(name)
    return jax.device_get(grad(params, decoder, *packed()))


def packed():
    tokens, positions, _ = batch(8)
    return tokens, positions, R.packed_causal(jnp.asarray(np.tile(SEGMENTS, (2, 1))))


grad = tiny.jit(jax.value_and_grad(loss), static_argnums=1)


def agree(got, name):
    (value, grads), (expected, slopes) = got, plain(name)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * largest)
    jax.tree.map(close, P.unstack_layers(grads), slopes)


FIRST = WINDOWED[0]  # local and global layers in one stack; the others after it are slow


# Weights are cut by the names of their axes, which all share but a table of positions, a narrower one of words, and
# what projects distances.
@pytest.mark.parametrize(
    "name",
    [
        n if n == FIRST else pytest.param(n, marks=SLOW if n in ("opt_350m", "chinchilla") else NIGHTLY)
        for n in tiny.DECODERS
    ],
)
def test_sharded_equals_unsharded(name):
    """Loss and gradients of packed rows, scanned, on 8 devices."""
    (decoder, params), mesh = scanned(name), M.make_mesh("FSDP_TP")
    shapes, axes = abstract(decoder, *batch(1), method=scores)
    cut = M.shardings(mesh, axes, shapes)
    with M.use(mesh):
        step = tiny.jit(jax.value_and_grad(loss), static_argnums=1, out_shardings=(None, cut))
        got = step(jax.device_put(params, cut), decoder, *jax.device_put(packed(), M.batch_sharding(mesh)))
    kernel = got[1]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.size == 8 * kernel.addressable_shards[0].data.size
    agree(got, name)


@pytest.mark.parametrize("name", [n if n == FIRST else pytest.param(n, marks=SLOW) for n in WINDOWED])
@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=SLOW)])
def test_scanned_and_rematerialised_equal_plain(name, remat):
    decoder, params = scanned(name, remat)
    agree(grad(params, decoder, *packed()), name)


def test_rematerialised_layers_one_by_one_equal_plain():
    decoder, params = make(FIRST)
    agree(grad(params, Decoder(decoder.config, remat="full"), *packed()), FIRST)


@pytest.mark.parametrize("name", ["mpt", *(pytest.param(name, marks=SLOW) for name in LATER)])
def test_adapters_find_the_layers_of_every_family(name):
    """The names of dense layers are the same in all, so one recipe's patterns take them."""
    shapes, axes = abstract(Decoder(tiny.DECODERS[name]), *batch(1), method=scores)
    patterns = ("layers/*/attn/{q,k,v,o}/kernel", "layers/*/mlp/{up,down}/kernel")
    grown, _ = lora.add_shapes(shapes, axes, lora.Lora(rank=2, targets=patterns))
    added = {path.rpartition("/")[0] for path in P.flatten(grown).keys() - P.flatten(shapes).keys()}
    assert len(added) == 6 * tiny.DECODERS[name].depth


def test_bfloat16_embeddings_are_scaled_by_a_rounded_factor():
    decoder, params = make("gemma")
    tokens, _, _ = batch(1)
    got = Decoder(decoder.config, jnp.bfloat16).apply({"params": params}, tokens, method="embed_tokens")
    rows = jnp.asarray(params["embed"]["table"])[tokens].astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, rows * jnp.bfloat16(32**0.5))
