"""Image-text contrast, matching and generation, by hand; the same on eight devices as on one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as M
from lvlm_jax import params as P
from lvlm_jax.models.image_text import ImageText, ImageTextConfig
from lvlm_jax.nn.linear import abstract
from lvlm_jax.train import losses, qformer_losses
from lvlm_jax.train.qformer_losses import captions, hard_negatives, itc_loss, itc_scores, itm_loss, three_groups
from tests import tiny


def vectors(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


def test_the_best_query_scores_for_its_picture():
    image = jnp.array([[[1.0, 0.0], [0.6, 0.8]]])
    np.testing.assert_allclose(itc_scores(image, jnp.array([[0.0, 1.0], [1.0, 0.0]])), [[0.8, 1.0]])


def test_rows_of_one_picture_share_their_target():
    image, text, ids = vectors(4, 3, 5), vectors(4, 5, seed=1), np.array([7, 3, 7, 1])
    scores = np.einsum("nqe,be->nbq", *(np.asarray(x, np.float64) for x in (image, text))).max(-1) / 0.2
    positive = (ids[:, None] == ids).astype(float)
    target = 0.9 * positive / positive.sum(1, keepdims=True) + 0.1 / 4
    logs = [x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (scores, scores.T)]
    expected = -sum((target * x).sum(1).mean() for x in logs) / 2
    loss, weight, correct = tiny.jit(itc_loss)(image, text, 0.2, ids)
    np.testing.assert_allclose(loss / weight, expected, rtol=1e-5)
    assert correct == positive[np.arange(4), scores.argmax(1)].sum()


def test_rows_that_only_fill_up_the_batch_are_in_no_contrast():
    image, text, real = vectors(5, 3, 5), vectors(5, 5, seed=1), np.array([True] * 3 + [False] * 2)
    both = tiny.jit(lambda i, t: (itc_loss(i, t, 0.2, real=real), itc_loss(i[:3], t[:3], 0.2)))(image, text)
    np.testing.assert_allclose(*both, rtol=1e-5)


def test_negatives_are_drawn_by_their_scores_and_never_match():
    """Row 3 only fills the batch; rows 0 and 2 show one picture; row 1 may take those two alone."""
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
    ids, real = np.array([5, 6, 5, 9]), np.array([True] * 3 + [False])

    def draw(key):
        one = lambda key: hard_negatives(key, scores, ids, real)  # noqa: E731
        return *jax.vmap(one)(jax.random.split(key, 4000)), hard_negatives(key, scores, np.zeros(4, np.int32))[1]

    drawn, found, none = (np.asarray(x) for x in tiny.jit(draw)(jax.random.key(0)))
    assert found[0].tolist() == [True, True, True, False]
    assert (drawn[:, [0, 2]] == 1).all()
    odds = np.exp(np.asarray(scores)[1, [0, 2]])
    shares = [float((drawn[:, 1] == i).mean()) for i in (0, 2)]
    np.testing.assert_allclose(shares, odds / odds.sum(), atol=0.03)  # four standard deviations
    assert not none.any()  # all of one picture


def test_three_pairs_a_row():
    features = jnp.arange(3.0)[:, None, None]
    tokens = jnp.array([[10, 0], [11, 1], [12, 2]])
    other_image, other_text = jnp.array([2, 0, 1]), jnp.array([1, 2, 0])
    found = tiny.jit(three_groups)(features, tokens, tokens + 1, other_image, other_text)
    pictures, words, shown = (np.asarray(x) for x in found)
    assert pictures[:, 0, 0].tolist() == [0, 2, 0, 1, 0, 1, 2, 1, 2]
    assert words[:, 0].tolist() == [10, 10, 11, 11, 11, 12, 12, 12, 10]
    np.testing.assert_array_equal(shown, words + 1)


def test_matching_counts_the_pairs_that_there_are():
    odds = np.array([[1, 3], [4, 1], [1, 1], [1, 1], [1, 9], [3, 1]], np.float32)
    logits, run = jnp.asarray(np.log(odds)), tiny.jit(itm_loss)
    true, false = jnp.array([True, True]), jnp.array([False, True])
    loss, weight, correct = run(logits, true, true, true)
    np.testing.assert_allclose(loss, -np.log([3 / 4, 4 / 5, 1 / 2, 1 / 2, 1 / 10, 3 / 4]).sum(), rtol=1e-6)
    assert (weight, correct) == (6, 4)  # the fourth is a tie, which is no match
    loss, weight, _ = run(logits, false, true, true)  # row 0 found no other picture
    np.testing.assert_allclose(loss, -np.log([3 / 4, 1 / 2, 1 / 2, 1 / 10, 3 / 4]).sum(), rtol=1e-6)
    assert weight == 5
    loss, weight, _ = run(logits, true, true, false)
    np.testing.assert_allclose(loss, -np.log([1 / 2, 1 / 10, 3 / 4]).sum(), rtol=1e-6)
    assert weight == 3


def test_captions_begin_with_the_word_to_decode():
    assert captions(jnp.array([[101, 7, 102], [101, 8, 9]]), 30522).tolist() == [[30522, 7, 102], [30522, 8, 9]]


VISION = dict(feature_layer=-1, feature_norm=True, class_feature=True, pool="token", pre_norm=False, depth=1)
CONFIG = ImageTextConfig(
    vision=dataclasses.replace(tiny.CLIP, **VISION),
    qformer=dataclasses.replace(tiny.QFORMER, vocab=40, context=8),
    projection=16,
)


@functools.cache
def pairs():
    """Eight pairs; the last only fills the batch up."""
    batch, _ = tiny.batch(tiny.SYSTEMS["llava15"], [[tiny.IMAGE]] * 8, groups=8)
    tokens = np.random.default_rng(0).integers(1, 40, (8, 6)).astype(np.int32)
    shown = (np.arange(6) < np.array([6, 5, 4, 3, 6, 2, 6, 0])[:, None]).astype(np.int32)
    text = {"tokens": tokens, "segments": shown, "positions": tokens, "image_index": tokens}
    return jax.tree.map(jnp.asarray, batch.replace(**text, weights=shown.astype(np.float32)))


def test_a_retrieval_model_does_not_pretrain():
    model = ImageText(dataclasses.replace(CONFIG, pretrains=False))
    with pytest.raises(ValueError, match="no word head and no temperature to train; build it with pretrains=True"):
        qformer_losses.pretraining_losses(model, {}, pairs(), jax.random.key(0), start_id=39)


def pretrain(params, model, batch):
    found = qformer_losses.pretraining_losses(model, params, batch, jax.random.key(0), start_id=39, chunk=4)
    return losses.total(*found.values()), found


def compared(image, text, features, tokens, ids, key):
    """Contrast and matching with negatives from the whole batch; of a match speaks what it reads."""
    scores = itc_scores(image, text) / 0.2
    keys = jax.random.split(key)
    images, found = hard_negatives(keys[0], scores.T, ids)
    texts, others = hard_negatives(keys[1], scores, ids)
    pictures, words, _ = three_groups(features, tokens, tokens, images, texts)
    logits = jnp.stack([pictures.mean((1, 2)), words.mean(1) / 40], 1)
    parts = itc_loss(image, text, 0.2, ids), itm_loss(logits, found, others)
    return losses.total(*parts), (parts, images, texts)


@pytest.mark.parametrize("preset", ["FSDP_TP", pytest.param("DP", marks=pytest.mark.slow)])
def test_eight_devices_compare_what_one_does(preset):
    mesh, rng = M.make_mesh(preset), np.random.default_rng(0)
    features, tokens = rng.normal(size=(16, 5, 4)).astype(np.float32), rng.integers(1, 40, (16, 6)).astype(np.int32)
    given = vectors(16, 3, 5), vectors(16, 5, seed=1), jnp.asarray(features), tokens, np.arange(16) // 2
    run = tiny.jit(jax.value_and_grad(compared, (0, 1, 2), has_aux=True))
    expected = run(*given, jax.random.key(0))
    with M.use(mesh):
        got = run(*jax.device_put(given, M.batch_sharding(mesh)), jax.random.key(0))
    assert (np.asarray(expected[0][1][1]) // 2 != np.arange(16) // 2).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), got, expected)


@pytest.mark.nightly
@pytest.mark.parametrize("preset", ["DP", "FSDP_TP", "FSDP_TP_SP"])
def test_sharded_equals_unsharded(preset):
    """The whole model: each loss and the gradient of their sum, scanned and cut over eight devices."""
    model, mesh, batch = ImageText(CONFIG), M.make_mesh(preset), pairs()
    params = tiny.randomize(abstract(model, batch)[0]) | {"temperature": np.float32(0.3)}
    run = jax.value_and_grad(pretrain, has_aux=True)
    (value, parts), grads = tiny.jit(run, static_argnums=1)(params, model, batch)
    assert {name: float(part[1]) for name, part in parts.items()} == {"itc": 7, "itm": 21, "itg": 25}
    scanned = ImageText(CONFIG, scan=True)
    shapes, axes = abstract(scanned, batch)
    cut = M.shardings(mesh, axes, shapes)
    step = tiny.jit(run, static_argnums=1, out_shardings=(None, cut))
    with M.use(mesh):
        got = step(jax.device_put(P.stack_layers(params), cut), scanned, jax.device_put(batch, M.batch_sharding(mesh)))
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6)
    jax.tree.map(close, got[0], (value, parts))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6 * largest)  # noqa: E731
    jax.tree.map(near, P.unstack_layers(got[1]), grads)
