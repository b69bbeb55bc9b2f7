"""Whole plans by libtpu's compiler. Lane 3 of CI installs it (the extra [plan]); the others have no such compiler."""

import dataclasses
import json

import pytest

pytest.importorskip("libtpu", reason="the TPU compiler is in the extra [plan]; lane 3 has it")

from lvlm_jax import cli, recipe
from lvlm_jax.config import ConfigError
from lvlm_jax.plan import answer, report, stage, topology


@pytest.fixture(scope="module")
def small():
    return recipe.load("quickstart", ["--config.mesh=FSDP", "--config.remat=full"])


@pytest.fixture(scope="module")
def plan(small):
    return stage.plan_stage(small, "instruct", topology.parse("v5e:2x2"), rows=2)


def test_what_a_plan_says(plan):
    assert plan.memory.fits
    assert plan.memory.given < plan.memory.peak < plan.memory.capacity
    assert 1.0 < plan.flops_ratio < 2.0
    assert plan.work.bytes_of("all-gather") > 0
    said = report.text(plan)
    assert "fits" in said
    assert "an estimate and no measurement" in said


def test_more_chips_with_equal_rows_each_do_the_same(plan, small):
    more = stage.plan_stage(small, "instruct", topology.parse("v5e:4x4"), rows=2)
    assert more.flops == pytest.approx(plan.flops, rel=0.02)


def test_the_command(capsys):
    line = "plan --config quickstart --topology v5e:2x2 --stage align --rows-per-shard 2 --json"
    status = cli.main(line.split())
    said = json.loads(capsys.readouterr().out)
    assert (status, said["stage"], said["topology"]) == (0, "align", "v5e:2x2")
    assert said["estimate_seconds"]["compute"] > 0


def test_what_does_not_fit_is_told_with_what_to_change(capsys):
    line = "plan --config quickstart --topology v5e:2x2 --stage instruct --rows-per-shard 200000"
    status = cli.main(line.split())
    said = capsys.readouterr().out
    assert status == 1
    assert "of 15.75, DOES NOT FIT" in said
    assert "what to change: recompute activations: --config.remat=dots, attention or full" in said


def test_rows_that_do_not_divide(small):
    data = dataclasses.replace(small.stages["instruct"].data, rows=4, groups=2)
    stages = small.stages | {"instruct": dataclasses.replace(small.stages["instruct"], data=data)}
    wrong = dataclasses.replace(small, stages=stages)
    with pytest.raises(ConfigError, match=r"does not divide over 16 data shards; .*, or --rows-per-shard"):
        stage.plan_stage(wrong, "instruct", topology.parse("v5e:4x4"))


def test_between_slices_only_gradients_go(small):
    """A slice holds the weights whole: what crosses is no more than one float32 gradient of a device's part."""
    found = stage.plan_stage(small, "instruct", topology.parse("v5e:2x2", 2), rows=2)
    _only_gradients_cross(found, inside=4)
    said = report.text(found)
    assert "v5e:2x2 x 2: 8 chips" in said
    assert "between slices: all-reduce, GB" in said
    assert report.as_dict(found)["estimate_seconds"]["network"] > 0


@pytest.mark.nightly
def test_between_whole_slices_only_gradients_of_llava_go():
    found = stage.plan_stage(recipe.load("llava15_instruct:full"), "instruct", topology.parse("v5e:16x16", 2), rows=1)
    _only_gradients_cross(found, inside=256)


def _only_gradients_cross(found, inside):
    assert {one.kind for one in found.work.between} == {"all-reduce"}
    crossed = sum(one.bytes for one in found.work.between)
    assert found.memory.trained / 2 < crossed < found.memory.trained  # in bfloat16 and float32, padded to whole tiles
    assert {len(group) for one in found.work.collectives for group in one.groups} == {inside}


def test_a_mesh_that_does_not_divide_the_model():
    message = "model.llm.width=4,096 does not divide over 8,960 devices, .* cut them over fewer: --config.fsdp=256"
    with pytest.raises(ConfigError, match=message):
        stage.plan_stage(recipe.load("llava15_instruct"), "instruct", topology.parse("v5p:16x20x28"), rows=1)


def test_answers(small):
    """A prompt is read once and kept; a step of decoding reads the weights and what was kept."""
    topo = topology.parse("v5e:2x2")
    prompt = answer.plan_answers(small, "prefill", topo, rows=2, length=128)
    step = answer.plan_answers(small, "decode", topo, rows=2, length=128)
    llm = small.model.llm
    slots = 2 * (128 + answer.ROOM)  # of two rows a device
    assert step.memory.cache == 2 * slots * llm.depth * llm.kv_heads * llm.head_width * 2  # keys and values, bfloat16
    assert (prompt.tokens, step.tokens, prompt.memory.trained) == (8 * 128, 8, 0)
    assert 0 < step.memory.frozen < prompt.memory.frozen  # a step reads no tower
    assert 1.0 < prompt.flops_ratio < 1.3
    assert step.flops_ratio is None  # single rows are multiplied without matrix products
    assert report.roofline(step).memory > report.roofline(step).compute > 0
    assert "cache" in report.text(step)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--program prefill --length 1000", "--length=1000: from 1 to 192"),
        ("--length 9", "--length is of a prompt"),
        ("--program decode --stage align", "--stage=align: stages are trained"),
        ("--rows-per-shard 0", "--rows-per-shard=0: at least one"),
        ("--stage other", "--stage=other: the stages of quickstart are"),
    ],
)
def test_words_that_do_not_go_together(words, message, capsys):
    assert cli.main(f"plan --config quickstart --topology v5e:2x2 {words}".split()) == 2
    assert message in capsys.readouterr().err
