"""Text and picture tokens in one row: cached decoding, meshes, what is read, what is trained, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as M
from lvlm_jax import params as P
from lvlm_jax.models.lvlm import dummy_batch
from lvlm_jax.models.unified import Unified, UnifiedConfig
from lvlm_jax.nn.linear import abstract
from lvlm_jax.train.losses import language_loss
from tests import tiny

I = tiny.IMAGE
ROWS = [[3, I, 4], [9], [2, I, 1, I, 5], [6, I, 3], [1, I, 8], [4], [7, I, 2], [2, I, 2]]


@functools.cache
def system(order):
    config = tiny.UNIFIED[order]
    params = jax.tree.map(jnp.asarray, tiny.weights(config))
    model = Unified(config)
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(12, 8, 8, 3)).astype(np.float32)
    read = jax.jit(lambda p, x: model.apply({"params": p}, x, method=lambda m, x: m.vision.latents(x)))
    latents = read(params, jnp.asarray(pictures))
    params["vision"]["codebook"] = latents.reshape(-1, 6)[:24]  # so that every picture has other tokens
    return model, params


@functools.partial(tiny.jit, static_argnames="model")
def logits(model, params, batch):
    return model.apply({"params": params}, batch, method=tiny.logits)


@functools.partial(tiny.jit, static_argnames="model")
def row_tokens(model, params, batch):
    return model.apply({"params": params}, batch, method="tokens")


@functools.partial(tiny.jit, static_argnames="model")
def written(model, params, tokens, codes):
    variables = {"params": params}
    draw = lambda m, codes: m.vision.decode(codes)  # noqa: E731
    return model.apply(variables, tokens, method="write"), model.apply(variables, codes, method=draw)


@functools.partial(tiny.jit, static_argnames=("model", "length"))
def prefill(model, params, batch, length):
    cache = model.apply({}, batch.tokens.shape[0], length, method="new_cache")
    hidden, cache = model.apply({"params": params}, batch, cache)
    return model.apply({"params": params}, hidden, method="logits"), cache


@functools.partial(tiny.jit, static_argnames="model")
def step(model, params, tokens, positions, start, cache, index):
    hidden, cache = model.apply({"params": params}, tokens, positions, start, cache, index, method="decode")
    return model.apply({"params": params}, hidden, method="logits"), cache


@pytest.mark.slow
@pytest.mark.parametrize("order", ["swin", pytest.param("pre", marks=pytest.mark.nightly)])
def test_prefill_and_decode_equal_the_full_pass(order):
    """The last six tokens of each row, a picture's among them, are fed one by one."""
    model, params = system(order)
    batch, _ = tiny.batch(model.config, [[3, I, 1, I, 2], [9], [5, I, 3]], pad="left")
    full = np.asarray(logits(model, params, batch))
    tokens = np.asarray(row_tokens(model, params, batch))
    length, shown = batch.tokens.shape[1], batch.segments > 0
    at, text = length - 4, ("tokens", "weights", "positions", "segments", "image_index")
    first = batch.replace(**{name: getattr(batch, name)[:, :at] for name in text})
    got, cache = prefill(model, params, first, length)
    tiny.close(np.asarray(got)[shown[:, :at]], full[:, :at][shown[:, :at]], full)
    start = jnp.asarray((~shown).sum(1), jnp.int32)
    for i in range(at, length):
        new = slice(i, i + 1)
        given = jnp.asarray(tokens[:, new]), jnp.asarray(batch.positions[:, new])
        got, cache = step(model, params, *given, start, cache, jnp.int32(i))
        tiny.close(got, full[:, new], full)


def test_pictures_are_tokens_of_the_row():
    model, params = system("pre")
    batch, _ = tiny.batch(model.config, [[2, I, 3, I, 4], [9], [4, I, 2]], groups=3)
    tokens = np.asarray(row_tokens(model, params, batch))
    inside = batch.image_index >= 0
    assert np.isin(tokens[inside], model.config.code_ids).all()
    assert len(np.unique(tokens[inside])) > 4
    np.testing.assert_array_equal(tokens[~inside], batch.tokens[~inside])
    # The same tokens, made before: no picture travels, and the numbers are the same bits.
    before = batch.replace(
        tokens=tokens,
        **{name: getattr(batch, name)[:, :0] for name in ("patches", "patch_positions", "patch_segments")},
    )
    np.testing.assert_array_equal(logits(model, params, batch), logits(model, params, before))
    codes = np.asarray([model.config.code_ids.index(token) for token in tokens[inside]]).reshape(-1, 4)
    np.testing.assert_array_equal(*written(model, params, tokens[inside].reshape(-1, 4), codes))


def loss(params, model, batch):
    """One loss over text and picture tokens, with the z-loss."""
    batch = batch.replace(weights=jnp.asarray(batch.segments > 0, jnp.float32))
    hidden, _ = model.apply({"params": params}, batch)
    tokens = model.apply({"params": params}, batch, method="tokens")
    kernel = model.apply({"params": params}, method="head_kernel")
    total, weight, _ = language_loss(hidden, kernel, tokens, batch.weights, z_loss=1e-2, chunk=64)
    return total / weight


@functools.cache
def eight_rows():
    batch, _ = tiny.batch(tiny.UNIFIED["swin"], ROWS, groups=8, length=20)
    return jax.tree.map(jnp.asarray, batch)


@functools.cache
def plain():
    model, params = system("swin")
    return jax.device_get(tiny.jit(jax.value_and_grad(loss), static_argnums=1)(params, model, eight_rows()))


@pytest.mark.slow
def test_the_tokenizer_is_frozen_and_the_rest_is_trained():
    flat = P.flatten(plain()[1])
    assert all((np.abs(leaf).max() > 0) == path.startswith("llm/") for path, leaf in flat.items())


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["FSDP_TP", pytest.param("FSDP", marks=pytest.mark.nightly)])
def test_sharded_equals_unsharded(preset):
    """Loss and gradients on 8 devices, scanned."""
    _, params = system("swin")
    model, mesh = Unified(tiny.UNIFIED["swin"], scan=True), M.make_mesh(preset)
    shapes, axes = abstract(model, dummy_batch(model.config))
    cut = M.shardings(mesh, axes, shapes)
    run = tiny.jit(jax.value_and_grad(loss), static_argnums=1, out_shardings=(None, cut))
    with M.use(mesh):
        placed = jax.device_put(P.stack_layers(params), cut)
        value, grads = run(placed, model, jax.device_put(eight_rows(), M.batch_sharding(mesh)))
    kernel = grads["llm"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.size == 8 * kernel.addressable_shards[0].data.size
    wanted_value, wanted = plain()
    np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    close = functools.partial(np.testing.assert_allclose, atol=5e-6 * largest)
    jax.tree.map(close, P.unstack_layers(jax.device_get(grads)), wanted)


def test_a_model_of_text_alone_never_predicts_a_picture_token():
    model, params = system("pre")
    mute = Unified(dataclasses.replace(model.config, text_only=True))
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32)), jnp.float32)
    free, bound = (m.apply({"params": params}, hidden, method="logits") for m in (model, mute))
    codes = np.isin(np.arange(99), model.config.code_ids)
    assert (np.asarray(bound)[:, codes] == np.finfo(np.float32).min).all()
    np.testing.assert_array_equal(np.asarray(bound)[:, ~codes], np.asarray(free)[:, ~codes])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code_ids": (1, 2)}, "code_ids has 2 ids, but the tokenizer has codes=24"),
        ({"begin_id": 10}, r"code_ids, begin_id=10, end_id=3 and image_id=98 share an id"),
        ({"end_id": 99}, "token id 99 of a picture is outside the vocabulary of 99"),
    ],
)
def test_words_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.UNIFIED["pre"], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 10}, "image_size=10 is no multiple of 4, the pixels of a code that 3 levels make"),
        ({"groups": 3}, "channels=8 times 1 do not divide into groups=3"),
        ({"attention": (3,)}, r"attention=\[3\]: no level has this side; the sides are \[8, 4, 2\]"),
    ],
)
def test_tokenizers_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.VQ, **change)


def test_a_tokenizer_without_a_decoder_writes_nothing():
    config = dataclasses.replace(tiny.UNIFIED["pre"], vision=dataclasses.replace(tiny.VQ, decoder=False))
    assert isinstance(config, UnifiedConfig)
    params = jax.tree.map(jnp.asarray, tiny.weights(config))
    assert "decoder" not in params["vision"]
    with pytest.raises(ValueError, match=r"has no decoder \(decoder=False\)"):
        Unified(config).apply({"params": params}, jnp.full((1, 4), 10), method="write")
