"""Encoder-decoders: cached decoding, packing, scanned layers, meshes, and values that cannot go together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import llm
from lvlm_jax import mesh as M
from lvlm_jax import params as P
from lvlm_jax.llm.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, new_cache
from lvlm_jax.nn.linear import abstract
from tests import tiny

SIZES = {"vocab": 64, "width": 32, "depth": 2, "decoder_depth": 2, "heads": 4, "head_dim": 8, "mlp_dim": 48}
CONFIG = EncoderDecoderConfig(**SIZES, buckets=8, furthest=10)
READ, WRITTEN = 12, 11
# Whole, padded on the right, padded on the left, and three examples in one row.
SEGMENTS = np.array([[1] * 12, [1] * 7 + [0] * 5, [0] * 4 + [1] * 8, [1] * 3 + [2] * 5 + [3] * 4], np.int32)
TOKEN_SEGMENTS = np.array([[1] * 11, [1] * 11, [1] * 6 + [0] * 5, [1] * 2 + [2] * 5 + [3] * 4], np.int32)


def batch(rows=4):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, READ, CONFIG.width)).astype(np.float32)
    tokens = rng.integers(1, CONFIG.vocab, (rows, WRITTEN)).astype(np.int32)
    tile = functools.partial(np.resize, new_shape=(rows, READ))
    return tuple(map(jnp.asarray, (x, tile(SEGMENTS), tokens, np.resize(TOKEN_SEGMENTS, (rows, WRITTEN)))))


@functools.cache
def made():
    return tiny.randomize(abstract(EncoderDecoder(CONFIG), *batch(1))[0])


def scores(model, *inputs):
    return model.logits(model(*inputs))


@functools.partial(tiny.jit, static_argnames=("model", "method"))
def run(model, params, *inputs, method=scores):
    return model.apply({"params": params}, *inputs, method=method)


def step(model, *inputs):
    hidden, cache = model.decode(*inputs)
    return model.logits(hidden), cache


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_written_step_by_step_equals_the_full_pass(scan):
    """One token, then four by one, then three at once; the keys of what was read are computed in the first call."""
    params = made()
    model = EncoderDecoder(CONFIG, scan=scan)
    params = P.stack_layers(params) if scan else params
    x, segments, tokens, _ = (part[:3] for part in batch())
    full = np.asarray(run(model, params, x, segments, tokens, jnp.ones_like(tokens)))
    context = run(model, params, x, segments, method="encode")
    cache, at = new_cache(CONFIG, 3, WRITTEN, scan=scan), 0
    with pytest.raises(ValueError, match=r"needs context=.*no keys of it are cached yet"):
        run(model, params, tokens[:, :1], segments, cache, jnp.int32(0), method=step)
    for width in (1, 1, 1, 1, 1, 3, 3):
        more = () if at else (context,)
        new = slice(at, at + width)
        got, cache = run(model, params, tokens[:, new], segments, cache, jnp.int32(at), *more, method=step)
        tiny.close(got, full[:, new], full)
        at += width
    assert at == WRITTEN


@pytest.mark.slow
def test_packed_examples_equal_examples_alone():
    """And a row knows nothing of its padding, nor of the other rows."""
    params = made()
    model = EncoderDecoder(CONFIG)
    x, segments, tokens, token_segments = batch()
    packed = run(model, params, x, segments, tokens, token_segments)
    ones = functools.partial(jnp.ones, dtype=jnp.int32)
    for row, (read, written) in {2: ((4, 12), (0, 6)), 3: ((3, 8), (2, 7))}.items():
        read, written = slice(*read), slice(*written)
        part = x[row : row + 1, read], tokens[row : row + 1, written]
        alone = run(model, params, part[0], ones(part[0].shape[:2]), part[1], ones(part[1].shape))
        tiny.close(packed[row, written], alone[0])


def loss(params, model, *inputs):
    return jnp.square(jax.nn.log_softmax(scores(model.bind({"params": params}), *inputs))).mean()


@pytest.mark.parametrize(
    "preset", [pytest.param("FSDP_TP", marks=pytest.mark.slow), pytest.param("FSDP_TP_SP", marks=pytest.mark.nightly)]
)
def test_sharded_equals_unsharded(preset):
    """Loss and gradients of padded and packed rows, scanned, on 8 devices."""
    params = made()
    model, inputs = EncoderDecoder(CONFIG, scan=True), batch(8)
    grad = tiny.jit(jax.value_and_grad(loss), static_argnums=1)
    value, slopes = jax.device_get(grad(P.stack_layers(params), model, *inputs))
    mesh = M.make_mesh(preset)
    cut = M.shardings(mesh, *reversed(abstract(model, *batch(1))))
    with M.use(mesh):
        step = tiny.jit(jax.value_and_grad(loss), static_argnums=1, out_shardings=(None, cut))
        placed = jax.device_put(P.stack_layers(params), cut), jax.device_put(inputs, M.batch_sharding(mesh))
        got = step(placed[0], model, *placed[1])
    assert got[1]["encoder"]["relative"]["table"].addressable_shards[0].data.shape == (8, 2)  # heads are cut
    np.testing.assert_allclose(got[0], value, rtol=1e-6)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * largest), got[1], slopes)


@pytest.mark.parametrize("name", llm.t5.PRESETS)
def test_presets_go_out_and_come_back(name):
    config = llm.t5.PRESETS[name]
    assert llm.family_of(config) == "t5" == llm.t5.to_hf(config)["model_type"]
    assert llm.t5.from_hf(llm.t5.to_hf(config)) == config


def test_config_files_of_the_hub():
    """google/flan-t5-xl and google-t5/t5-small, and Flan-T5 inside BLIP-2."""
    sizes = {"d_ff": 5120, "d_kv": 64, "d_model": 2048, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32}
    flan = {"model_type": "t5", **sizes, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    assert llm.t5.from_hf(flan) == llm.t5.PRESETS["flan_t5_xl"]
    exact = dataclasses.replace(llm.t5.PRESETS["flan_t5_xl"], activation="gelu")
    assert llm.t5.from_hf({**flan, "dense_act_fn": "gelu"}) == exact
    assert llm.t5.from_hf({"model_type": "t5", "n_positions": 512}) == llm.t5.PRESETS["t5_small"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "bilinear-gelu"}, r"feed_forward_proj is 'bilinear-gelu'.*'gelu', 'gated-gelu'"),
        ({"feed_forward_proj": "gated-tanh"}, r"dense_act_fn is 'tanh'.*'gelu_new', 'gelu', 'relu', 'silu'"),
        ({"is_encoder_decoder": False}, r"is_encoder_decoder is False.*supported: True"),
        ({"relative_attention_num_buckets": 30}, r"buckets=30: a multiple of 4"),
        ({"relative_attention_max_distance": 16}, r"furthest=16 is within the 16 distances that buckets=32 tell apart"),
    ],
)
def test_what_we_cannot_run_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        llm.t5.from_hf(change)
