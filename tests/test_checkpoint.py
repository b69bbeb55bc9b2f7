import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lvlm_jax import params as trees
from lvlm_jax.checkpoint import CheckpointError, Checkpoints, fingerprints, is_saved, load_params, save_params
from lvlm_jax.train.optim import OptimizerConfig, make_optimizer
from lvlm_jax.train.step import init_state


def _tree(depth=3):
    return {
        "connector": {"kernel": jnp.arange(16.0).reshape(4, 4), "bias": jnp.ones(4, jnp.bfloat16)},
        "llm": {"layers": {"mlp": {"kernel": jnp.arange(depth * 32.0).reshape(depth, 4, 8)}}, "ids": jnp.arange(3)},
    }


def _state(tree):
    """A state whose moments differ from each other and from zero."""
    tree = trees.cast({"connector": tree["connector"], "llm": {"layers": tree["llm"]["layers"]}}, jnp.float32)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-3, lr_of=(("llm/layers/**", 1e-4),)), 10, tree)
    state = init_state(tree, tx)
    _, opt_state = tx.update(jax.tree.map(lambda x: x + 1, tree), state.opt_state, tree)
    return jax.tree.map(lambda x: x, state.__class__(**{**vars(state), "opt_state": opt_state}))


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_round_trip_and_keep(tmp_path):
    saved = Checkpoints(tmp_path / "c", keep=2)
    assert saved.latest() is None
    for step in (1, 2, 3):
        saved.save(step, _state(_tree()))
    assert saved.latest() == 3
    assert saved.steps() == [2, 3]
    _equal(saved.restore(like=_state(_tree())), _state(_tree()))


@pytest.mark.parametrize("direction", ["scanned to per layer", "per layer to scanned"])
def test_layers_change_shape_also_in_moments(tmp_path, direction):
    pair = _state(_tree()), _state(trees.unstack_layers(_tree()))
    source, goal = pair if direction.startswith("scanned") else pair[::-1]
    saved = Checkpoints(tmp_path)
    saved.save(1, source)
    saved.wait()
    on_disk = json.loads((tmp_path / "1" / "manifest.json").read_text())["leaves"]
    assert "trained/llm/layers/2/mlp/kernel" in on_disk
    assert not any("layers/mlp" in path for path in on_disk)
    _equal(saved.restore(like=jax.eval_shape(lambda: goal)), goal)


def test_restores_into_shardings(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    tree = {"llm": {"layers": {"kernel": jnp.arange(3 * 16.0).reshape(3, 16)}}, "w": jnp.arange(16.0)}
    save_params(tmp_path, tree)
    cut = {
        "llm": {"layers": {"kernel": NamedSharding(mesh, PartitionSpec(None, "fsdp"))}},
        "w": NamedSharding(mesh, PartitionSpec("fsdp")),
    }
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, cut)
    got = load_params(tmp_path, like)
    _equal(got, tree)
    assert jax.tree.map(lambda x: x.sharding, got) == cut
    save_params(tmp_path / "again", got)  # and sharded arrays are saved as their whole
    _equal(load_params(tmp_path / "again", tree), tree)


def test_another_tree_is_an_error_that_names_both_sides(tmp_path):
    save_params(tmp_path, {"a": {"kernel": jnp.ones((2, 3))}, "old": jnp.ones(2)})
    like = {"a": {"kernel": jnp.ones((3, 2))}, "new": jnp.ones(2)}
    with pytest.raises(CheckpointError, match=r"not in the checkpoint \(1\): new") as error:
        load_params(tmp_path, like)
    assert "only in the checkpoint (1): old" in str(error.value)
    assert "a/kernel: saved float32[2, 3], wanted float32[3, 2]" in str(error.value)


def test_one_part_of_a_model(tmp_path):
    save_params(tmp_path, _tree())
    part = {"connector": _tree()["connector"]}
    _equal(load_params(tmp_path, part, partial=True), part)
    with pytest.raises(CheckpointError, match="only in the checkpoint"):
        load_params(tmp_path, part)
    with pytest.raises(CheckpointError, match="not in the checkpoint"):
        load_params(tmp_path, {"projector": part}, partial=True)


@pytest.mark.parametrize("scanned", [True, False])
def test_weights_keep_their_number_type_whatever_the_model_was_asked_in(tmp_path, scanned):
    # A frozen language model that came as float16 is saved so; the next stage asks by the shapes of a float32 model.
    tree = trees.cast({"llm": {"layers": {"kernel": jnp.ones((2, 3))}}, "connector": {"bias": jnp.ones(3)}}, "float16")
    save_params(tmp_path / "p", tree)
    like = trees.cast(tree, "float32") if scanned else trees.unstack_layers(trees.cast(tree, "float32"))
    found = load_params(tmp_path / "p", like={"llm": like["llm"]}, partial=True)
    _equal(found, {"llm": tree["llm"] if scanned else trees.unstack_layers(tree)["llm"]})


def test_incomplete_steps_are_ignored(tmp_path):
    saved = Checkpoints(tmp_path, keep=5)
    for step in (1, 2):
        saved.save(step, {"w": jnp.full(3, float(step))})
    saved.wait()
    (tmp_path / "2" / "manifest.json").unlink()  # killed before the manifest
    (tmp_path / "7").mkdir()
    (tmp_path / "9.orbax-checkpoint-tmp-1").mkdir()
    again = Checkpoints(tmp_path, keep=5)
    assert again.latest() == 1
    assert float(again.restore(like={"w": jnp.zeros(3)})["w"][0]) == 1
    with pytest.raises(CheckpointError, match="cut off while it was written"):
        again.restore(2, like={"w": jnp.zeros(3)})
    with pytest.raises(CheckpointError, match="there is no such folder"):
        again.restore(4, like={"w": jnp.zeros(3)})
    again.save(2, {"w": jnp.full(3, 22.0)})  # the leftover does not stand in the way
    assert float(again.restore(like={"w": jnp.zeros(3)})["w"][0]) == 22


def _flip_a_bit(folder):
    largest = max((p for p in (folder / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))


def test_a_flipped_bit_is_found_and_the_step_before_is_used(tmp_path):
    saved = Checkpoints(tmp_path, keep=5)
    for step in (1, 2):
        saved.save(step, {"w": jnp.full(3000, float(step))})
    saved.wait()
    _flip_a_bit(tmp_path / "2")
    with pytest.raises(CheckpointError, match="damaged: changed files"):
        saved.restore(2, like={"w": jnp.zeros(3000)})
    with pytest.warns(UserWarning, match="falling back"):
        assert float(saved.restore(like={"w": jnp.zeros(3000)})["w"][0]) == 1
    _flip_a_bit(tmp_path / "1")
    none = pytest.raises(CheckpointError, match="holds no complete checkpoint")
    with pytest.warns(UserWarning, match="damaged"), none:
        saved.restore(like={"w": jnp.zeros(3000)})


def test_a_failed_save_is_raised(tmp_path):
    (tmp_path / "file").write_text("in the way")
    saved = Checkpoints(tmp_path / "file" / "c")
    with pytest.raises((CheckpointError, OSError), match="file"):
        saved.save(1, {"w": jnp.ones(2)})


def test_unchanged_leaves_are_stored_by_reference(tmp_path):
    first, second, third = (tmp_path / name for name in ("align", "instruct", "more"))
    tree = _tree()
    save_params(first, tree)
    changed = {**tree, "connector": {**tree["connector"], "kernel": tree["connector"]["kernel"] + 1}}
    save_params(second, trees.unstack_layers(changed), elsewhere=[first, tmp_path / "nothing"])
    cards = json.loads((second / "manifest.json").read_text())["leaves"]
    assert [path for path, card in cards.items() if "folder" not in card] == ["connector/kernel"]
    assert cards["llm/layers/1/mlp/kernel"]["folder"] == "../align"
    save_params(third, changed, elsewhere=[second])  # a reference to a reference leads to the first owner
    cards = json.loads((third / "manifest.json").read_text())["leaves"]
    assert {card["folder"] for card in cards.values()} == {"../align", "../instruct"}
    assert not (third / "arrays").exists()
    _equal(load_params(third, changed), changed)
    _equal(load_params(third), trees.unstack_layers(changed))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for folder in (first, second, third):
        folder.rename(moved / folder.name)
    _equal(load_params(moved / "third" if (moved / "third").exists() else moved / "more", changed), changed)


def test_a_reference_to_a_rewritten_or_lost_folder_is_an_error(tmp_path):
    save_params(tmp_path / "a", {"w": jnp.ones(3)})
    save_params(tmp_path / "b", {"w": jnp.ones(3)}, elsewhere=[tmp_path / "a"])
    save_params(tmp_path / "a", {"w": jnp.ones(3)}, elsewhere=[tmp_path / "b"])  # no circle
    _equal(load_params(tmp_path / "b"), {"w": jnp.ones(3)})
    save_params(tmp_path / "a", {"w": jnp.zeros(3)})
    with pytest.raises(CheckpointError, match=r"refers to .*a for \['w'\], but that folder was rewritten"):
        load_params(tmp_path / "b")
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        load_params(tmp_path / "b")
    assert not is_saved(tmp_path / "a")


def test_fingerprints_see_every_bit_and_no_sharding():
    base = jnp.arange(64.0).reshape(8, 8)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.device_put(base, NamedSharding(mesh, PartitionSpec(None, "x")))
    swapped = base.at[0, 0].set(1.0).at[0, 1].set(0.0)
    marks = fingerprints({"a": base, "b": cut, "c": swapped, "d": -base, "e": base.T, "f": np.asarray(base)})
    assert marks["a"] == marks["b"] == marks["f"]
    assert len(set(marks.values())) == 4
    for dtype in (jnp.bfloat16, jnp.int8, jnp.int32, bool):
        assert len(fingerprints({"x": base.astype(dtype)})["x"]) == 16
