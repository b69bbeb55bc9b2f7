"""The recipe for one's own data, from a folder of the torch library's layout to an answer and an adapter."""

import json

import jax
import numpy as np
import PIL.Image
import pytest

import lvlm_jax
from lvlm_jax import cli, finished, recipe
from lvlm_jax import params as P
from lvlm_jax.checkpoint import load_params
from lvlm_jax.config import ConfigError
from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.nn import lora
from tests.infer.tiny import tiny_system

QUESTION = {"prompt": "Which color is it?", "max_new_tokens": 6}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small LLaVA in a public folder."""
    system = tiny_system()
    folder = tmp_path_factory.mktemp("base") / "llava"
    return export_folder(folder, system.config, system.params, system.tokenizer, system.spec, system.template)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Eight pictures with a conversation each."""
    folder, rng, records = tmp_path_factory.mktemp("mine"), np.random.default_rng(0), []
    for i in range(8):
        PIL.Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        said = [{"from": "human", "value": "<image>\nWhich color is it?"}, {"from": "gpt", "value": "red"}]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": said})
    (folder / "mine.json").write_text(json.dumps(records))
    return folder / "mine.json"


def words(base, mine, *more):
    stage = "--config.stages.tune"
    sizes = [f"{stage}.data.{name}={n}" for name, n in {"length": 64, "rows": 8, "pictures": 8, "workers": 0}.items()]
    short = [f"{stage}.steps=2", f"{stage}.save_every=0", f"{stage}.lora.rank=2", "--config.report=False"]
    return ["--config", f"lora_your_data:{base}", f"{stage}.data.path={mine}", *sizes, *short, *more]


@pytest.fixture(scope="module")
def run(base, mine, tmp_path_factory):
    """The workdir of a run of two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "mine"
    assert cli.main(["train", "--workdir", str(workdir), *words(base, mine), "--config.scan=yes"]) == 0
    return workdir


def test_a_dry_run_shows_what_trains(base, mine, capsys):
    assert cli.main(["train", "--dry-run", *words(base, mine)]) == 0
    page = capsys.readouterr().out
    assert "computes in float32 (cpu is a CPU" in page
    system = tiny_system()
    shapes = [
        P.flatten(system.params)[path].shape for path in P.flatten(system.params) if path.startswith("llm/layers")
    ]
    count = sum(2 * sum(shape) for shape in shapes if len(shape) == 2)
    connector = P.size(system.params["connector"])
    assert f"{count:,}" in page
    assert f"{connector:,}" in page
    assert f"{count + connector:,}" in page


@pytest.mark.parametrize(
    ("name", "length", "pictures"),
    [
        ("llava15_7b", 2048, 3),
        ("llavanext_7b", 4096, 5),  # a picture of four tiles is 2,952 positions at most
        ("llava_onevision_7b_ov", 10240, 37),  # one of 36, interpolated to the tokens of nine
        ("paligemma_3b_896", 5120, 3),
    ],
)
def test_a_row_has_room_for_a_picture_and_what_is_said(name, length, pictures):
    data = recipe.load(f"lora_your_data:{name}").stages["tune"].data
    assert (data.length, data.pictures // data.groups) == (length, pictures)


def test_a_pattern_that_hits_nothing_is_an_error_with_near_names(base, mine, capsys):
    line = words(base, mine, "--config.stages.tune.lora.targets=('llm/**/query',)")
    assert cli.main(["train", "--dry-run", *line]) == 2
    assert "lora.targets, which name dense layers: parameter pattern 'llm/**/query' matches nothing" in (
        capsys.readouterr().err
    )


def test_folders_that_are_no_vision_language_model(tmp_path):
    with pytest.raises(ConfigError, match=r"lora_your_data:nowhere: choose one of .*llava15_7b.*or give a folder"):
        recipe.load("lora_your_data:nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 99}))
    with pytest.raises(ConfigError, match="holds a model of kind 'decoder', not a vision-language model"):
        recipe.load(f"lora_your_data:{tmp_path}")


@pytest.mark.slow
def test_what_the_run_leaves(run, base, tmp_path, capsys):
    tuned = load_params(run / "tune" / "params")
    start = import_folder(base).params
    alone, adapters = lora.split(tuned)
    assert all(np.abs(leaf).max() > 0 for path, leaf in P.flatten(adapters).items() if path.endswith(lora.B))
    for path, leaf in P.flatten(alone).items():
        assert np.array_equal(leaf, P.flatten(start)[path]) is not path.startswith("connector/"), path
    # The export is the merged model, and the workdir is asked like any other.
    loaded = lvlm_jax.load(run)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lora.merge(tuned))
    # The adapter alone, on top of the base, is the same model.
    out = tmp_path / "adapter"
    assert cli.main(["convert", "export", str(run), str(out), "--adapter"]) == 0
    content = json.loads((out / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(base)
    assert content["modules_to_save"] == [f"model.multi_modal_projector.linear_{i}" for i in (1, 2)]
    again = lvlm_jax.load(base, adapter=out)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # noqa: E731
    jax.tree.map(close, again.params, loaded.params)
    assert again.generate(**QUESTION) == loaded.generate(**QUESTION)
    # So it is as the starting weights of a run.
    assert cli.main(["convert", "import", str(base), str(tmp_path / "weights"), "--adapter", str(out)]) == 0
    jax.tree.map(close, load_params(tmp_path / "weights" / "params"), loaded.params)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_the_next_stage_starts_from_the_merged_weights(scan, run):
    wanted = {"llm": lora.merge(load_params(run / "tune" / "params"))["llm"]}
    wanted = P.stack_layers(wanted) if scan else wanted
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
    got = finished.saved_parts(run / "tune" / "params", like)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_an_adapter_of_a_run_without_one(tmp_path, capsys):
    (tmp_path / "params").mkdir()
    assert cli.main(["convert", "export", str(tmp_path), str(tmp_path / "out"), "--adapter"]) == 2
    assert "neither the workdir of a run" in capsys.readouterr().err
