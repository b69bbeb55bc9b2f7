"""Sharded equals unsharded, for a training step and for greedy generation, on eight virtual devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import assemble
from lvlm_jax import mesh as meshes
from lvlm_jax import params as trees
from lvlm_jax.models.lvlm import dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.recipe import Data, StageRecipe
from lvlm_jax.train.loop import IndexedBatches, fit
from lvlm_jax.train.optim import OptimizerConfig
from tests import tiny
from tests.infer.tiny import tiny_system

I = tiny.IMAGE
ROWS = [[3, I, 4], [9], [2, I, 1, I, 5], [6, I, 3], [1, I, 8], [4], [7, I, 2], [2, I, 2]]
# Adam divides by the gradient's size: where that is no more than rounding, the direction of the step is chance. An eps
# above the rounding keeps the update a smooth function of the gradient, so that parameters can be compared too.
ADAM = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip=1.0, eps=1e-3)
STAGE = StageRecipe(
    trains=("connector/**", "llm/**"), steps=1, optimizer=ADAM, data=Data(source="easy_vqa"), log_every=1
)
# Sums over rows and over widths are cut into eight parts and added in another order: float32 keeps 6e-8 of the largest
# term, and a step adds up a few thousand of them.
TOLERANCE = 5e-6


def start():
    """A model and its weights for the training step.

    Not those of `tiny_system`, which are so large that pictures moved by one unit in the last place move gradients by
    5e-6 on a single device: no comparison could be finer. Here they move by 7e-7.
    """
    model = tiny_system(scan=True).model
    return model, jax.tree.map(jnp.asarray, trees.stack_layers(tiny.weights(model.config)))


def step(workdir, mesh):
    """(loss, gradient norm, first moments = gradients times 1 - b1, parameters after the step), and how they lie."""
    model, params = start()
    head = trees.flatten(STAGE.stage("instruct").mask(params))["llm/head/kernel"]
    seen, lay = {}, {}

    def look(step, state, metrics):
        found = {"loss": metrics["loss"], "norm": metrics["grad_norm"], "gradients": _moments(state.opt_state)}
        seen.update(jax.device_get(found))
        kernel = state.trained["llm"]["layers"]["mlp"]["up"]["kernel"]
        lay["parts"] = kernel.size // kernel.addressable_shards[0].data.size

    axes = abstract(model, dummy_batch(model.config))[1]
    if mesh is not None:
        params = jax.device_put(jax.device_get(params), meshes.shardings(mesh, axes, params))
    after = fit(
        STAGE.stage("instruct"),
        loss_fn=assemble.loss_of(STAGE, model, head, mesh),
        params=params,
        batches=IndexedBatches(lambda k: tiny.batch(model.config, ROWS, groups=8, length=24, image_id=5)[0]),
        workdir=workdir,
        mesh=mesh,
        axes=axes,
        hooks=(look,),
    )
    return seen | {"params": jax.device_get(after)}, lay["parts"]


def _moments(opt_state):
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    return next(part.mu for part in parts if hasattr(part, "mu"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The step on one device."""
    return step(tmp_path_factory.mktemp("whole"), None)[0]


# In the default run tests/models has the loss and gradients of every preset.
PARTS = {"DP": 1, "FSDP": 8, "FSDP_TP": 8, "FSDP_TP_SP": 8}
CUTS = [pytest.param(name, marks=() if name == "FSDP" else pytest.mark.slow) for name in PARTS]


@pytest.mark.parametrize("preset", CUTS)
def test_a_training_step(preset, whole, tmp_path):
    got, cut = step(tmp_path, meshes.make_mesh(preset))
    assert cut == PARTS[preset]
    assert whole["norm"] > 0.1
    np.testing.assert_allclose(got["loss"], whole["loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(got["norm"], whole["norm"], rtol=TOLERANCE)
    for name in ("gradients", "params"):
        ours, wanted = trees.flatten(got[name]), trees.flatten(whole[name])
        assert ours.keys() == wanted.keys()
        for path, leaf in wanted.items():
            np.testing.assert_allclose(ours[path], leaf, atol=TOLERANCE * np.abs(leaf).max(), rtol=0, err_msg=path)
    before = trees.flatten(start()[1])
    moved = [path for path, leaf in trees.flatten(whole["params"]).items() if not np.array_equal(leaf, before[path])]
    assert sorted(moved) == sorted(path for path in before if not path.startswith("vision/"))


PICTURES = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), dtype=np.uint8)
PROMPTS = [
    ["What is the color of ", PICTURES[0], "?"],
    "How many dogs are there?",
    ["Describe this picture", PICTURES[1]],
    [PICTURES[2], "and", PICTURES[3], "differ in what?"],
    [PICTURES[4]],
    "yes or no",
    ["Is there a blue triangle?", PICTURES[5]],
    [PICTURES[6], PICTURES[7]],
    ["the last of nine", PICTURES[0]],
]


@pytest.fixture(scope="module")
def answers():
    return [a.tokens for a in tiny_system().answer_batch(PROMPTS, max_new_tokens=12, rows=16)]


@pytest.mark.parametrize("preset", meshes.PRESETS)
def test_greedy_generation(preset, answers):
    """The same tokens, not merely near ones; a tie between two of 512 float32 scores does not occur here."""
    assert len(set(answers)) == len(PROMPTS)
    mesh = meshes.make_mesh(preset)
    system = dataclasses.replace(tiny_system(), mesh=mesh)
    kernel = system.generator.params["llm"]["layers"]["0"]["mlp"]["up"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert [a.tokens for a in system.answer_batch(PROMPTS, max_new_tokens=12, rows=16)] == answers
    assert jnp.size(kernel) == kernel.addressable_shards[0].data.size * PARTS[preset]
