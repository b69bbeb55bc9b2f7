import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvlm_jax import params as trees
from lvlm_jax.processing.schema import Batch
from lvlm_jax.train.optim import OptimizerConfig, make_optimizer, make_schedule
from lvlm_jax.train.stages import SpikePolicy
from lvlm_jax.train.step import init_state, make_train_step, microbatches
from tests.train import tiny


def _setup(trains=("connector/**", "llm/**"), **options):
    params = tiny.params()
    trained, frozen = trees.split(params, trees.mask(params, trains))
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    tx = make_optimizer(config, 20, trained)
    step = make_train_step(tiny.loss_fn, tx, schedule=make_schedule(config, 20), **options)
    return init_state(jax.tree.map(jnp.copy, trained), tx), frozen, step, tx


def _bits_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def _close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def test_loss_falls_and_frozen_leaves_do_not_move():
    state, frozen, step, _ = _setup()
    before = jax.tree.map(np.array, frozen)
    losses = []
    for k in range(20):
        state, metrics = step(state, frozen, tiny.batch(k % 2))
        losses.append(float(metrics["loss"]))
    _bits_equal(frozen, before)
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.step) == 20
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * trees.size(state.trained)


def test_equals_a_plain_optax_step():
    state, frozen, step, tx = _setup()
    trained = jax.tree.map(jnp.copy, state.trained)
    opt_state = tx.init(trained)
    for k in range(3):
        batch = tiny.batch(k)

        def mean(t, batch=batch):
            loss, weight, _ = tiny.loss_fn(trees.merge(t, frozen), batch)
            return loss / weight

        loss, grads = jax.value_and_grad(mean)(trained)
        updates, opt_state = tx.update(grads, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        state, metrics = step(state, frozen, batch)
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
        norm = sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads)) ** 0.5
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        assert float(metrics["rows"]) == 8
    _close(state.trained, trained)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_equals_the_big_batch(accumulate):
    whole, frozen, step, _ = _setup()
    parts, _, step_in_parts, _ = _setup(accumulate=accumulate)
    for k in range(3):
        whole, a = step(whole, frozen, tiny.batch(k))
        parts, b = step_in_parts(parts, frozen, tiny.batch(k))
        _close(a, b)
    _close(whole.trained, parts.trained)


def test_microbatches_keep_groups_whole():
    rows, groups = np.arange(12), np.arange(6)  # two rows a group
    a, b = microbatches([rows, groups], 3)
    assert b.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert a.tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    with pytest.raises(ValueError, match=r"accumulate=4 does not divide the batch: 6 groups"):
        microbatches([rows, groups], 4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_of_the_library(accumulate):
    """A `Batch` travels through accumulation, and its tokens and pictures are counted."""
    segments = np.array([[1, 1, 2, 0]] * 4, np.int32)
    numbers = np.zeros((4, 4), np.int32)
    batch = Batch(
        tokens=numbers,
        weights=np.ones((4, 4), np.float32),
        positions=numbers,
        segments=segments,
        image_index=numbers - 1,
        patches=np.ones((2, 1, 3, 5), np.float32),
        patch_positions=np.zeros((2, 1, 3, 2), np.int32),
        patch_segments=np.array([[[1, 2, 0]], [[1, 1, 1]]], np.int32),
    )

    def loss_fn(params, batch):
        return (batch.weights * params["w"]["kernel"]).sum(), batch.weights.sum(), {}

    trained = {"w": {"kernel": jnp.ones(())}}
    tx = optax.sgd(0.1)
    step = make_train_step(loss_fn, tx, accumulate=accumulate)
    _, metrics = step(init_state(trained, tx), {}, batch)
    assert (int(metrics["tokens"]), int(metrics["images"])) == (12, 3)
    assert float(metrics["loss"]) == 1.0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_loss_draws_follows_from_the_seed_and_the_step(accumulate):
    """Taken up after two of four steps, in a program of its own, a run draws what it would have drawn."""

    def loss_fn(params, batch, key):
        drawn = jax.random.normal(key, ())
        return (params["w"]["kernel"] * drawn * batch["x"]).sum(), jnp.float32(len(batch["x"])), {"drawn": drawn}

    tx = optax.sgd(0.1)
    fresh = lambda: init_state({"w": {"kernel": jnp.ones(())}}, tx)  # noqa: E731
    make = lambda seed: make_train_step(loss_fn, tx, accumulate=accumulate, key=jax.random.key(seed))  # noqa: E731
    batch = {"x": np.ones(4, np.float32)}

    def run(step, state, steps):
        drawn = []
        for _ in range(steps):
            state, metrics = step(state, {}, batch)
            drawn.append(float(metrics["drawn"]))
        return state, drawn

    whole, drawn = run(make(0), fresh(), 4)
    half, first = run(make(0), fresh(), 2)
    again, rest = run(make(0), half, 2)
    assert len(set(drawn)) == 4
    assert first + rest == drawn
    _bits_equal(again.trained, whole.trained)
    assert run(make(1), fresh(), 1)[1] != drawn[:1]


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e6])
def test_bad_updates_are_thrown_away_and_counted(poison):
    state, frozen, step, _ = _setup(spike=SpikePolicy(factor=10.0))
    for k in range(3):
        state, _ = step(state, frozen, tiny.batch(k))
    before = jax.tree.map(np.array, state)
    bad = tiny.batch(3)
    bad["y"] = bad["y"] + np.float32(poison)
    for streak in (1, 2):
        state, metrics = step(state, frozen, bad)
        assert bool(metrics["skip"])
        assert (int(metrics["skipped"]), int(metrics["streak"])) == (streak, streak)
    for name in ("trained", "opt_state", "average"):
        _bits_equal(getattr(state, name), getattr(before, name))
    lr = float(metrics["lr"])
    state, metrics = step(state, frozen, tiny.batch(5))
    assert (int(metrics["skipped"]), int(metrics["streak"]), int(state.step)) == (2, 0, 6)
    assert not bool(metrics["skip"])
    assert float(metrics["lr"]) == lr  # the schedule did not move on while updates were thrown away


def test_a_gradient_norm_that_is_not_finite_is_seen_under_a_finite_loss():
    def loss_fn(params, batch):
        return jnp.sqrt(params["w"]["kernel"]) * batch["x"].sum(), jnp.float32(1), {}  # slope at 0 is infinite

    tx = optax.sgd(0.1)
    step = make_train_step(loss_fn, tx)
    state, metrics = step(init_state({"w": {"kernel": jnp.zeros(())}}, tx), {}, {"x": np.ones(2, np.float32)})
    assert np.isfinite(metrics["loss"])
    assert bool(metrics["skip"])
    assert float(state.trained["w"]["kernel"]) == 0


def test_no_label_at_all_is_harmless():
    state, frozen, step, _ = _setup()
    state, metrics = step(state, frozen, tiny.batch(0) | {"w": np.zeros(8, np.float32)})
    assert float(metrics["loss"]) == 0
    assert not bool(metrics["skip"])


def test_frozen_gradients_are_not_computed():
    """The clip, the norm and the skip read trained gradients only: less work than a full gradient, by the count.

    The frozen matrix W multiplies the trained one's output, so its own gradient would be one more product.
    """
    width = 64

    def loss_fn(params, batch):
        h = jnp.tanh(batch["x"] @ params["trained"]["kernel"])
        return jnp.square(h @ params["frozen"]["kernel"]).sum(), jnp.float32(width), {}

    params = {name: {"kernel": jnp.ones((width, width))} for name in ("trained", "frozen")}
    batch = {"x": np.ones((width, width), np.float32)}

    def flops(trains):
        trained, frozen = trees.split(params, trees.mask(params, trains))
        tx = make_optimizer(OptimizerConfig(learning_rate=1e-3), 10, trained)
        lowered = make_train_step(loss_fn, tx).lower(init_state(trained, tx), frozen, batch)
        return lowered.compile().cost_analysis()["flops"]

    product = 2 * width**3
    assert flops(["trained/**", "frozen/**"]) - flops(["trained/**"]) > 0.95 * product


def test_frozen_weights_are_arguments():
    """A closure would bake them into the program as constants."""
    state, frozen, step, _ = _setup()
    jaxpr = jax.make_jaxpr(step)(state, frozen, tiny.batch(0))
    assert all(np.size(c) < 8 for c in jaxpr.consts)
    assert len(jaxpr.in_avals) == len(jax.tree.leaves((state, frozen, tiny.batch(0))))
