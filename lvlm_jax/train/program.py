"""The compiled step of a stage, and where its state, its frozen weights and its batches lie."""

from collections.abc import Mapping
from typing import Any

import jax

from lvlm_jax import mesh as meshes
from lvlm_jax import params as trees
from lvlm_jax.checkpoint import by_path
from lvlm_jax.train.optim import make_optimizer, make_schedule
from lvlm_jax.train.stages import Stage
from lvlm_jax.train.step import LossFn, TrainState, init_state, make_train_step


class Program:
    """One stage on one mesh: what the loop runs and what ``lvlm plan`` compiles for devices that nobody holds.

    Args:
      trained, frozen: the stage's two halves as it runs them (`stages.in_stage_dtype`): arrays, or shapes alone.
      mesh, axes: where to run, and the logical axis names of each leaf of both; without a mesh on the first device.
      key: of a loss that draws (`step.make_train_step`).

    step: (state, frozen, batch) -> (state, metrics). state: shapes and shardings of a `TrainState`. frozen: shardings
    of the frozen tree. batch: the sharding of every leaf of a batch, its leading axis over the data axes.
    """

    def __init__(
        self,
        stage: Stage,
        loss_fn: LossFn,
        trained: Mapping,
        frozen: Mapping,
        mesh: meshes.AnyMesh | None = None,
        axes: Any = None,
        key: jax.Array | None = None,
    ) -> None:
        self._smooth = stage.average is not None
        self._tx = make_optimizer(stage.optimizer, stage.steps, trained)
        if mesh is None:
            one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            where, apart, self.batch, self.frozen = jax.tree.map(lambda x: one, trained), one, one, one
        else:
            moved, still = (None, None) if axes is None else (_of(axes, tree) for tree in (trained, frozen))
            where, self.frozen = meshes.shardings(mesh, moved, trained), meshes.shardings(mesh, still, frozen)
            apart = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            self.batch = meshes.batch_sharding(mesh)
        shapes = jax.eval_shape(self.init, trained)
        at = _like_trained(shapes, trees.flatten(trained), trees.flatten(where), apart)
        self.state = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, at)
        self.step = make_train_step(
            loss_fn,
            self._tx,
            accumulate=stage.accumulate,
            spike=stage.spike,
            schedule=make_schedule(stage.optimizer, stage.steps),
            shardings=at,
            decay=stage.average.decay if stage.average else 0.0,
            key=key,
        )

    def init(self, trained: Mapping) -> TrainState:
        """The state before the first step."""
        return init_state(trained, self._tx, smooth=self._smooth)

    def fresh(self, trained: Mapping) -> TrainState:
        """The same on the devices; the trained leaves are copies, since the step donates them."""
        at = jax.tree.map(lambda s: s.sharding, self.state)
        copies = jax.device_put(dict(trained), at.trained, may_alias=False)
        return jax.jit(self.init, out_shardings=at)(copies)


def _of(axes: Mapping, tree: Mapping) -> dict:
    """The axis names of the leaves of one half."""
    names = trees.flatten(axes)
    return trees.unflatten({path: names[path] for path in trees.flatten(tree)})


def _like_trained(shapes: Any, trained: dict, where: dict, otherwise: Any) -> Any:
    """Shardings of a state: a moment lies as its parameter does (its path ends in the parameter's), the rest whole."""
    flat, treedef = by_path(shapes)
    found = []
    for path, leaf in flat.items():
        keys = path.split("/")
        ends = ("/".join(keys[i:]) for i in range(len(keys)))
        end = next((e for e in ends if e in trained and trained[e].shape == leaf.shape), None)
        found.append(otherwise if end is None else where[end])
    return jax.tree.unflatten(treedef, found)
