"""The training step: a pure function of (state, frozen parameters, batch).

Gradients are taken with respect to the trained tree alone; the frozen tree is an argument, never closed over (a closure
would bake the weights into the program), so nothing can read a frozen gradient and the compiler computes none.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lvlm_jax import params as trees
from lvlm_jax.processing.schema import Batch
from lvlm_jax.train.optim import Schedule
from lvlm_jax.train.stages import SpikePolicy

LossFn = Callable[..., tuple[Any, Any, dict]]
"""loss_fn(params, batch) -> (loss_sum, weight_sum, dict of further sums); one that draws takes a random key, too."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step, and all that a checkpoint holds.

    step: batches consumed, int32; the index of the next batch. skipped: updates thrown away so far; streak: in a row.
    average: moving average of the loss (0 before the first update), float32. smooth: moving average of the trained
    leaves, None where the stage keeps none.
    """

    step: Any
    trained: Any
    opt_state: Any
    skipped: Any
    streak: Any
    average: Any
    smooth: Any = None


def init_state(trained: Mapping, tx: optax.GradientTransformation, smooth: bool = False) -> TrainState:
    """The state before the first step; works under `jax.eval_shape`. smooth: with an average of the trained leaves."""
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]  # three buffers: donating one twice is an error
    copies = jax.tree.map(jnp.copy, dict(trained)) if smooth else None
    return TrainState(zero[0], dict(trained), tx.init(trained), zero[1], zero[2], jnp.zeros((), jnp.float32), copies)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    spike: SpikePolicy = SpikePolicy(),  # noqa: B008 (a frozen value)
    schedule: Schedule | None = None,
    shardings: Any = None,
    decay: float = 0.0,
    key: jax.Array | None = None,
) -> Callable[[TrainState, dict, Any], tuple[TrainState, dict]]:
    """step(state, frozen, batch) -> (state, metrics), compiled, the state donated.

    The loss is the sum of losses over the sum of weights of the whole batch, also with `accumulate` microbatches. An
    update whose loss or gradient norm is not finite, or whose loss is a spike, is computed and thrown away: parameters,
    moments and the schedule's count stay as they were. `tx` is for the trained tree alone.
    shardings: those of the state, which comes out as it went in; None on one device. decay: of the moving average of
    the trained leaves, where the state has one; an update that is thrown away does not enter it.
    key: of a loss that draws: it gets this one folded with the number of the batch (and split among microbatches), so
    that a run that is resumed draws what it would have drawn.

    metrics: loss, grad_norm (over trained leaves), weight (trained tokens), skip (bool, this update), skipped, streak,
    lr where `schedule` is given, tokens and images where the batch is a `Batch`, and the sums that `loss_fn` returns.
    """

    def step(state: TrainState, frozen: dict, batch: Any) -> tuple[TrainState, dict]:
        drawn = None if key is None else jax.random.fold_in(key, state.step)
        grads, loss, weight, sums = _gradients(loss_fn, state.trained, frozen, batch, accumulate, drawn)
        per = 1 / jnp.where(weight > 0, weight, 1.0)
        grads = jax.tree.map(lambda g: (g * per).astype(g.dtype), grads)
        loss, norm = loss * per, _norm(grads)
        first = state.step == state.skipped
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if spike.factor:
            good &= first | (loss <= spike.factor * state.average)
        updates, opt_state = tx.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        average = jnp.where(first, loss, spike.memory * state.average + (1 - spike.memory) * loss)
        blend = lambda past, new: decay * past + (1 - decay) * new  # noqa: E731
        smooth = None if state.smooth is None else jax.tree.map(blend, state.smooth, trained)
        fresh = (trained, opt_state, average, smooth)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), fresh, _movable(state))
        skip = (~good).astype(jnp.int32)
        metrics = dict(sums, **_counts(batch), loss=loss, grad_norm=norm, weight=weight, skip=~good)
        metrics |= {"skipped": state.skipped + skip, "streak": jnp.where(good, 0, state.streak + 1)}
        if schedule is not None:
            metrics["lr"] = schedule(state.step - state.skipped)
        new = TrainState(state.step + 1, *kept[:2], metrics["skipped"], metrics["streak"], *kept[2:])
        return new, metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _norm(grads: dict) -> Any:
    return jnp.sqrt(sum(jnp.square(g.astype(jnp.float32)).sum() for g in jax.tree.leaves(grads)))


def _movable(state: TrainState) -> tuple:
    return state.trained, state.opt_state, state.average, state.smooth


def _gradients(
    loss_fn: LossFn, trained: dict, frozen: dict, batch: Any, accumulate: int, key: jax.Array | None = None
) -> tuple:
    """(gradient of the loss sum, loss sum, weight sum, other sums), added up over microbatches."""

    def total(trained: dict, batch: Any, *key: jax.Array) -> tuple:
        loss, weight, sums = loss_fn(trees.merge(trained, frozen), batch, *key)
        return jnp.float32(loss), (jnp.float32(weight), sums)

    def one(batch: Any, *key: jax.Array) -> tuple:
        (loss, (weight, sums)), grads = jax.value_and_grad(total, has_aux=True)(trained, batch, *key)
        return grads, loss, weight, sums

    keys = () if key is None else (key,)
    if accumulate == 1:
        return one(batch, *keys)
    leaves, treedef = jax.tree.flatten(batch)
    pieces = microbatches(leaves, accumulate), *(jax.random.split(key, accumulate) for key in keys)

    def part(piece: list, *key: jax.Array) -> tuple:
        return one(jax.tree.unflatten(treedef, piece), *key)

    def add(sums: tuple, piece: tuple) -> tuple:
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, part(*piece)), None

    shapes = jax.eval_shape(lambda p: part(*p), jax.tree.map(lambda x: x[0], pieces))
    # Gradients add up in float32 whatever the dtype of the weights.
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes[0])
    zeros = (start, *jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[1:]))
    grads, *rest = jax.lax.scan(add, zeros, pieces)[0]
    return jax.tree.map(lambda g, s: g.astype(s.dtype), grads, shapes[0]), *rest


def microbatches(leaves: list, count: int) -> list:
    """Each leaf [R, ...] -> [count, R / count, ...]: microbatch a takes every count-th group.

    A group (the smallest leading axis, a row where nothing is grouped) stays whole, so picture indices within a group
    stay right; the stride keeps each microbatch spread over all data shards.
    """
    groups = min(x.shape[0] for x in leaves)
    if groups % count or any(x.shape[0] % groups for x in leaves):
        raise ValueError(
            f"stage.accumulate={count} does not divide the batch: {groups} groups (leading axes "
            f"{sorted({x.shape[0] for x in leaves})}); choose a divisor of {groups}"
        )

    def cut(x: Any) -> Any:
        each = x.shape[0] // groups
        wide = x.reshape(groups // count, count, each, *x.shape[1:]).swapaxes(0, 1)
        return wide.reshape(count, groups // count * each, *x.shape[1:])

    return [cut(x) for x in leaves]


def _counts(batch: Any) -> dict:
    if not isinstance(batch, Batch):
        return {}
    pictures = batch.patch_segments.max(-1, initial=0).sum()
    return {
        "tokens": (batch.segments > 0).sum(),
        "targets": ((batch.weights > 0) & (batch.segments > 0)).sum(),
        "images": pictures,
    }
