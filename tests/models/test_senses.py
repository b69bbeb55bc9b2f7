"""Named senses of one model: where their tokens go, and that the model without them is what it was."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as M
from lvlm_jax import params as P
from lvlm_jax.connectors import LinearConfig, MlpConfig, PerceiverConfig, PixelShuffleConfig
from lvlm_jax.models.lvlm import LVLM, LVLMConfig, dummy_batch
from lvlm_jax.models.senses import FeatureSlot, Sense
from lvlm_jax.nn.linear import abstract
from tests import tiny
from tests.models import test_lvlm

I = tiny.IMAGE
BASE = tiny.SYSTEMS["llava15"]
ROWS = [[9, I, 4], [10, 3], [8, I, 1, I, 5], [12, 2]]


@functools.cache
def system():
    return LVLM(tiny.SENSED), tiny.weights(tiny.SENSED)


@functools.partial(tiny.jit, static_argnames=("model", "method"))
def run(model, params, batch, method):
    return model.apply({"params": params}, batch, method=method)


def test_its_own_parts_keep_their_paths():
    shapes, axes = abstract(LVLM(tiny.SENSED), dummy_batch(tiny.SENSED))
    plain, plain_axes = abstract(LVLM(BASE), dummy_batch(BASE))
    assert {name: tree for name, tree in shapes.items() if name != "senses"} == plain
    assert {name: tree for name, tree in axes.items() if name != "senses"} == plain_axes
    assert set(shapes["senses"]["audio"]) == {"connector"}  # features have no encoder's weights
    assert shapes["senses"]["audio"]["connector"]["linear_1"]["kernel"].shape == (5, 32)
    assert set(shapes["senses"]["depth"]) == {"vision", "connector"}
    assert set(P.parts(shapes)) == {*plain, "senses/audio", "senses/depth"}


def test_a_batch_that_feeds_none_is_the_models_own():
    model, params = system()
    plain = {name: tree for name, tree in params.items() if name != "senses"}
    batch, _ = tiny.batch(BASE, ROWS)
    got = run(model, params, batch, tiny.logits)
    np.testing.assert_array_equal(got, run(LVLM(BASE), plain, batch, tiny.logits))


def test_tokens_stand_where_the_batch_says():
    model, params = system()
    batch, _ = tiny.batch(BASE, ROWS)
    fed = tiny.sensed(batch)
    got, before = (np.asarray(run(model, params, one, "embed")) for one in (fed, batch))
    filled = np.zeros(batch.tokens.shape, bool)
    audio = params["senses"]["audio"]["connector"]
    for row in range(4):
        features = fed.senses["audio"].patches[0, row, :3]
        wide = jax.nn.gelu(features @ audio["linear_1"]["kernel"] + audio["linear_1"]["bias"], approximate=False)
        tiny.close(got[row, 1:4], np.asarray(wide @ audio["linear_2"]["kernel"] + audio["linear_2"]["bias"]))
        filled[row, 1:8] = True
    np.testing.assert_array_equal(got[~filled], before[~filled])
    assert (np.abs(got - before).max(-1) > 1e-3)[filled].all()


def test_each_row_reads_its_own():
    """An edit of one row's features or picture moves that row alone, from its first such position on."""
    model, params = system()
    fed = tiny.sensed(tiny.batch(BASE, ROWS)[0])
    before = np.asarray(run(model, params, fed, tiny.logits))
    for name, first in (("audio", 1), ("depth", 4)):
        rows = fed.senses[name]
        patches = rows.patches.copy()
        patches[0, 2, 0] += 1.0
        edited = fed.replace(senses={**fed.senses, name: dataclasses.replace(rows, patches=patches)})
        moved = np.abs(np.asarray(run(model, params, edited, tiny.logits)) - before).max(-1) > 1e-6
        expected = np.zeros(moved.shape, bool)
        expected[2, first:] = fed.segments[2, first:] > 0
        np.testing.assert_array_equal(moved, expected)


def test_padding_of_a_short_sequence_is_not_read():
    model, params = system()
    fed = tiny.sensed(tiny.batch(BASE, ROWS)[0])
    rows = fed.senses["audio"]
    patches = rows.patches.copy()
    patches[:, :, 3:] = 7.0
    edited = fed.replace(senses={**fed.senses, "audio": dataclasses.replace(rows, patches=patches)})
    got, before = (run(model, params, one, tiny.logits) for one in (edited, fed))
    np.testing.assert_array_equal(got, before)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_prefill_and_decode_equal_the_full_pass(scan):
    model, params = system()
    if scan:
        model, params = LVLM(tiny.SENSED, scan=True), P.stack_layers(params)
    batch = tiny.sensed(tiny.batch(BASE, [[9, I, 9], [17], [8, I, 1, I, 8], [20]], pad="left")[0])
    full = np.asarray(test_lvlm.logits(model, params, batch))
    length, shown = batch.tokens.shape[1], batch.segments > 0
    at = length - 6
    part = test_lvlm.split_at(batch, at)
    cut = {name: dataclasses.replace(one, index=one.index[:, :at]) for name, one in batch.senses.items()}
    got, cache = test_lvlm.prefill(model, params, part.replace(senses=cut), length)
    tiny.close(np.asarray(got)[shown[:, :at]], full[:, :at][shown[:, :at]], full)
    start = jnp.asarray((~shown).sum(1), jnp.int32)
    for width in (1, 2, 3):
        new = slice(at, at + width)
        tokens, positions = jnp.asarray(batch.tokens[:, new]), jnp.asarray(batch.positions[:, new])
        got, cache = test_lvlm.step(model, params, tokens, positions, start, cache, jnp.int32(at))
        tiny.close(got, full[:, new], full)
        at += width


@pytest.mark.slow
def test_sharded_equals_unsharded():
    model, params = system()
    rows = [[9, I, 4], [10, 3], [8, I, 5], [12, 2], [8, I, 1], [9, 9], [11, I, 2], [8, 4]]
    batch = jax.tree.map(jnp.asarray, tiny.sensed(tiny.batch(BASE, rows, groups=8, length=44)[0]))
    value, grads = jax.device_get(tiny.jit(jax.value_and_grad(test_lvlm.loss), static_argnums=1)(params, model, batch))
    scanned, mesh = LVLM(tiny.SENSED, scan=True), M.make_mesh("FSDP_TP")
    shapes, axes = abstract(scanned, dummy_batch(tiny.SENSED))
    cut = M.shardings(mesh, axes, shapes)
    step = tiny.jit(jax.value_and_grad(test_lvlm.loss), static_argnums=1, out_shardings=(None, cut))
    with M.use(mesh):
        placed = jax.device_put(P.stack_layers(params), cut), scanned, jax.device_put(batch, M.batch_sharding(mesh))
        got, moved = step(*placed)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=test_lvlm.TOLERANCE * largest)
    jax.tree.map(close, P.unstack_layers(jax.device_get(moved)), grads)


def test_cross_attention_hears_among_its_words():
    """Where text looks at pictures between the layers, a named sense's tokens stand in the text all the same."""
    config = dataclasses.replace(tiny.SYSTEMS["flamingo"], senses=(("audio", tiny.SENSES["audio"]),))
    model, params = LVLM(config), tiny.weights(config)
    batch, _ = tiny.batch(config, [[9, I, 4], [10, 3]])
    fed = tiny.sensed(batch, config)
    got, before = (np.asarray(run(model, params, one, "embed")) for one in (fed, batch))
    moved = np.abs(got - before).max(-1) > 1e-3
    expected = np.zeros(moved.shape, bool)
    expected[:, 1:4] = True
    np.testing.assert_array_equal(moved, expected)


SLOT = FeatureSlot(length=4, width=8)
NO_DENSE = PerceiverConfig(latents=4, depth=1, heads=2, head_dim=4, project=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: dataclasses.replace(BASE, senses=(("x", Sense(encoder=SLOT, connector=NO_DENSE)),)),
            r"senses\.x\.connector\.project=False gives visual tokens of 8 values, the width of senses\.x\.encoder, "
            r"but .* decoder of llm\.width=32; set senses\.x\.connector\.project=True",
        ),
        (
            lambda: dataclasses.replace(
                BASE, connector=NO_DENSE, vision=dataclasses.replace(tiny.CLIP, width=16, heads=2)
            ),
            r"connector\.project=False gives visual tokens of 16 values, the width of vision, .* llm\.width=32",
        ),
        (
            lambda: dataclasses.replace(BASE, senses=(("image", tiny.SENSES["audio"]),)),
            r"senses: 'image': a name is letters, digits and _, there once, and not image or video",
        ),
        (lambda: dataclasses.replace(BASE, senses=tuple(tiny.SENSES.items()) * 2), r"senses: 'audio': a name is"),
        (lambda: Sense(encoder=tiny.CLIP, connector=MlpConfig()), r"image=None with an encoder of kind ViT: image"),
        (
            lambda: dataclasses.replace(tiny.SENSES["depth"], encoder=dataclasses.replace(tiny.SIGLIP, image_size=14)),
            r"image\.size=28, image\.patch=7 give 16 patches of 147 values, but the encoder reads 4 of 147",
        ),
        (lambda: Sense(encoder=FeatureSlot(length=6, width=5), connector=PixelShuffleConfig()), r"square"),
        (lambda: FeatureSlot(length=0, width=5), r"length=0: at least 1"),
    ],
    ids=["width", "own width", "taken", "twice", "no image", "image", "no square", "empty"],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_for_another_model():
    model, params = system()
    fed = tiny.sensed(tiny.batch(BASE, ROWS)[0])
    plain = {name: tree for name, tree in params.items() if name != "senses"}
    with pytest.raises(ValueError, match=r"batch\.senses names \['audio', 'depth'\]; this model has no named senses"):
        run(LVLM(BASE), plain, fed, "embed")
    with pytest.raises(ValueError, match=r"names \['touch'\]; the model's senses are \['audio', 'depth'\]"):
        run(model, params, fed.replace(senses={"touch": fed.senses["audio"]}), "embed")


def test_how_many_positions():
    config = LVLMConfig(vision=tiny.CLIP, connector=LinearConfig(), llm=tiny.LLAMA, senses=tuple(tiny.SENSES.items()))
    assert {name: (one.tokens, one.length, one.width, one.each) for name, one in config.specs.items()} == {
        "audio": (6, 6, 5, True),
        "depth": (4, 16, 147, False),
    }
