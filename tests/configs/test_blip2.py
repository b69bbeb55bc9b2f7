"""BLIP-2's and InstructBLIP's recipes at tiny size: two steps on 8 devices, a model that is loaded and asked."""

import numpy as np
import pytest

import lvlm_jax
from lvlm_jax import recipe, run
from lvlm_jax.train.log import read_rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "stage"),
    [("blip2_stage2:tiny", "generate"), pytest.param("instructblip:tiny", "tune", marks=pytest.mark.nightly)],
)
def test_two_steps_and_an_answer(tmp_path, word, stage):
    found = recipe.load(word)
    run.train(found, tmp_path / "run")
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / stage / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    model = lvlm_jax.load(tmp_path / "run")
    assert (model.instruction is not None) == found.model.lvlm.instructed
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    assert isinstance(model.generate("what color is the shape ?", images=picture, max_new_tokens=3), str)
    chat = model.chat()
    assert isinstance(chat.ask("what color is the shape ?", images=picture, max_new_tokens=3, beams=2), str)
