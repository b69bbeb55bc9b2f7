"""A pair that is added later: it trains alone, nothing else moves a bit, and its files go on top of a model without."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import assemble, cli, recipe
from lvlm_jax import params as trees
from lvlm_jax.checkpoint import load_params
from lvlm_jax.config import ConfigError
from lvlm_jax.data.easy_vqa import EasyVqa
from lvlm_jax.hub.export import export_folder
from lvlm_jax.hub.senses import add, part_of
from lvlm_jax.models.lvlm import LVLM
from lvlm_jax.recipe import Data, StageRecipe
from lvlm_jax.run import Run
from lvlm_jax.train.loop import IndexedBatches, fit
from lvlm_jax.train.optim import OptimizerConfig
from tests import tiny

I = tiny.IMAGE
# Decay and clipping would move or mix in a frozen leaf that the optimizer knew of.
ADAM = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip=0.5)


def bits(tree):
    """Every leaf as bytes, by path."""
    return {path: np.asarray(leaf).tobytes() for path, leaf in trees.flatten(tree).items()}


def test_a_pair_trains_alone_and_goes_elsewhere(tmp_path):
    config, params = tiny.SENSED, jax.tree.map(jnp.asarray, tiny.weights(tiny.SENSED))
    stage = StageRecipe(trains=("senses/audio/**",), steps=3, optimizer=ADAM, data=Data(source="easy_vqa"))
    before = bits(params)
    batch = lambda k: tiny.sensed(tiny.batch(config, [[9, I, 4], [8, I, 1, I, 5]], seed=k)[0], seed=k)  # noqa: E731
    after = fit(
        stage.stage("add"),
        loss_fn=assemble.loss_of(stage, LVLM(config), False),
        params=params,
        batches=IndexedBatches(batch),
        workdir=tmp_path / "run",
    )
    moved = {path for path, value in bits(after).items() if value != before[path]}
    assert moved == {path for path in before if path.startswith("senses/audio/")}

    pair, own = part_of(config, after, "senses/audio")
    export_folder(tmp_path / "audio", pair, own)
    plain = dataclasses.replace(config, senses=config.senses[1:])
    lacking = {**params, "senses": {"depth": params["senses"]["depth"]}}
    grown_config, grown = add(plain, lacking, tmp_path / "audio")
    assert bits(grown) == bits(after)
    shown = jax.tree.map(jnp.asarray, batch(7))
    run = lambda config, params: LVLM(config).apply({"params": params}, shown, method=tiny.logits)  # noqa: E731
    np.testing.assert_array_equal(run(grown_config, grown), run(config, after))


@pytest.mark.nightly
def test_the_recipe_on_top_of_the_quickstart(tmp_path, monkeypatch, capsys):
    """The command line's way: train, add a sense, ship it, ask on top of the run that lacks it."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", "quickstart:tiny", "--workdir", "runs/tiny"]) == 0
    assert cli.main(["train", "--config", "quickstart_senses:tiny", "--workdir", "runs/senses"]) == 0
    assert "senses/cells: begins at random, runs/tiny holds none" in capsys.readouterr().err
    base, grown = bits(load_params("runs/tiny/instruct/params")), bits(load_params("runs/senses/add/params"))
    assert {path: value for path, value in grown.items() if not path.startswith("senses/")} == base

    assert cli.main(["convert", "export", "runs/senses", "cells", "--part", "senses/cells"]) == 0
    assert json.loads((tmp_path / "cells" / "config.json").read_text())["decoder_width"] == 96
    example = EasyVqa("test", sense="cells")[0]
    np.save("f.npy", example.turns[0].segments[0].source)
    said = []
    for model, more in (("runs/senses", []), ("runs/tiny", ["--sense", "cells"])):
        words = ["--features", "cells=f.npy", "--prompt", "what color is the shape?", "--max-new-tokens", "4"]
        capsys.readouterr()
        assert cli.main(["generate", model, *more, *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]

    # A third run takes the pair from the folder and all else from the first.
    start = ["--config.stages.add.trains=('connector/**',)", "--config.stages.add.data.senses.cells=64"]
    found = recipe.load("quickstart_senses:tiny", start)
    both = {"all": recipe.Start(workdir="runs/tiny"), "senses/cells": recipe.Start(hub="cells")}
    stage = dataclasses.replace(found.stages["add"], start=both)
    run = Run(dataclasses.replace(found, stages={"add": stage}), tmp_path / "runs" / "third")
    params = run.start("add", stage, *assemble.stage_model(found, stage))
    assert bits(params) == grown


def test_a_pair_for_another_width(tmp_path):
    """A start names both widths, and where each stands."""
    pair, own = part_of(tiny.SENSED, tiny.weights(tiny.SENSED), "senses/audio")
    export_folder(tmp_path / "audio", pair, own)
    found = recipe.load("quickstart_senses:tiny")
    stage = dataclasses.replace(found.stages["add"], start={"senses/cells": recipe.Start(hub=str(tmp_path / "audio"))})
    run = Run(dataclasses.replace(found, stages={"add": stage}), tmp_path / "run")
    message = r"audio: its connector gives tokens of 32 values, .*, but config\.model\.llm\.width is 96"
    with pytest.raises(ConfigError, match=message):
        run.start("add", stage, *assemble.stage_model(found, stage))
