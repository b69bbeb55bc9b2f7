"""Frozen is frozen: the same bits after a stage, no moments, one copy on disk, on a whole small model."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import assemble
from lvlm_jax import params as trees
from lvlm_jax.checkpoint import by_path, load_params
from lvlm_jax.models.lvlm import LVLM
from lvlm_jax.recipe import Data, StageRecipe
from lvlm_jax.train.loop import IndexedBatches, fit
from lvlm_jax.train.optim import OptimizerConfig
from tests import tiny

I = tiny.IMAGE
CONFIG = tiny.SYSTEMS["llava15"]
# Decay and clipping would move or mix in a frozen leaf that the optimizer knew of.
ADAM = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip=0.5)
STAGES = {
    "align": ("connector/**",),
    "instruct": ("connector/**", "llm/**"),
    "flamingo": ("fusion/**", "connector/**"),
    "patterns": ("vision/trunk/layers/*/mlp/**", "llm/norm/scale", "llm/layers/1/attn/**"),
}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, tiny.weights(CONFIG))


def run(name, params, workdir, earlier=(), config=CONFIG):
    """(parameters after three steps of a stage, the paths of its state after each step)."""
    recipe = StageRecipe(trains=STAGES[name], steps=3, optimizer=ADAM, data=Data(source="easy_vqa"))
    stage, seen = recipe.stage(name), []
    head = trees.flatten(stage.mask(params))["llm/head/kernel"]
    after = fit(
        stage,
        loss_fn=assemble.loss_of(recipe, LVLM(config), head),
        params=params,
        batches=IndexedBatches(lambda k: tiny.batch(config, [[3, I, 4], [2, I, 1, I, 5]], seed=k)[0]),
        workdir=workdir,
        earlier=earlier,
        hooks=(lambda step, state, metrics: seen.append(set(by_path(state)[0])),),
    )
    return after, seen


def bits(tree):
    """Every leaf as bytes, by path."""
    return {path: np.asarray(leaf).tobytes() for path, leaf in trees.flatten(tree).items()}


def cards(folder: Path):
    """The manifest's word for every leaf of a saved tree."""
    return json.loads((folder / "manifest.json").read_text())["leaves"]


def check(name, before, after, seen, folder):
    """Everything that is true of a stage's frozen leaves."""
    before, after = bits(before), bits(after)
    trained = {path for path, on in trees.match(before, STAGES[name]).items() if on}
    frozen = before.keys() - trained
    assert {path for path in frozen if after[path] != before[path]} == set()
    # The tower's last layer gets no gradient: LLaVA reads the layer before it.
    still = {path for path in trained if after[path] == before[path]}
    assert {path for path in still if not path.startswith("vision/trunk/layers/2/")} == set()

    for paths in (*seen, cards(folder / "checkpoints" / "3").keys()):
        for kind in ("mu/", "nu/", "trained/"):
            assert {path.partition(kind)[2] for path in paths if kind in path} == trained
        assert not any(path.endswith(f"/{leaf}") for path in paths for leaf in frozen)

    assert bits(load_params(folder / "frozen")) == {path: before[path] for path in frozen}
    assert bits(load_params(folder / "params")) == after


def test_align_then_instruct(params, tmp_path):
    aligned, seen = run("align", params, tmp_path)
    check("align", params, aligned, seen, tmp_path / "align")
    tuned, seen = run("instruct", aligned, tmp_path, earlier=[tmp_path / "align"])
    check("instruct", aligned, tuned, seen, tmp_path / "instruct")
    assert bits(tuned["vision"]) == bits(params["vision"])
    for kept in ("frozen", "params"):
        homes = {path: card.get("folder") for path, card in cards(tmp_path / "instruct" / kept).items()}
        assert {home for path, home in homes.items() if path.startswith("vision/")} == {"../../align/frozen"}
        assert {home for path, home in homes.items() if not path.startswith("vision/")} <= {None}


@pytest.mark.slow
def test_patterns_across_the_parts(params, tmp_path):
    after, seen = run("patterns", params, tmp_path)
    check("patterns", params, after, seen, tmp_path / "patterns")


@pytest.mark.nightly
def test_gated_blocks_and_resampler(tmp_path):
    """What Flamingo trains: tower and language model keep their bits, and so do the words beside its own."""
    config = tiny.SYSTEMS["flamingo"]
    params = jax.tree.map(jnp.asarray, tiny.weights(config))
    after, seen = run("flamingo", params, tmp_path, config=config)
    check("flamingo", params, after, seen, tmp_path / "flamingo")
