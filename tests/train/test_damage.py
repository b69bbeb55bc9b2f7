"""What a run leaves is damaged on purpose: bits flipped, files cut, lost and put in the wrong place."""

import importlib.metadata
import json
import random
import shutil
import warnings
from importlib.metadata import version

import jax
import numpy as np
import pytest

from lvlm_jax import params as trees
from lvlm_jax.checkpoint import CheckpointError, Checkpoints, damage, load_params
from lvlm_jax.train.loop import IndexedBatches, fit
from tests.train import tiny

FLIPS = 2000
OLD = ("leaves", "files", "versions")
"""All that a manifest held at first."""


def train(workdir, steps=10, **options):
    """A run of the tiny model that keeps its checkpoints of steps 5 and 10."""
    return fit(
        tiny.stage(steps=steps),
        loss_fn=tiny.loss_fn,
        params=tiny.params(),
        batches=IndexedBatches(tiny.batch),
        workdir=workdir,
        **options,
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The workdir of an undisturbed run; not to be written to."""
    workdir = tmp_path_factory.mktemp("kept")
    train(workdir, recipe="a" * 64)
    return workdir


@pytest.fixture
def workdir(kept, tmp_path):
    """A copy of it."""
    return shutil.copytree(kept, tmp_path / "run")


def saved_in(workdir):
    return Checkpoints(workdir / "align" / "checkpoints")


def like(workdir, step=10):
    cards = json.loads((workdir / "align" / "checkpoints" / str(step) / "manifest.json").read_text())["leaves"]
    return trees.unflatten({path: jax.ShapeDtypeStruct(c["shape"], c["dtype"]) for path, c in cards.items()})


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bytes(data))


def test_a_manifest_says_what_was_saved_by_whom(kept):
    found = json.loads((kept / "align" / "checkpoints" / "10" / "manifest.json").read_text())
    assert (found["step"], found["recipe"]) == (10, "a" * 64)
    packages = {"lvlm_jax", "python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert found["versions"].keys() == packages
    assert found["versions"]["jax"] == jax.__version__
    assert all(len(card["sha256"]) == 64 for card in found["files"].values())
    newest = kept / "align" / "checkpoints" / "10"
    assert {file.relative_to(newest).as_posix() for file in files_of(newest)} == {*found["files"], "manifest.json"}


@pytest.mark.slow
def test_every_flipped_bit_is_found(workdir):
    """2,000 single bits over all files of both steps, drawn by bit, and at least one in each file."""
    folders = [workdir / "align" / "checkpoints" / step for step in ("5", "10")]
    assert [damage(folder, int(folder.name)) for folder in folders] == ["", ""]
    sizes = {file: 8 * file.stat().st_size for folder in folders for file in files_of(folder)}
    assert {"manifest.json", "_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"} <= {file.name for file in sizes}
    empty = [file for file, size in sizes.items() if not size]
    assert not empty, f"nothing to flip in {empty}"
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    flips = [(file, chance.randrange(size)) for file, size in sizes.items()]
    more = chance.choices(list(sizes), weights=list(sizes.values()), k=FLIPS - len(flips))
    for file, bit in flips + [(file, chance.randrange(sizes[file])) for file in more]:
        folder = next(folder for folder in folders if folder in file.parents)
        flip(file, bit)
        said = damage(folder, int(folder.name))
        assert file.relative_to(folder).as_posix() in said, f"seed {seed}: bit {bit} of {file} passed: {said!r}"
        flip(file, bit)
    assert [damage(folder, int(folder.name)) for folder in folders] == ["", ""]


def test_a_flip_in_any_file_is_passed_over_for_the_step_before(workdir):
    newest, target = workdir / "align" / "checkpoints" / "10", like(workdir)
    older, chance = saved_in(workdir).restore(5, like=target), random.Random(0)
    for file in files_of(newest):
        bit = chance.randrange(8 * file.stat().st_size)
        flip(file, bit)
        with pytest.warns(UserWarning, match=r"10 is damaged .*falling back to the checkpoint before it") as said:
            equal(saved_in(workdir).restore(like=target), older)
        assert file.relative_to(newest).as_posix() in str(said[0].message)
        with pytest.raises(CheckpointError, match="damaged"):
            saved_in(workdir).restore(10, like=target)
        flip(file, bit)
    with warnings.catch_warnings(action="error"):
        newest_state = saved_in(workdir).restore(like=target)
    assert int(newest_state["step"]) == 10


def array_file(folder):
    return max(files_of(folder / "arrays"), key=lambda file: file.stat().st_size)


def rewritten(change):
    """Damage that leaves a manifest of good JSON."""

    def damage(newest):
        file = newest / "manifest.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content, indent=1))

    return damage


def of_another_step(newest):
    shutil.rmtree(newest / "arrays")
    shutil.copy(newest.parent / "5" / "manifest.json", newest / "manifest.json")


def whole_but_of_another_step(newest):
    shutil.rmtree(newest)
    shutil.copytree(newest.parent / "5", newest)


DAMAGE = {
    "a truncated file": (lambda n: array_file(n).write_bytes(array_file(n).read_bytes()[:-1]), "changed files"),
    "an emptied file": (lambda n: array_file(n).write_bytes(b""), "changed files"),
    "a missing file": (lambda n: array_file(n).unlink(), "missing files"),
    "all arrays missing": (lambda n: shutil.rmtree(n / "arrays"), "missing files"),
    "a cut manifest": (
        lambda n: (n / "manifest.json").write_bytes((n / "manifest.json").read_bytes()[:-9]),
        "manifest.json is not JSON",
    ),
    "an empty manifest": (lambda n: (n / "manifest.json").write_bytes(b""), "manifest.json is not JSON"),
    "a manifest that is not UTF-8": (
        lambda n: (n / "manifest.json").write_bytes((n / "manifest.json").read_bytes().replace(b"step", b"st\xffp")),
        "manifest.json is not JSON",
    ),
    "a manifest that is no object": (lambda n: (n / "manifest.json").write_text("[1]"), "manifest.json has changed"),
    "a manifest written otherwise": (
        lambda n: (n / "manifest.json").write_text((n / "manifest.json").read_text() + "\n"),
        "manifest.json has changed",
    ),
    "a step that was changed": (rewritten(lambda m: m.update(step=9)), "manifest.json has changed"),
    "a leaf that was lost": (rewritten(lambda m: m["leaves"].popitem()), "manifest.json has changed"),
    "a seal that was lost": (rewritten(lambda m: m.pop("sha256")), "manifest.json has changed"),
    "an empty folder with another step's manifest": (of_another_step, "manifest.json is of step 5"),
    "another step in its place": (whole_but_of_another_step, "manifest.json is of step 5"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_passed_over(kind, workdir):
    harm, message = DAMAGE[kind]
    target = like(workdir)
    older = saved_in(workdir).restore(5, like=target)
    harm(workdir / "align" / "checkpoints" / "10")
    with pytest.warns(UserWarning, match=rf"checkpoints/10 is damaged \({message}"):
        equal(saved_in(workdir).restore(like=target), older)


def test_a_run_goes_on_from_the_step_before_and_mends_the_damage(workdir, kept):
    flip(array_file(workdir / "align" / "checkpoints" / "10"), 4321)
    with pytest.warns(UserWarning, match="checkpoints/10 is damaged"):
        again = train(workdir, recipe="a" * 64)
    equal(again, load_params(kept / "align" / "params", like=again))
    assert damage(workdir / "align" / "checkpoints" / "10", 10) == ""


def test_empty_step_folders_are_no_checkpoints(workdir):
    for name in ("15", "20", "7"):
        (workdir / "align" / "checkpoints" / name).mkdir()
    (workdir / "align" / "checkpoints" / "20" / "arrays").mkdir()
    saved = saved_in(workdir)
    assert (saved.steps(), saved.latest()) == ([5, 10], 10)
    train(workdir, steps=20)
    assert sorted(f.name for f in (workdir / "align" / "checkpoints").iterdir()) == ["15", "20"]  # 7 was cut off


def test_all_steps_damaged(workdir):
    for step in ("5", "10"):
        flip(array_file(workdir / "align" / "checkpoints" / step), 77)
    none = pytest.raises(CheckpointError, match=r"checkpoints holds no complete checkpoint; damaged: \[5, 10\]")
    with pytest.warns(UserWarning, match="falling back"), none:
        train(workdir)


def test_a_checkpoint_of_another_recipe_is_refused_with_both_sides_named(workdir):
    with pytest.raises(
        CheckpointError, match=r"another recipe: digest aaaaaaaaaaaa, this run's is bbbbbbbbbbbb\. Give"
    ):
        train(workdir, recipe="b" * 64)


def test_a_manifest_from_before_the_seal_is_read_with_a_warning(workdir):
    newest = workdir / "align" / "checkpoints" / "10"
    rewritten(lambda m: [m.pop(key) for key in m.keys() - set(OLD)])(newest)
    with pytest.warns(
        UserWarning, match="written by an older version: the files are checked, the manifest itself is not"
    ):
        assert int(saved_in(workdir).restore(like=like(workdir, 5))["step"]) == 10
    flip(array_file(newest), 99)
    with pytest.warns(UserWarning, match="changed files"):
        assert int(saved_in(workdir).restore(like=like(workdir, 5))["step"]) == 5


def test_other_versions_are_named_when_a_run_goes_on(workdir, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: {"optax": "99.1"}.get(package, version(package)))
    with pytest.warns(UserWarning, match=r"10 was written by optax .* \(now 99\.1\): what comes may differ"):
        saved_in(workdir).restore(like=like(workdir))


@pytest.mark.parametrize("name", ["params", "frozen"])
def test_damaged_weights_are_an_error_that_names_the_file_and_what_to_do(workdir, name):
    folder = workdir / "align" / name
    with warnings.catch_warnings(action="error"):
        load_params(folder)
    for file in files_of(folder):
        bit = random.Random(1).randrange(8 * file.stat().st_size)
        flip(file, bit)
        with pytest.raises(CheckpointError) as error:
            load_params(folder)
        assert str(folder) in str(error.value)
        assert file.relative_to(folder).as_posix() in str(error.value)
        assert "delete that folder and run what wrote it again" in str(error.value)
        flip(file, bit)
    load_params(folder)


def test_deleting_damaged_params_lets_the_same_command_write_them_again(workdir, kept):
    shutil.rmtree(workdir / "align" / "params")
    train(workdir)
    equal(load_params(workdir / "align" / "params"), load_params(kept / "align" / "params"))


def test_a_damaged_store_of_frozen_weights_is_written_again(workdir, kept, capsys):
    flip(array_file(workdir / "align" / "frozen"), 1234)
    with pytest.raises(CheckpointError, match=r"align/frozen is damaged"):
        load_params(workdir / "align" / "params")  # which refers to it
    train(workdir, steps=15)
    assert "align/frozen is damaged (changed files" in capsys.readouterr().err
    equal(load_params(workdir / "align" / "frozen"), load_params(kept / "align" / "frozen"))
    load_params(workdir / "align" / "params")


def test_nothing_is_stored_by_reference_to_damaged_weights(workdir):
    flip(array_file(workdir / "align" / "frozen"), 1234)
    stage = tiny.stage(name="next", steps=5)
    with pytest.warns(UserWarning, match=r"frozen is damaged .*nothing refers to it"):
        fit(
            stage,
            loss_fn=tiny.loss_fn,
            params=tiny.params(),
            batches=IndexedBatches(tiny.batch),
            workdir=workdir,
            earlier=[workdir / "align"],
        )
    equal(load_params(workdir / "next" / "params")["tower"], tiny.params()["tower"])
