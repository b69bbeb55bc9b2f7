"""BLIP-2's first stage and the P-Former before it, tiny, on eight devices: they run, resume, and hand on."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest

from lvlm_jax import assemble, cli, finished, recipe, starts
from lvlm_jax import params as P
from lvlm_jax.checkpoint import load_params
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.train.log import read_rows
from tests.tokenizers_tiny import bert_tiny, llama_tiny

CAPTIONS = (
    "a black cat",
    "two yellow birds",
    "the brown fox",
    "a red circle",
    "a lazy dog",
    "the river",
    "a blue triangle",
)


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Seven pictures with captions: a batch of eight rows has one that only fills it up."""
    folder = tmp_path_factory.mktemp("album")
    rng, lines = np.random.default_rng(0), []
    for number, caption in enumerate(CAPTIONS):
        PIL.Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        lines.append(json.dumps({"image": f"{number}.png", "conversations": turns}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    Tokenizer(bert_tiny()).save(folder / "bert")
    Tokenizer(llama_tiny()).save(folder / "llama")
    return folder


def qformer(album, workdir, *words):
    data = {"source": "llava_json", "path": album / "captions.jsonl"}
    data = [f"--config.stages.qformer.data.{name}={value}" for name, value in data.items()]
    words = [f"--config.model.tokenizer={album / 'bert'}", *data, *words]
    assert cli.main(["train", "--config", "blip2_stage1:tiny", "--workdir", str(workdir), *words]) == 0
    return workdir


def pformer(album, workdir, *words):
    texts = {"tokenizer": album / "llama", "reader": album / "bert"}
    texts = [f"--config.model.{name}={value}" for name, value in texts.items()]
    words = [*texts, f"--config.stages.pformer.data.path={album / 'captions.jsonl'}", *words]
    assert cli.main(["train", "--config", "pformer_pretrain:tiny", "--workdir", str(workdir), *words]) == 0
    return workdir


CASES = {
    "qformer": (qformer, ("itc", "itm", "itg"), ()),
    "pformer": (pformer, ("language", "vocabulary", "sentence"), ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("qformer", marks=pytest.mark.nightly), "pformer"])
def test_steps_and_a_resumed_run_with_the_same_bits(album, tmp_path, name):
    """What is drawn, negatives or hidden words, follows from the seed and the step alone."""
    train, parts, words = CASES[name]
    whole = train(album, tmp_path / "whole", *words)
    rows = read_rows(whole / name / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[part] for part in parts), rel=1e-5)
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    for gone in ("params", "checkpoints/4"):
        shutil.rmtree(again / name / gone)
    train(album, again, *words)
    one, other = (P.flatten(load_params(folder / name / "params")) for folder in (whole, again))
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(other[path], leaf, err_msg=path)


SECOND = """
from ml_collections import ConfigDict
from lvlm_jax.config import find, load

def get_config(arg=""):
    c = load(f"{find('blip2_stage2')}:tiny")
    c.unlock()
    parts = ("vision/post_norm", "connector/qformer")
    c.stages.generate.start = ConfigDict({part: {"workdir": WORKDIR} for part in parts})
    return c
"""


@pytest.mark.slow
def test_the_second_stage_begins_with_the_first(album, tmp_path, capsys):
    first = qformer(album, tmp_path / "first")
    file = tmp_path / "second.py"
    file.write_text(SECOND.replace("WORKDIR", repr(str(first))))
    found = recipe.load(str(file))
    stage = found.stages["generate"]
    like = P.flatten(assemble.stage_shapes(found, stage)[0])
    capsys.readouterr()
    got = P.flatten(P.unstack_layers(P.unflatten(starts.leaves(found, tmp_path, "start", stage.start, like, None))))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    layer = ", ".join(f"qformer/layers/*/layer{i}/{name}" for i in range(2) for name in ("mlp", "mlp_norm"))
    assert said == (
        f"{first}: match_head, qformer/embed, {layer}, qformer/position_embed, temperature, text_projection, "
        "vision_projection, word_head left out, of which this model has none"
    )
    left = P.flatten(load_params(first / "qformer" / "params"))
    assert {path.split("/")[0] for path in got} == {"connector", "vision"}
    assert "connector/qformer/layers/0/layer1/query_mlp/up/kernel" in got
    for path, leaf in got.items():
        np.testing.assert_array_equal(leaf, left[path.removeprefix("connector/")], err_msg=path)
    assert cli.main(["train", "--config", str(file), "--workdir", str(tmp_path / "second")]) == 0
    losses = [row["loss"] for row in read_rows(tmp_path / "second" / "generate" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_what_stands_at_the_top_of_another_model():
    saved = ["qformer/queries", "vision/post_norm/scale"]
    assert finished.front_of("connector/qformer", saved) == "connector/"
    assert finished.front_of("connector/qformer/queries", saved) == "connector/"
    for part in ("all", "vision/post_norm", "qformer", "connector", "connector/linear_1", "connector/qformer/norm"):
        assert finished.front_of(part, saved) == ""
    assert finished.front_of("connector/qformer", [*saved, "connector/qformer/queries"]) == ""


@pytest.mark.nightly
def test_the_alignment_with_a_pformer_that_was_trained_before(album, tmp_path):
    """BLIText's two stages, one behind the other: the P-Former stays as it was, and the queries come nearer."""
    first = pformer(album, tmp_path / "pformer")
    sizes = {
        "prompt": 4,
        "contrast": 8,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "mlp_dim": 32,
        "vocab": 512,
        "context": 16,
    }
    file = tmp_path / "aligned.py"
    file.write_text(
        "from lvlm_jax.config import find, load\n"
        "def get_config(arg=''):\n"
        "    c = load(f\"{find('blip2_stage1')}:tiny\")\n"
        "    c.unlock()\n"
        f"    c.model.pformer, c.model.language_width = {sizes!r}, 16\n"
        "    stage = c.stages.qformer\n"
        "    stage.settings.align, stage.steps = 10.0, 30\n"
        "    stage.trains = (*stage.trains, 'language_projection/**')\n"
        f"    stage.start = {{'pformer': {{'workdir': {str(first)!r}}}}}\n"
        "    return c\n"
    )
    data = [
        f"--config.stages.qformer.data.path={album / 'captions.jsonl'}",
        "--config.stages.qformer.data.source=llava_json",
    ]
    words = ["train", "--config", str(file), "--workdir", str(tmp_path / "run"), *data]
    assert cli.main([*words, f"--config.model.tokenizer={album / 'bert'}"]) == 0
    rows = read_rows(tmp_path / "run" / "qformer" / "metrics.jsonl")
    assert rows[-1]["align"] < rows[0]["align"]
    before = P.flatten(load_params(first / "pformer" / "params")["pformer"])
    after = P.flatten(load_params(tmp_path / "run" / "qformer" / "params")["pformer"])
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)


@pytest.mark.nightly
def test_retrieval_is_scored_by_contrast_and_by_matching(album, tmp_path):
    file = tmp_path / "scored.py"
    file.write_text(
        "from lvlm_jax.config import find, load\n"
        "def get_config(arg=''):\n"
        "    c = load(f\"{find('blip2_stage1')}:tiny\")\n"
        "    c.unlock()\n"
        "    c.stages.qformer.evaluate = ('after',)\n"
        f"    data = {{'source': 'llava_json', 'path': {str(album / 'captions.jsonl')!r}, 'length': 16}}\n"
        "    c.evaluation = {'data': data, 'rows': 4}\n"
        "    return c\n"
    )
    data = [
        f"--config.stages.qformer.data.path={album / 'captions.jsonl'}",
        "--config.stages.qformer.data.source=llava_json",
    ]
    words = ["train", "--config", str(file), "--workdir", str(tmp_path / "run"), *data]
    assert cli.main([*words, f"--config.model.tokenizer={album / 'bert'}"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation" / "after_qformer" / "summary.json").read_text())
    assert found["pictures"] == found["samples"] == len(CAPTIONS)
    assert {
        f"recall_{way}{how}@{k}" for way in ("to_text", "to_image") for how in ("", "_matched") for k in (1, 5, 10)
    } == (set(found["scores"]))
    assert all(found["scores"][name] == 1.0 for name in found["scores"] if name.endswith("@10"))
