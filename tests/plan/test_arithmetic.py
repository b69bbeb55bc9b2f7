"""What a plan says where no compiler for its devices is installed: what is given, exactly, and the model's FLOPs."""

import functools
import json

import jax
import pytest

from lvlm_jax import cli, recipe
from lvlm_jax import mesh as meshes
from lvlm_jax.config import ConfigError
from lvlm_jax.data.collate import collate
from lvlm_jax.kinds import KINDS
from lvlm_jax.plan import NoCompiler, nvidia, report, stage, topology


@pytest.fixture
def nothing_installed(monkeypatch):
    """As where the extras [plan] and [plan-cuda] were never asked for."""
    monkeypatch.setattr(nvidia, "PLUGINS", ("jax_plugins.there_is_none",))


def test_the_plan_of_a_gpu_without_its_plugin(nothing_installed, capsys):
    with pytest.raises(NoCompiler, match=r"pip install 'lvlm-jax\[plan-cuda\]'"):
        topology.devices(topology.parse("h100:8"))
    line = "plan --config llava15_instruct --topology h100:8 --rows-per-shard 2"
    assert cli.main(line.split()) == 0
    said = capsys.readouterr().out
    assert "by arithmetic: no compiler for NVIDIA GPUs is installed: pip install 'lvlm-jax[plan-cuda]' (" in said
    assert "[plan]" not in said
    assert "before activations, which only a compiler tells" in said
    assert "MFU" not in said  # nothing is known that would keep it from 100 %
    assert cli.main([*line.split(), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    memory = figures["memory_bytes"]
    # Projector and language model: 95.7 % of 7,063,427,072 weights, float32 and two moments, over 8 cards.
    assert memory["trained"] == pytest.approx(0.957 * 7_063_427_072 * 4 / 8, rel=1e-3)
    assert memory["optimizer"] == pytest.approx(2 * memory["trained"], rel=1e-3)
    assert memory["peak"] == sum(memory[kind] for kind in ("trained", "frozen", "optimizer", "batch", "cache"))
    assert (figures["compiled"], "flops_of_a_device" in figures) == (False, False)


def test_what_does_not_fit_by_arithmetic_does_not_fit(nothing_installed, capsys):
    line = "plan --config llava15_instruct --topology h100:1 --rows-per-shard 1 --config.mesh=DP"
    assert cli.main(line.split()) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_a_tiny_model_is_shown_in_units_that_show_it(nothing_installed, capsys):
    line = "plan --config quickstart:tiny --topology h100:1 --stage instruct"
    assert cli.main(line.split()) == 0
    said = capsys.readouterr().out
    assert "memory of a device, MiB" in said
    assert "of 76293.95, before activations" in said
    assert "FLOPs of the model, GF" in said
    assert "step, ms, at least" in said
    figures = [line.split()[-1] for line in said.splitlines() if line.startswith("  ") and " of 7" not in line]
    assert not [figure for figure in figures if float(figure.replace(",", "")) == 0]


def test_arithmetic_lies_as_a_compiled_program_does(nothing_installed):
    """The same shares of weights as on devices that are there."""
    found = recipe.load("quickstart", ["--config.mesh=FSDP"])
    plan = stage.plan_stage(found, "instruct", topology.parse("h100:8"), rows=2)
    assert report.roofline(plan).compute == plan.model_flops / 8 / plan.topology.chip.flops
    real = found.make_mesh()
    cut = stage.with_rows(found.stages["instruct"], 8, 2)
    program, *_ = stage.stage_program(stage.topology_recipe(found), "instruct", cut, real)
    assert plan.memory.trained == stage.share(program.state.trained)


def test_a_batch_of_pictures_of_any_shape_is_the_loader_s():
    """What the step is compiled with has the very inputs that it is given, positions along three axes among them."""
    found = recipe.load("qwen2_5_vl_finetune")
    tune = found.stages["tune"]
    data, kind = tune.data, KINDS[tune.loss]
    whole = lambda: kind.batch(found, data.rows, data.length, data.pictures, **kind.holds(found, tune))  # noqa: E731
    planned = stage.batch_of(whole, data.pictures, data.groups, meshes.batch_sharding(meshes.make_mesh("FSDP")))
    assert planned.axes.shape == (data.rows, data.length, 3)
    assert planned.patches.shape[:2] == (data.groups, data.pictures // data.groups)
    sizes = {"length": 8, "groups": 2, "vision_rows": 1, "visual_tokens": found.model.lvlm.visual_tokens}
    for pictures, spec in ((data.pictures, found.model.image), (0, None)):
        held = kind.holds(found, tune) | {"blend": False}
        given = collate([[], []], **sizes, pad_id=0, spec=spec, **held)
        small = jax.eval_shape(functools.partial(kind.batch, found, 2, 8, pictures, **held))
        assert jax.tree.structure(given) == jax.tree.structure(small)
        assert [x.dtype for x in jax.tree.leaves(given)] == [x.dtype for x in jax.tree.leaves(small)]


def test_a_mesh_of_absent_devices():
    mesh = meshes.make_mesh("FSDP", meshes.Absent(512, slices=2))
    assert tuple(mesh.shape.values()) == (2, 256, 1)
    found = recipe.load("llava15_instruct")
    with pytest.raises(ConfigError, match=r"model.llm.width=4,096 does not divide over 8,960 devices"):
        found.make_mesh(meshes.Absent(8960))
    # 27 chips share no divisor with it: to cut the weights over one device would hold them whole again
    advice = r"each would hold the weights whole; take another number of devices, such as 16 or 32$"
    with pytest.raises(ConfigError, match=advice):
        found.make_mesh(meshes.Absent(27))
    assert [found.make_mesh(meshes.Absent(count)).shape["fsdp"] for count in (16, 32)] == [16, 32]
    with pytest.raises(ConfigError, match=r"--config.fsdp=2, or take another number of devices, such as 32 or 64$"):
        found.make_mesh(meshes.Absent(54))
    with pytest.raises(ConfigError, match=r"leave config.fsdp out, or give one that divides 4,096"):
        recipe.load("llava15_instruct", ["--config.fsdp=3"]).make_mesh(meshes.Absent(27))
    with pytest.raises(ConfigError, match="8 devices do not divide into a tensor axis of 3"):
        recipe.load("llava15_instruct", ["--config.mesh=FSDP_TP", "--config.tensor=3"]).make_mesh(meshes.Absent(8))
