"""The Qwen2.5-VL recipe: what the authors ran, and two steps of it at a tiny size on 8 devices."""

import json

import jax
import numpy as np
import PIL.Image
import pytest

import lvlm_jax
from lvlm_jax import params as P
from lvlm_jax import recipe, run, zoo
from lvlm_jax.checkpoint import load_params
from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.processing.tokenizer import Tokenizer
from tests import tiny
from tests.hub.test_qwen_vl import WORDS
from tests.parity.qwen_vl_tiny import picture
from tests.tokenizers_tiny import qwen_tiny


def test_what_the_authors_ran():
    found = recipe.load("qwen2_5_vl_finetune")
    tune = found.stages["tune"]
    assert tune.trains == ("connector/**", "llm/**")
    assert (tune.optimizer.learning_rate, tune.optimizer.warmup, tune.optimizer.clip) == (2e-7, 0.03, 1.0)
    assert (found.model.image.native.min_pixels, found.model.image.native.max_pixels) == (784, 50176)
    assert recipe.load("qwen2_5_vl_finetune:7b") == found
    assert found.model.lvlm.llm == zoo.SYSTEMS["qwen2_5_vl_7b"].config.llm


SIZES = {
    "vision.patch_size": 4,
    "vision.width": 32,
    "vision.depth": 2,
    "vision.heads": 4,
    "vision.mlp_dim": 40,
    "vision.window": 4,
    "vision.whole": (1,),
    "vision.max_patches": 48,
    "image.patch": 4,
    "image.size": 24,
    "image.max_patches": 48,
    "image.native.window": 4,
    "image.native.min_pixels": 128,
    "image.native.max_pixels": 768,
    "image.native.min_frame": 128,
    "image.native.max_frame": 768,
    "llm.width": 32,
    "llm.depth": 2,
    "llm.heads": 4,
    "llm.kv_heads": 2,
    "llm.mlp_dim": 48,
    "llm.mrope": (1, 1, 2),
}


def small(folder, words):
    """The recipe's words of command for a tiny model, whose weights and data are made in `folder`."""
    records = []
    for number, size in enumerate([(24, 16), (17, 30), (8, 8), (40, 20)] * 4):
        picture(size).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "a cat"}]
        records.append({"image": f"{number}.png", "conversations": turns})
    (folder / "talk.json").write_text(json.dumps(records))
    data = {"path": folder / "talk.json", "images": folder, "rows": 8, "groups": 8, "length": 64, "pictures": 16}
    fields = {f"model.{name}": value for name, value in SIZES.items()}
    fields |= {"model.llm.vocab": words.vocab_size, "model.image_token_id": words.special_id("<|image_pad|>")}
    fields |= {f"stages.tune.data.{name}": value for name, value in data.items()}
    fields |= {"stages.tune.data.workers": 0, "stages.tune.steps": 2, "model.tokenizer": folder / "start"}
    fields["stages.tune.start.all.hub"] = folder / "start"
    return [f"--config.{name}={value}" for name, value in fields.items()]


@pytest.mark.slow
def test_two_steps(tmp_path):
    words = Tokenizer(qwen_tiny(extra=WORDS))
    found = recipe.load("qwen2_5_vl_finetune", small(tmp_path, words))
    config = found.model.lvlm
    export_folder(tmp_path / "start", config, tiny.weights(config), words, found.model.image, "qwen2_vl")
    run.train(found, tmp_path / "run")
    assert len(jax.devices()) == 8
    start, end = import_folder(tmp_path / "start").params, load_params(tmp_path / "run" / "tune" / "params")
    moved = {
        path.split("/")[0] for path, leaf in P.flatten(end).items() if not np.array_equal(leaf, P.flatten(start)[path])
    }
    assert moved == {"connector", "llm"}
    model = lvlm_jax.load(tmp_path / "run")
    assert model.template.name == "qwen2_vl"
    shown = PIL.Image.open(tmp_path / "1.png")
    assert isinstance(model.generate("What is it?", images=shown, max_new_tokens=4), str)
