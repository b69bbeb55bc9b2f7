import dataclasses
import doctest
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import lvlm_jax
from lvlm_jax import api, llm, zoo
from lvlm_jax import mesh as M
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.convert import export_folder
from tests.infer.tiny import few_shapes, tiny_system

QUESTION = {"prompt": "Which color is it?", "max_new_tokens": 8}


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    few_shapes(monkeypatch)


@pytest.fixture(scope="module")
def system():
    return tiny_system()


@pytest.fixture(scope="module")
def run(system, tmp_path_factory):
    """A workdir as training leaves it."""
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    workdir.mkdir()
    export_folder(workdir / "export", system.config, system.params, system.tokenizer, system.spec, system.template)
    return workdir


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(path)
    return path


def test_a_folder_and_its_workdir_load_as_what_was_exported(system, run, picture):
    for folder in (run, str(run / "export")):
        loaded = lvlm_jax.load(folder)
        assert loaded.config == system.config
        assert loaded.template == system.template
        assert loaded.spec == system.spec
        assert loaded.image_token_id == system.image_token_id
        assert loaded.model.dtype == jnp.float32
        assert loaded.generate(**QUESTION, images=picture) == system.generate(**QUESTION, images=picture)


def test_the_documented_example_runs(run, picture, monkeypatch, tmp_path):
    shutil.copytree(run, tmp_path / "runs" / "quickstart")
    shutil.copy(picture, tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestFinder().find(api.load, "load", globs={})[0]
    assert len(test.examples) == 5
    assert doctest.DocTestRunner().run(test).failed == 0


def test_it_loads_onto_a_mesh(system, run, picture):
    loaded = lvlm_jax.load(run, mesh=M.make_mesh("FSDP_TP"))
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(loaded.params))
    assert lvlm_jax.load(run, mesh="FSDP_TP").mesh == loaded.mesh
    assert loaded.generate(**QUESTION, images=picture) == system.generate(**QUESTION, images=picture)


def test_dtype_and_template_can_be_chosen(run):
    loaded = lvlm_jax.load(run, dtype=jnp.bfloat16, template="plain")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    assert loaded.template.name == "plain"
    assert loaded.stop_strings == ("\n",)
    with pytest.raises(ValueError, match="template='vicuna': choose one of plain, vicuna_v1, qwen_chatml"):
        lvlm_jax.load(run, template="vicuna")


@pytest.mark.parametrize("text", ["", 'You\'re \\ here.\nBe "brief".'])
def test_the_system_text_comes_back_out_of_the_chat_template(system, run, tmp_path, text):
    shutil.copytree(run / "export", tmp_path / "export")
    (tmp_path / "export" / "chat_template.jinja").write_text(system.template.with_system(text).jinja())
    assert lvlm_jax.load(tmp_path).template == system.template.with_system(text)


def test_a_folder_without_template_or_with_a_strange_one_gets_the_familys(system, run, tmp_path):
    shutil.copytree(run / "export", tmp_path / "export")
    (tmp_path / "export" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.warns(UserWarning, match="no chat template that is known here, so 'vicuna_v1' is used"):
        assert lvlm_jax.load(tmp_path).template.name == "vicuna_v1"


@pytest.mark.parametrize(
    ("like", "host", "name"),
    [
        ("llava15_7b", None, "vicuna_v1"),
        ("llava15_7b", "qwen25_0.5b", "qwen_chatml"),
        ("llava15_7b", "qwen3_0.6b", "qwen_chatml"),
        ("llava15_7b", "gemma2_2b", "gemma"),
        ("llava15_7b", "mistral_7b_v02", "mistral_instruct"),
        ("paligemma_3b_224", None, "paligemma"),
        ("paligemma2_3b_224", None, "paligemma"),
    ],
)
def test_the_template_of_a_family(like, host, name):
    config = zoo.SYSTEMS[like].config
    if host:
        config = dataclasses.replace(config, llm=llm.PRESETS[host])
    assert api.default_template(config) == name


def test_end_tokens_of_the_folder_end_an_answer(run, tmp_path):
    shutil.copytree(run / "export", tmp_path / "export")
    (tmp_path / "export" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    loaded = lvlm_jax.load(tmp_path)
    assert loaded.stop_ids == (2, 77)
    assert loaded.generator.eos_ids == {2, 77}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("absent/dir/x", FileNotFoundError, "no such folder"),
        ("runs/nope", FileNotFoundError, "runs/nope: no such folder here, nor .* If a folder of yours is meant, check"),
        ("llava15_7bb", FileNotFoundError, r"no system of that name \(did you mean 'llava15_7b'\?\), and not a hub"),
        ("empty", CheckpointError, "neither config.json nor export/config.json"),
    ],
)
def test_a_wrong_name_says_what_to_give(tmp_path, monkeypatch, name, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        lvlm_jax.load(name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mesh": "FSPD"}, ValueError, r"mesh='FSPD' \(did you mean 'FSDP'\?\): choose one of DP, FSDP, FSDP_TP, FSDP"),
        ({"dtype": "float8"}, ValueError, "dtype='float8': choose one of float32, bfloat16, float16, or 'stored'"),
        ({"dtype": "int8"}, ValueError, "dtype='int8': choose one of float32"),
        ({"adapter": "adapter"}, FileNotFoundError, r"^adapter= \(--adapter\): adapter: no such folder here, and not"),
        ({"tokenizer": "lvlm/absent"}, FileNotFoundError, "^tokenizer=: lvlm/absent: no such folder here, nor"),
    ],
)
def test_a_wrong_argument_says_what_to_give(run, options, error, message):
    with pytest.raises(error, match=message):
        lvlm_jax.load(run, **options)


def test_a_folder_that_does_not_say_how_pictures_are_prepared(run, tmp_path):
    shutil.copytree(run / "export", tmp_path / "export")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "export" / name).unlink()
    with pytest.raises(CheckpointError, match="no preprocessor_config"):
        lvlm_jax.load(tmp_path)


def test_a_run_that_has_not_finished_and_imported_weights_say_what_they_are(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    said = r"nothing is exported yet.*run the same lvlm train.*lvlm convert export .*export --overwrite"
    with pytest.raises(CheckpointError, match=said):
        lvlm_jax.load(tmp_path)
    (tmp_path / "weights" / "params").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="imported weights alone, for a recipe to start from"):
        lvlm_jax.load(tmp_path / "weights")


def test_a_system_shows_itself_in_a_line(system):
    assert repr(system).startswith("System(")
    assert len(repr(system)) < 300
