"""The whole model: cached decoding, meshes, stack shapes, and what each output may depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as M
from lvlm_jax import params as P
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from tests import tiny

I = tiny.IMAGE
ROWS = [[3, I, 4], [9], [2, I, 1, I, 5], [6, I, 3], [1, I, 8], [4], [7, I, 2], [2, I, 2]]


@functools.cache
def system(name):
    config = tiny.SYSTEMS[name]
    return LVLM(config), tiny.weights(config)


@functools.partial(tiny.jit, static_argnames="model")
def logits(model, params, batch):
    return model.apply({"params": params}, batch, method=tiny.logits)


@functools.partial(tiny.jit, static_argnames=("model", "length"))
def prefill(model, params, batch, length):
    cache = model.apply({}, batch.tokens.shape[0], length, method="new_cache")
    hidden, cache = model.apply({"params": params}, batch, cache)
    return model.apply({"params": params}, hidden, method="logits"), cache


@functools.partial(tiny.jit, static_argnames="model")
def step(model, params, tokens, positions, start, cache, index):
    hidden, cache = model.apply({"params": params}, tokens, positions, start, cache, index, method="decode")
    return model.apply({"params": params}, hidden, method="logits"), cache


def split_at(batch, at):
    text = ["tokens", "weights", "positions", "segments", "image_index"]
    text += ["blend_index", "blend_weight"] if batch.blend_index is not None else []
    return batch.replace(**{name: getattr(batch, name)[:, :at] for name in text})


@pytest.mark.parametrize(
    ("name", "scan"),
    [
        ("llava15", False),
        ("llava15", True),
        ("llava_next", False),
        ("llava_onevision", False),
        pytest.param("llava_next_video", False, marks=pytest.mark.slow),
        ("paligemma2", False),
        ("siglip_qwen2", False),
        ("clip_llama3", False),
        ("siglip_gemma3", False),
    ]
    + [
        pytest.param(name, False, marks=pytest.mark.slow)
        for name in ("pixel_shuffle", "average_pool", "eva", "nfnet", "visual_expert", "flamingo")
    ]
    + [pytest.param(name, True, marks=pytest.mark.slow) for name in ("siglip_gemma3", "visual_expert")]
    + [pytest.param("flamingo", True, marks=pytest.mark.nightly)],
)
def test_prefill_and_decode_equal_the_full_pass(name, scan):
    model, params = system(name)
    if scan:
        model, params = LVLM(model.config, scan=True), P.stack_layers(params)
    # Rows of four lengths, padded on the left, the last six tokens of each fed one by one and then two at once.
    batch, _ = tiny.batch(model.config, [[3, I, 9], [9], [2, I, 1, I, 8], [12]], pad="left")
    full = np.asarray(logits(model, params, batch))
    length, shown = batch.tokens.shape[1], batch.segments > 0
    start = jnp.asarray((~shown).sum(1), jnp.int32)
    at = length - 6
    got, cache = prefill(model, params, split_at(batch, at), length)
    tiny.close(np.asarray(got)[shown[:, :at]], full[:, :at][shown[:, :at]], full)
    for width in (1, 1, 2, 1, 1):
        new = slice(at, at + width)
        tokens, positions = jnp.asarray(batch.tokens[:, new]), jnp.asarray(batch.positions[:, new])
        got, cache = step(model, params, tokens, positions, start, cache, jnp.int32(at))
        tiny.close(got, full[:, new], full)
        at += width
    assert at == length


@functools.cache
def eight_rows(name):
    batch, _ = tiny.batch(tiny.SYSTEMS[name], ROWS, groups=8, length=44)
    return jax.tree.map(jnp.asarray, batch)


def loss(params, model, batch):
    """Mean cross-entropy of the weighted targets."""
    scores = jax.nn.log_softmax(model.apply({"params": params}, batch, method=tiny.logits))
    taken = jnp.take_along_axis(scores[:, :-1], batch.tokens[:, 1:, None], axis=-1)[..., 0]
    return -(taken * batch.weights[:, 1:]).sum() / batch.weights.sum()


@functools.cache
def plain(name):
    """Loss and gradients on one device, layer by layer."""
    model, params = system(name)
    return jax.device_get(tiny.jit(jax.value_and_grad(loss), static_argnums=1)(params, model, eight_rows(name)))


TOLERANCE = 5e-6
"""Of the largest value, as for a training step (tests/e2e/test_sharded.py). It is rounding: of PaliGemma's gradients on
eight devices 2.3e-6 were measured in float32, and 4e-15 of the same comparison in float64."""


def agree(got, name, atol):
    (value, grads), expected = got, plain(name)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    close = functools.partial(np.testing.assert_allclose, atol=atol * largest)
    jax.tree.map(close, P.unstack_layers(grads), expected[1])


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("llava15", "FSDP_TP"),
        ("llava15", "FSDP_TP_SP"),
        pytest.param("llava15", "DP", marks=pytest.mark.slow),
        pytest.param("llava15", "FSDP", marks=pytest.mark.slow),
        pytest.param("llava_next", "FSDP", marks=pytest.mark.nightly),
        pytest.param("llava_onevision", "FSDP_TP", marks=pytest.mark.slow),
        pytest.param("llava_next_video", "FSDP_TP", marks=pytest.mark.nightly),
        pytest.param("paligemma", "FSDP", marks=pytest.mark.nightly),
        pytest.param("perceiver", "FSDP_TP", marks=pytest.mark.slow),
        pytest.param("qformer", "FSDP_TP", marks=pytest.mark.nightly),
        pytest.param("siglip_qwen2", "FSDP_TP", marks=pytest.mark.nightly),
        pytest.param("pixel_shuffle", "FSDP_TP", marks=pytest.mark.nightly),
        pytest.param("average_pool", "FSDP_TP", marks=pytest.mark.nightly),
        pytest.param("eva", "FSDP_TP", marks=pytest.mark.nightly),
        pytest.param("nfnet", "FSDP_TP", marks=pytest.mark.nightly),
        pytest.param("visual_expert", "FSDP_TP", marks=pytest.mark.slow),
        pytest.param("flamingo", "FSDP_TP", marks=pytest.mark.nightly),
        pytest.param("flamingo", "FSDP_TP_SP", marks=pytest.mark.nightly),
    ],
)
def test_sharded_equals_unsharded(name, preset):
    """Loss and gradients on 8 devices; scanned, as a pod runs it."""
    model, mesh = LVLM(tiny.SYSTEMS[name], scan=True), M.make_mesh(preset)
    shapes, axes = abstract(model, dummy_batch(model.config))
    cut = M.shardings(mesh, axes, shapes)
    params = jax.device_put(P.stack_layers(system(name)[1]), cut)
    step = tiny.jit(jax.value_and_grad(loss), static_argnums=1, out_shardings=(None, cut))
    with M.use(mesh):
        value, grads = step(params, model, jax.device_put(eight_rows(name), M.batch_sharding(mesh)))
    kernel = grads["llm"]["layers"]["mlp"]["up"]["kernel"]
    parts = 1 if preset == "DP" else 8
    assert kernel.size == parts * kernel.addressable_shards[0].data.size
    agree((value, grads), name, TOLERANCE)


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("llava15", "full"),
        pytest.param("llava15", "none", marks=pytest.mark.slow),
        pytest.param("llava15", "dots", marks=pytest.mark.nightly),
        pytest.param("perceiver", "full", marks=pytest.mark.nightly),
    ],
)
def test_scanned_and_rematerialised_equal_plain(name, remat):
    model = LVLM(tiny.SYSTEMS[name], scan=True, remat=remat)
    params = P.stack_layers(system(name)[1])
    agree(tiny.jit(jax.value_and_grad(loss), static_argnums=1)(params, model, eight_rows(name)), name, TOLERANCE)


def test_rematerialised_layers_one_by_one_equal_plain():
    model = LVLM(tiny.SYSTEMS["llava15"], remat="full")
    got = tiny.jit(jax.value_and_grad(loss), static_argnums=1)(system("llava15")[1], model, eight_rows("llava15"))
    agree(got, "llava15", TOLERANCE)


def moved(model, params, one, other):
    """Which outputs [B, T] change between two batches."""
    a, b = (np.asarray(logits(model, params, x)) for x in (one, other))
    return np.abs(a - b).max(-1) > 1e-6


def edit(batch, row, at):
    tokens = batch.tokens.copy()
    tokens[row, at] = (tokens[row, at] + 7) % 90
    return batch.replace(tokens=tokens)


def test_causal_edits_move_only_what_follows():
    model, params = system("llava15")
    batch, _ = tiny.batch(model.config, [[3, I, 4], [6, I, 1]])
    for at in (0, 2, 19, 22):
        expected = np.zeros(batch.tokens.shape, bool)
        expected[0, at:] = batch.segments[0, at:] > 0
        np.testing.assert_array_equal(moved(model, params, batch, edit(batch, 0, at)), expected)


def test_prefix_edits_move_all_of_the_prefix():
    model, params = system("llava15_prefix")
    batch, _ = tiny.batch(model.config, [[3, I, 4], [6, I, 1]])
    real = batch.segments > 0
    first_target = int(np.flatnonzero(batch.weights[0])[0])
    for at in (0, 2):  # in the prefix: every output of the row, and no other row
        expected = np.zeros_like(real)
        expected[0] = real[0]
        np.testing.assert_array_equal(moved(model, params, batch, edit(batch, 0, at)), expected)
    for at in (first_target, first_target + 1):  # among the targets: what follows
        expected = np.zeros_like(real)
        expected[0, at:] = real[0, at:]
        np.testing.assert_array_equal(moved(model, params, batch, edit(batch, 0, at)), expected)


def test_a_newline_is_read_where_the_batch_says():
    model, params = system("llava_next")
    batch, _ = tiny.batch(model.config, [[2, I, 3], [9]])
    other = {**params, "newline": {"token": params["newline"]["token"] + 1.0}}
    a, b = (np.asarray(logits(model, p, batch)) for p in (params, other))
    expected = np.zeros(batch.tokens.shape, bool)
    expected[0, 2 + 16 - 1 :] = True  # the last position of the picture, and what sees it
    np.testing.assert_array_equal(np.abs(a - b).max(-1) > 1e-6, expected)


def test_text_under_a_picture_is_not_read_and_an_edited_picture_is():
    model, params = system("llava15")
    batch, _ = tiny.batch(model.config, [[2, I, 3, I, 4], [9]])
    assert not moved(model, params, batch, edit(batch, 0, 5)).any()
    patches = batch.patches.copy()
    patches[0, 1] += 1.0  # the second picture of the first row
    expected = np.zeros(batch.tokens.shape, bool)
    expected[0, 2 + 16 + 3 :] = True
    np.testing.assert_array_equal(moved(model, params, batch, batch.replace(patches=patches)), expected)


def test_rows_of_a_group_may_share_and_groups_may_not_see_each_other():
    model, params = system("llava15")
    rows = [[1, I, 2], [3, I, 2], [2, I, 4], [9]]
    together, pictures = tiny.batch(model.config, rows, length=24)
    apart, same = tiny.batch(model.config, rows, groups=2, length=24)
    np.testing.assert_array_equal(pictures, same)
    shown = together.segments > 0
    a, b = (np.asarray(logits(model, params, x))[shown] for x in (together, apart))
    tiny.close(a, b)


def test_packed_examples_equal_examples_alone():
    model, params = system("llava15")
    one, _ = tiny.batch(model.config, [[3, I, 4]], seed=1)
    two, _ = tiny.batch(model.config, [[6, I, 2]], seed=2)
    join = lambda name: np.concatenate([getattr(one, name), getattr(two, name)], axis=1)  # noqa: E731
    q = model.config.visual_tokens
    index = np.concatenate([one.image_index, np.where(two.image_index < 0, -1, two.image_index + q)], 1)
    both = one.replace(
        **{name: join(name) for name in ("tokens", "weights", "positions", "patches", "patch_positions")},
        patch_segments=join("patch_segments"),
        segments=np.concatenate([one.segments, two.segments * 2], 1),
        image_index=index,
    )
    packed = np.asarray(logits(model, params, both))[0]
    alone = np.concatenate([np.asarray(logits(model, params, x))[0] for x in (one, two)])
    tiny.close(packed, alone)


@pytest.mark.parametrize("name", tiny.SYSTEMS)
def test_init_makes_every_weight_whatever_the_batch_holds(name):
    config = tiny.SYSTEMS[name]
    shapes, axes = abstract(LVLM(config), dummy_batch(config))
    none, _ = abstract(LVLM(config), dummy_batch(config, pictures=1, rows=2, length=3))
    assert P.flatten(shapes).keys() == P.flatten(none).keys() == P.flatten(axes).keys()
    own = {"newline": config.newline, "ends": config.expert, "fusion": config.fusion, "words": config.words}
    assert set(shapes) == {"vision", "connector", "llm", *(part for part, there in own.items() if there)}
    assert ("head" in shapes["llm"]) is not config.llm.tied
