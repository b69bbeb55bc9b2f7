"""Models whose pictures are queries: cached decoding, packing, meshes; two stacks, and a connector that reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as M
from lvlm_jax import params as P
from lvlm_jax.fusion import two_stacks
from lvlm_jax.fusion.soft_tokens import prefix_of
from lvlm_jax.models.lvlm import LVLM, LVLMConfig, dummy_batch
from lvlm_jax.nn.linear import abstract
from tests import tiny
from tests.models.test_lvlm import logits, loss, prefill, split_at, step

I = tiny.IMAGE
NAMES = ["blip2_opt", "instructblip", "blip2_t5"]
ROWS = [[3, I, 4], [5, 4], [2, I, 1, I, 5], [6, I, 3], [1, I, 8], [4, 2], [7, I, 2], [2, I, 2]]


@functools.cache
def system(name):
    config = tiny.SYSTEMS[name]
    return LVLM(config), tiny.weights(config)


@pytest.mark.parametrize("name", ["blip2_opt", "instructblip"])
@pytest.mark.slow
def test_prefill_and_decode_equal_the_full_pass(name):
    model, params = system(name)
    batch, _ = tiny.batch(model.config, [[3, I, 9], [9], [2, I, 1, I, 8]], pad="left")
    full = np.asarray(logits(model, params, batch))
    length, shown = batch.tokens.shape[1], batch.segments > 0
    start, first = jnp.asarray((~shown).sum(1), jnp.int32), length - 3
    got, cache = prefill(model, params, split_at(batch, first), length)
    tiny.close(np.asarray(got)[shown[:, :first]], full[:, :first][shown[:, :first]], full)
    for at in range(first, length):
        tokens, positions = (jnp.asarray(x[:, at : at + 1]) for x in (batch.tokens, batch.positions))
        got, cache = step(model, params, tokens, positions, start, cache, jnp.int32(at))
        tiny.close(got, full[:, at : at + 1], full)


def test_what_two_stacks_write_word_by_word_equals_the_full_pass():
    model, params = system("blip2_t5")
    batch, _ = tiny.batch(model.config, [[3, I, 6], [5, 6], [2, I, 1, I, 6]], pad="left")
    full, length = np.asarray(logits(model, params, batch)), batch.tokens.shape[1]
    read = split_at(batch, length - 6)
    assert not read.weights.any()
    got, cache = prefill(model, params, read, length)
    assert got.shape[1] == 1
    tiny.close(got[:, 0], full[:, length - 7], full)
    start = jnp.asarray((read.segments == 0).sum(1), jnp.int32)
    for at in range(length - 6, length):
        tokens, positions = (jnp.asarray(x[:, at : at + 1]) for x in (batch.tokens, batch.positions))
        got, cache = step(model, params, tokens, positions, start, cache, jnp.int32(at))
        tiny.close(got[:, 0], full[:, at], full)


def test_who_reads_and_who_writes():
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    weights = np.array([[0, 0, 1, 1, 0, 1, 0, 0]])
    prefix = prefix_of(jnp.asarray(segments), jnp.asarray(weights, jnp.float32))
    assert (np.asarray(prefix)[segments > 0] == [1, 1, 0, 0, 1, 0, 0]).all()
    writes = two_stacks.writes(jnp.asarray(segments), prefix)
    assert np.asarray(writes).tolist() == [[False, True, True, True, True, True, True, False]]


@pytest.mark.parametrize("name", ["blip2_t5", pytest.param("instructblip", marks=pytest.mark.slow)])
def test_packed_examples_equal_examples_alone(name):
    model, params = system(name)
    one, _ = tiny.batch(model.config, [[3, I, 4]], seed=1)
    two, _ = tiny.batch(model.config, [[6, I, 2]], seed=2)
    if one.instruction is not None:
        two = two.replace(instruction=np.roll(two.instruction, 1, -1))
    join = lambda name: np.concatenate([getattr(one, name), getattr(two, name)], axis=1)  # noqa: E731
    q = model.config.visual_tokens
    more = {} if one.instruction is None else {"instruction": join("instruction")}
    both = one.replace(
        **{name: join(name) for name in ("tokens", "weights", "positions", "patches", "patch_positions")},
        patch_segments=join("patch_segments"),
        segments=np.concatenate([one.segments, two.segments * 2], 1),
        image_index=np.concatenate([one.image_index, np.where(two.image_index < 0, -1, two.image_index + q)], 1),
        **more,
    )
    taken = np.roll(both.weights[0] > 0, -1)  # position t predicts token t + 1
    packed = np.asarray(logits(model, params, both))[0]
    alone = np.concatenate([np.asarray(logits(model, params, x))[0] for x in (one, two)])
    tiny.close(packed[taken], alone[taken])


def test_a_picture_is_read_beside_its_own_instruction():
    model, params = system("instructblip")
    batch, _ = tiny.batch(model.config, [[2, I, 3], [2, I, 3]])
    other = batch.instruction.copy()
    other[0, 1, 0] = (other[0, 1, 0] + 1) % 99
    a, b = (np.asarray(logits(model, params, x)) for x in (batch, batch.replace(instruction=other)))
    moved = np.abs(a - b).max(-1) > 1e-6
    assert moved.any(1).tolist() == [False, True]
    with pytest.raises(ValueError, match="reads an instruction beside the picture"):
        logits(model, params, batch.replace(instruction=None))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.nightly) for name in NAMES])
@pytest.mark.parametrize("preset", ["FSDP_TP"])
def test_sharded_equals_unsharded(name, preset):
    """Loss and gradients on 8 devices; scanned, as a pod runs it."""
    model, params = system(name)
    batch, _ = tiny.batch(model.config, ROWS, groups=8, length=24)
    batch = jax.tree.map(jnp.asarray, batch)
    whole = tiny.jit(jax.value_and_grad(loss), static_argnums=1)(params, model, batch)
    scanned, mesh = LVLM(model.config, scan=True), M.make_mesh(preset)
    shapes, axes = abstract(scanned, dummy_batch(model.config))
    cut = M.shardings(mesh, axes, shapes)
    placed = jax.device_put(P.stack_layers(params), cut)
    run = tiny.jit(jax.value_and_grad(loss), static_argnums=1, out_shardings=(None, cut))
    with M.use(mesh):
        value, grads = run(placed, scanned, jax.device_put(batch, M.batch_sharding(mesh)))
    np.testing.assert_allclose(value, whole[0], rtol=1e-6)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(whole[1]))
    close = functools.partial(np.testing.assert_allclose, atol=5e-6 * largest)
    jax.tree.map(close, P.unstack_layers(jax.device_get(grads)), jax.device_get(whole[1]))


def test_two_stacks_need_a_prefix():
    parts = tiny.SYSTEMS["blip2_t5"]
    with pytest.raises(ValueError, match="llm is an encoder-decoder, with attention='causal'"):
        LVLMConfig(vision=parts.vision, connector=parts.connector, llm=parts.llm)
