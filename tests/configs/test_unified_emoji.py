"""The unified recipe whole, on three concepts that are made here: train, score, report, load, write and draw."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest

import lvlm_jax
from lvlm_jax import cli, recipe
from lvlm_jax import params as P
from lvlm_jax.checkpoint import load_params
from lvlm_jax.infer.interleaved import InterleavedSystem
from lvlm_jax.train.log import read_rows
from tests.data.test_emoji import packages

NAMES = {"grinning face", "red heart", "red apple"}


def test_the_vendor_left_out_is_in_no_stage():
    found = recipe.load("unified_emoji")
    for stage in found.stages.values():
        for data in stage.data.members.values() or [stage.data]:
            assert "fluent" not in data.vendors
    assert "fluent" in found.evaluation.data.vendors


def test_what_the_kit_is():
    kit, plain = recipe.load("unified_emoji"), recipe.load("unified_emoji:plain")
    assert (kit.model.llm.qk_norm, plain.model.llm.qk_norm) == ("head_layer", False)
    one, other = (found.stages["unified"] for found in (kit, plain))
    assert (one.settings, other.settings) == ({"z_loss": 1e-5}, {})
    assert (one.optimizer.warmup, other.optimizer.warmup) == (0.05, 0)
    assert (one.spike.factor, other.spike.factor) == (3.0, 0.0)
    assert kit.stages["vq"] == plain.stages["vq"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return packages(tmp_path_factory.mktemp("emoji"))


def train(root, workdir, *words):
    """The command, its data in the folder of the test."""
    data = [f"--config.model.tokenizer=emoji:{root}", f"--config.evaluation.data.path={root}"]
    data += [f"--config.stages.vq.data.path={root}"]
    data += [f"--config.stages.unified.data.members.{name}.path={root}" for name in ("say", "draw")]
    assert cli.main(["train", "--config", "unified_emoji:tiny", "--workdir", str(workdir), *data, *words]) == 0
    return workdir


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    return train(root, tmp_path_factory.mktemp("runs") / "first")


@pytest.mark.nightly
def test_a_run_scores_names_and_drawings(run):
    summary = json.loads((run / "evaluation" / "after_unified" / "summary.json").read_text())
    assert {"exact_match", "exact_match[twemoji]", "exact_match[fluent]", "drawn@1", "drawn@10"} <= set(
        summary["scores"]
    )
    assert summary["scores"]["drawn@10"] == 1.0  # of three concepts each is among the nearest ten
    samples = [json.loads(line) for line in (run / "evaluation" / "after_unified" / "samples.jsonl").open()]
    drawn = [one for one in samples if one["question"].startswith("Draw: ")]
    assert {one["references"][0] for one in drawn} == NAMES
    for one in drawn:
        with PIL.Image.open(one["images"][0]) as picture:
            assert picture.size == (16, 16)
    assert sum(one["question"].startswith("Write and draw") for one in samples) == 3
    page = (run / "report.html").read_text()
    assert page.count("<img") >= 3
    rows = read_rows(run / "vq" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all({"reconstruction", "commitment", "codebook"} <= row.keys() for row in rows)
    # The tokenizer that the second stage read with is the first one's, bit for bit.
    one, other = (P.flatten(load_params(run / name / "params")["vision"]) for name in ("vq", "unified"))
    for path, leaf in one.items():
        np.testing.assert_array_equal(other[path], leaf, err_msg=path)


@pytest.mark.nightly
def test_the_workdir_loads_and_answers(run, tmp_path, capsys):
    model = lvlm_jax.load(run)
    assert isinstance(model, InterleavedSystem)
    assert model.config == recipe.load("unified_emoji:tiny").model.config
    trained = P.flatten(load_params(run / "unified" / "params"))
    for path, leaf in P.flatten(model.params).items():
        np.testing.assert_array_equal(leaf, trained[path], err_msg=path)
    picture = model.generate("red apple", picture=True, max_new_tokens=17)[0]
    assert picture.shape == (16, 16, 3)
    out = tmp_path / "drawn.png"
    line = ["generate", str(run), "--prompt", "red apple", "--picture", "--draw", str(out), "--max-new-tokens", "20"]
    assert cli.main(line) == 0
    assert f"[picture: {out}]" in capsys.readouterr().out
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(out)), picture)
    assert cli.main(["chat", str(run)]) == 2
    assert "has no chat format; ask by lvlm generate" in capsys.readouterr().err
    assert cli.main(["generate", str(run), "--prompt", "a", "--beams", "2", "--system", "b"]) == 2
    assert "--system, --beams: not of a model that reads and writes text and pictures" in capsys.readouterr().err
    assert cli.main(["convert", "export", str(run), str(tmp_path / "again")]) == 0
    again = P.flatten(lvlm_jax.load(tmp_path / "again").params)
    assert all(np.array_equal(again[path], leaf) for path, leaf in trained.items())
    with pytest.raises(ValueError, match="takes no template=; leave it out"):
        lvlm_jax.load(run, template="vicuna_v1")


@pytest.mark.nightly
def test_a_second_run_shows_the_first_one_beside(root, run, tmp_path):
    """The same command again draws the page anew, without a step."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    train(root, other, f"--config.beside={run}")
    page = (other / "report.html").read_text()
    assert page.count('class="beside"') == 2
    assert "Dashed: the same stage of first, loss" in page
    assert 'class="beside"' not in (run / "report.html").read_text()


@pytest.mark.nightly
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(root, run, tmp_path):
    """Both stages are taken up in the middle: the codebook's start and the order of batches are drawn again."""
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for name in ("vq", "unified"):
        for gone in ("params", "checkpoints/4"):
            shutil.rmtree(again / name / gone)
    train(root, again)
    for name in ("vq", "unified"):
        one, other = (P.flatten(load_params(folder / name / "params")) for folder in (run, again))
        assert one.keys() == other.keys()
        for path, leaf in one.items():
            np.testing.assert_array_equal(other[path], leaf, err_msg=path)
