import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as meshes
from lvlm_jax import params as trees
from lvlm_jax.checkpoint import Checkpoints, load_params
from lvlm_jax.errors import Diverged
from lvlm_jax.train.log import read_rows
from lvlm_jax.train.loop import IndexedBatches, Preempted, fit
from lvlm_jax.train.program import Program
from lvlm_jax.train.stages import SpikePolicy
from tests.train import tiny

NUMBERS = ("step", "loss", "lr", "grad_norm", "skipped")


def _fit(workdir, stage=None, make=tiny.batch, params=None, **options):
    params = tiny.params() if params is None else params
    return fit(
        stage or tiny.stage(),
        loss_fn=tiny.loss_fn,
        params=params,
        batches=IndexedBatches(make),
        workdir=workdir,
        **options,
    )


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def _curve(workdir):
    return [tuple(row[name] for name in NUMBERS) for row in read_rows(workdir / "align" / "metrics.jsonl")]


def _everything(workdir):
    """All bits that a run leaves: parameters, state with moments, metrics."""
    params = load_params(workdir / "align" / "params")
    saved = Checkpoints(workdir / "align" / "checkpoints")
    with open(saved.folder / "24" / "manifest.json") as file:
        cards = json.load(file)["leaves"]
    like = {path: jax.ShapeDtypeStruct(c["shape"], c["dtype"]) for path, c in cards.items()}
    return params, saved.restore(24, like=trees.unflatten(like)), _curve(workdir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What an undisturbed run of the script leaves."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    _finish(workdir)
    return _everything(workdir)


def _command(workdir, seconds=0.0):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = dict(os.environ, PYTHONPATH=root, XLA_FLAGS="")
    line = [sys.executable, os.path.join(root, "tests", "train", "tiny.py"), str(workdir), str(seconds)]
    return subprocess.Popen(line, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(workdir):
    out, err = _command(workdir).communicate(timeout=120)
    assert out == "done\n", err


def _wait_for_rows(workdir, count, process):
    deadline = time.time() + 120
    file = workdir / "align" / "metrics.jsonl"
    while not (file.exists() and file.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_sigkill_at_a_random_step_then_resume_is_bit_identical(tmp_path, undisturbed):
    process = _command(tmp_path, seconds=0.1)
    _wait_for_rows(tmp_path, random.randint(1, 18), process)
    process.kill()
    process.communicate()
    _finish(tmp_path)
    for got, want in zip(_everything(tmp_path), undisturbed):
        _equal(got, want)


@pytest.mark.slow
def test_sigterm_saves_exits_with_zero_and_resumes_exactly(tmp_path, undisturbed):
    process = _command(tmp_path, seconds=0.1)
    _wait_for_rows(tmp_path, random.randint(1, 18), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == ""
    assert "SIGTERM: saved step" in err
    assert "run the same command to resume" in err
    rows = len(_curve(tmp_path))
    assert Checkpoints(tmp_path / "align" / "checkpoints").latest() == rows < 24
    _finish(tmp_path)
    for got, want in zip(_everything(tmp_path), undisturbed):
        _equal(got, want)


def test_first_interrupt_saves_and_handlers_come_back(tmp_path):
    def interrupt(step, state, metrics):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Preempted, match="0"):
        _fit(tmp_path, hooks=(interrupt,))
    assert signal.getsignal(signal.SIGINT) is before
    assert Checkpoints(tmp_path / "align" / "checkpoints").latest() == 3


def test_fit_trains_what_the_stage_says(tmp_path):
    params = tiny.params()
    before = jax.tree.map(np.array, params)
    seen = []
    after = _fit(tmp_path, params=params, hooks=(lambda step, state, metrics: seen.append(step),))
    _equal(params, before)  # the caller's arrays are alive and as they were
    _equal(after["tower"], before["tower"])
    assert all(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (after["llm"], before["llm"]))))
    assert seen == list(range(1, 25))
    assert [row[0] for row in _curve(tmp_path)] == seen
    fixed = tiny.batch(99, rows=256)
    assert float(tiny.loss_fn(after, fixed)[0]) < float(tiny.loss_fn(before, fixed)[0])
    _equal(load_params(tmp_path / "align" / "params", like=after), after)
    saved = json.loads((tmp_path / "align" / "checkpoints" / "24" / "manifest.json").read_text())["leaves"]
    assert not any("tower" in path for path in saved)  # frozen leaves: stored once, no moments
    once = json.loads((tmp_path / "align" / "frozen" / "manifest.json").read_text())["leaves"]
    assert list(once) == ["tower/bias", "tower/kernel"]


def test_a_finished_stage_returns_at_once_and_resume_false_starts_anew(tmp_path):
    after = _fit(tmp_path)
    _equal(_fit(tmp_path, make=lambda k: pytest.fail("no batch is needed")), after)
    steps = []
    _equal(_fit(tmp_path, resume=False, hooks=(lambda step, state, metrics: steps.append(step),)), after)
    assert steps[0] == 1
    assert [row[0] for row in _curve(tmp_path)] == list(range(1, 25))


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path):
    whole = _fit(tmp_path)
    newest = tmp_path / "align" / "checkpoints" / "24" / "arrays"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="damaged"):
        _equal(_fit(tmp_path), whole)
    assert [row[0] for row in _curve(tmp_path)] == list(range(1, 25))


def test_resume_takes_frozen_weights_from_the_run(tmp_path, capsys):
    whole = _fit(tmp_path / "a")
    with pytest.raises(Preempted):
        _fit(tmp_path / "b", hooks=(lambda s, *_: s == 7 and os.kill(os.getpid(), signal.SIGTERM),))
    other = tiny.params()
    other["tower"] = jax.tree.map(jnp.zeros_like, other["tower"])
    _equal(_fit(tmp_path / "b", params=other), whole)
    assert "frozen weights given are not those of this run" in capsys.readouterr().err


def test_the_next_stage_refers_to_frozen_weights_of_the_first(tmp_path):
    first = _fit(tmp_path, tiny.stage(trains=("connector/**",)))
    second = _fit(tmp_path, tiny.stage(name="instruct"), params=first, earlier=[tmp_path / "align"])
    cards = json.loads((tmp_path / "instruct" / "frozen" / "manifest.json").read_text())["leaves"]
    assert {card["folder"] for card in cards.values()} == {"../../align/frozen"}
    _equal(second["tower"], tiny.params()["tower"])
    _equal(load_params(tmp_path / "instruct" / "params", like=second), second)


def test_scanned_run_resumes_per_layer(tmp_path):
    scanned, apart = tiny.params(depth=3), trees.unstack_layers(tiny.params(depth=3))
    whole = _fit(tmp_path / "a", params=scanned)
    with pytest.raises(Preempted):
        _fit(tmp_path / "b", params=scanned, hooks=(lambda s, *_: s == 7 and os.kill(os.getpid(), signal.SIGTERM),))
    resumed = _fit(tmp_path / "b", params=apart)
    # The two programs round differently; near nought that is seen against the size of the weights (about 0.5).
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), resumed, trees.unstack_layers(whole)
    )


def test_divergence_stops_names_the_batches_and_the_last_good_step(tmp_path, capsys):
    def poisoned(k):
        return tiny.batch(k) | ({"y": np.full((8, 4), np.nan, np.float32)} if k >= 7 else {})

    with pytest.raises(Diverged, match=r"3 updates in a row were skipped, batches 7 to 9.*last\s+good step is 7"):
        _fit(tmp_path, tiny.stage(spike=SpikePolicy(patience=3)), make=poisoned)
    assert "step 8: update skipped (loss nan, gradient norm nan); batch 7; 1 in a row" in capsys.readouterr().err
    report = json.loads((tmp_path / "align" / "diverged.json").read_text())
    assert report["batches"] == [7, 8, 9]
    assert report["last_good_step"] == 7
    assert report["last_checkpoint"] in (5, 10)


def test_a_skip_now_and_then_goes_on(tmp_path):
    def poisoned(k):
        return tiny.batch(k) | ({"y": np.full((8, 4), np.nan, np.float32)} if k in (4, 9, 23) else {})

    after = _fit(tmp_path, tiny.stage(spike=SpikePolicy(patience=2)), make=poisoned)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(after))
    assert _curve(tmp_path)[-1][-1] == 3


def test_evaluation_inside_the_run(tmp_path):
    def evaluate(params, step):
        assert params.keys() == {"tower", "connector", "llm"}
        return {"eval/exact": step / 100}

    _fit(tmp_path, tiny.stage(eval_every=10, log_every=0), evaluate=evaluate)
    rows = read_rows(tmp_path / "align" / "metrics.jsonl")
    assert [(row["step"], row["eval/exact"]) for row in rows] == [(10, 0.1), (20, 0.2)]


def test_errors_of_the_data_reach_the_caller(tmp_path):
    def broken(k):
        if k == 6:
            raise OSError("train.json:12: picture cat.jpg is truncated")
        return tiny.batch(k)

    with pytest.raises(OSError, match=r"train.json:12"):
        _fit(tmp_path, make=broken)
    assert Checkpoints(tmp_path / "align" / "checkpoints").latest() == 5

    class Short:
        def iterate(self, start):
            return ((k, tiny.batch(k)) for k in range(start, 8))

    with pytest.raises(ValueError, match="the batches end after 8, but the stage runs 24 steps"):
        fit(tiny.stage(), loss_fn=tiny.loss_fn, params=tiny.params(), batches=Short(), workdir=tmp_path / "short")


def test_another_stage_in_the_same_folder_is_an_error(tmp_path):
    _fit(tmp_path)
    with pytest.raises(ValueError, match=r"holds another tree.*llm/head/kernel"):
        _fit(tmp_path, tiny.stage(trains=("connector/**",)))


@pytest.mark.parametrize(("preset", "accumulate"), [("DP", 1), ("FSDP", 2), ("FSDP_TP", 1)])
def test_sharded_equals_unsharded(tmp_path, preset, accumulate):
    """The whole loop on eight virtual devices, a kill and resume included, against one device."""
    rows = 16
    stage = tiny.stage(steps=6, save_every=3, accumulate=accumulate)
    axes = jax.tree.map(lambda x: ("embed", "mlp") if x.ndim == 2 else ("mlp",), tiny.params())
    whole = _fit(tmp_path / "one", stage, make=lambda k: tiny.batch(k, rows))
    mesh = meshes.make_mesh(preset)
    layouts = set()

    def look(step, state, metrics):
        layouts.add(str(state.opt_state[1].mu["connector"]["kernel"].sharding.spec))
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def run(hooks):
        return _fit(tmp_path / "many", stage, make=lambda k: tiny.batch(k, rows), mesh=mesh, axes=axes, hooks=hooks)

    with pytest.raises(Preempted):
        run((look,))
    cut = run(())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), cut, whole)
    want = {"DP": (None, None), "FSDP": ("fsdp", None), "FSDP_TP": ("fsdp", "tensor")}[preset]
    assert layouts == {str(jax.sharding.PartitionSpec(*want))}


def test_rows_that_do_not_divide(tmp_path):
    with pytest.raises(ValueError, match="leading axis of 6 does not divide over 8 data shards"):
        _fit(tmp_path, make=lambda k: tiny.batch(k, 6), mesh=meshes.make_mesh("DP"))


def _axes(params):
    """Logical names: matrices over both axes of a mesh, scanned stacks layer by layer."""
    names = {1: ("mlp",), 2: ("embed", "mlp"), 3: ("layers", "embed", "mlp")}
    return jax.tree.map(lambda x: names[x.ndim], params)


def _state_after(workdir, mesh):
    """The state of a run's last checkpoint, as a run on `mesh` would take it up."""
    params = tiny.params(depth=3)
    trained, frozen = trees.split(params, tiny.stage().mask(params))
    program = Program(tiny.stage(), tiny.loss_fn, trained, frozen, mesh, None if mesh is None else _axes(params))
    return Checkpoints(workdir / "align" / "checkpoints").restore(like=program.state), program.state


MESHES = {
    "FSDP_TP on 4 x 2": lambda: meshes.make_mesh("FSDP_TP", tensor=2),
    "FSDP_TP on 2 x 4": lambda: meshes.make_mesh("FSDP_TP", tensor=4),
    "DP on 8": lambda: meshes.make_mesh("DP"),
    "FSDP on 2": lambda: meshes.make_mesh("FSDP", jax.devices()[:2]),
    "FSDP_TP on 1 x 2": lambda: meshes.make_mesh("FSDP_TP", jax.devices()[4:6], tensor=2),
    "FSDP on 1": lambda: meshes.make_mesh("FSDP", jax.devices()[3:4]),
    "no mesh": lambda: None,
}


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    """The workdir of a run that was stopped on FSDP over 8 devices, and its state there."""
    workdir, params = tmp_path_factory.mktemp("eight"), tiny.params(depth=3)
    mesh = meshes.make_mesh("FSDP")
    with pytest.raises(Preempted):
        _fit(
            workdir,
            params=params,
            mesh=mesh,
            axes=_axes(params),
            hooks=(lambda s, *_: s == 7 and os.kill(os.getpid(), signal.SIGTERM),),
        )
    return workdir, _state_after(workdir, mesh)[0]


@pytest.mark.parametrize("name", MESHES)
def test_a_state_saved_on_eight_devices_is_the_same_bits_on_any_mesh(on_eight, name):
    workdir, wanted = on_eight
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(wanted.opt_state))
    got, asked = _state_after(workdir, MESHES[name]())
    assert int(got.step) == 7
    _equal(got, wanted)
    assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(lambda x: x.sharding, asked)


def test_a_run_stopped_on_eight_devices_goes_on_on_four(on_eight, tmp_path):
    workdir, params = shutil.copytree(on_eight[0], tmp_path / "run"), tiny.params(depth=3)
    whole = _fit(tmp_path / "whole", params=params)
    mesh = meshes.make_mesh("FSDP_TP", jax.devices()[:4], tensor=2)
    resumed = _fit(workdir, params=params, mesh=mesh, axes=_axes(params))
    assert [row[0] for row in _curve(workdir)] == list(range(1, 25))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), resumed, whole)
