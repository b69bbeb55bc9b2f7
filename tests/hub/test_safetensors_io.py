"""Folders of safetensors files: read lazily, written whole or not at all; every damage has its own message."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.safetensors_io import INDEX, SINGLE, TensorFolder, new_folder, write_folder

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.bias": np.arange(5, dtype=np.float16),
    "c": np.asarray(2.5, np.float32),
    "d": np.arange(6).reshape(2, 3),
    "e.empty": np.zeros((0, 4), np.float32),
}


def bf16(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("limit", [10**9, 40, 1])
def test_round_trip(tmp_path, limit):
    tensors = {**TENSORS, "z": bf16(3, 5)}
    write_folder(tmp_path / "x", ((k, (lambda v=v: v) if k == "d" else v) for k, v in tensors.items()), limit)
    folder = TensorFolder(tmp_path / "x")
    assert set(folder) == set(tensors)
    assert (tmp_path / "x" / SINGLE).exists() == (limit == 10**9)
    for key, value in tensors.items():
        assert folder.shape(key) == value.shape
        assert folder.dtype(key) == value.dtype == folder.read(key).dtype
        assert folder[key].tobytes() == value.tobytes()


def test_transposed_arrays_are_written_by_rows(tmp_path):
    write_folder(tmp_path / "x", {"t": TENSORS["a.weight"].T}.items())
    np.testing.assert_array_equal(TensorFolder(tmp_path / "x")["t"], TENSORS["a.weight"].T)


@pytest.mark.parametrize("limit", [10**9, 40])
def test_the_libraries_read_what_is_written(tmp_path, limit):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    write_folder(tmp_path / "x", {**TENSORS, "z": bf16(3, 5)}.items(), limit)
    got = {}
    for file in (tmp_path / "x").glob("*.safetensors"):
        got.update(load_torch(file))
    assert got["z"].dtype == torch.bfloat16
    np.testing.assert_array_equal(got["z"].float().numpy(), bf16(3, 5).astype(np.float32))
    np.testing.assert_array_equal(got["d"].numpy(), TENSORS["d"])
    if limit == 40:
        index = json.loads((tmp_path / "x" / INDEX).read_text())
        assert set(index["weight_map"]) == {*TENSORS, "z"}
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in [*TENSORS.values(), bf16(3, 5)])


def test_shards_without_an_index(tmp_path):
    save_file({"a": TENSORS["c"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["d"]}, tmp_path / "model-00002-of-00002.safetensors")
    assert set(TensorFolder(tmp_path)) == {"a", "b"}


def test_read_opens_only_what_it_needs(tmp_path):
    write_folder(tmp_path / "x", TENSORS.items(), 1)
    folder = TensorFolder(tmp_path / "x")
    for file in (tmp_path / "x").glob("*.safetensors"):
        if file != folder.file("d"):
            file.unlink()
    np.testing.assert_array_equal(folder["d"], TENSORS["d"])


def two_shards(path):
    write_folder(path, {"a": TENSORS["a.weight"], "b": TENSORS["d"]}.items(), 1)
    return path


def truncated(path):
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def trailing(path):
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes() + b"\0" * 8)


def garbage(path):
    (path / "model-00001-of-00002.safetensors").write_bytes(b"<html>not found</html>" * 20)


def empty(path):
    (path / "model-00001-of-00002.safetensors").write_bytes(b"")


def pointer(path):
    (path / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def lost_shard(path):
    (path / "model-00002-of-00002.safetensors").unlink()


def lost_shard_and_index(path):
    lost_shard(path)
    (path / INDEX).unlink()


def _edit(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def absent_tensor(path):
    _edit(path, lambda names: names.update(ghost="model-00001-of-00002.safetensors"))


def climbing(path):
    _edit(path, lambda names: names.update(a="../other.safetensors"))


def index_garbage(path):
    (path / INDEX).write_text("{")


def twice(path):
    (path / INDEX).unlink()
    save_file({"a": TENSORS["c"]}, path / "other.safetensors")


def pickles(path):
    for file in path.iterdir():
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def nothing(path):
    for file in path.iterdir():
        file.unlink()


DAMAGE = [
    (truncated, r"00002-of-00002.safetensors: not a whole safetensors file .*fetch or copy it again"),
    (trailing, r"00002-of-00002.safetensors: not a whole safetensors file"),
    (garbage, r"00001-of-00002.safetensors: not a whole safetensors file"),
    (empty, r"00001-of-00002.safetensors: not a whole safetensors file .* it is 0 bytes"),
    (pointer, r"a git-lfs pointer, not the file; run 'git lfs pull'"),
    (lost_shard, r"index.json names model-00002-of-00002.safetensors, which is not there; the download or copy"),
    (lost_shard_and_index, r"of the 2 files of 'model' number 2 is not there"),
    (absent_tensor, r"names tensor 'ghost' in model-00001-of-00002.safetensors, which does not hold it"),
    (climbing, r"'../other.safetensors' is not the name of a file beside the index"),
    (index_garbage, r"index.json: not an index of safetensors files"),
    (twice, r"tensor 'a' stands in model-00001-of-00002.safetensors and in other.safetensors"),
    (pickles, r"pytorch_model.bin is \(or lists\) a pickle, which runs code .*save_pretrained\(new_folder\)"),
    (nothing, r"no .safetensors file there; a checkpoint is config.json with model.safetensors"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=lambda x: getattr(x, "__name__", ""))
def test_damage_has_its_message(tmp_path, damage, message):
    path = two_shards(tmp_path / "x")
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        TensorFolder(path)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; a checkpoint is a folder of safetensors files"):
        TensorFolder(tmp_path / "none")


def test_file_that_shrinks_under_the_reader(tmp_path):
    path = two_shards(tmp_path / "x")
    folder = TensorFolder(path)
    truncated(path)
    with pytest.raises(CheckpointError, match="ends inside tensor 'b'; it changed while it was read"):
        folder.read("b")


def test_nothing_is_left_when_writing_fails(tmp_path):
    def tensors():
        yield "a", TENSORS["a.weight"]
        yield "b", TENSORS["d"]
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_folder(tmp_path / "x", tensors(), 1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_stays(tmp_path):
    (tmp_path / "x").mkdir()
    write_folder(tmp_path / "x", TENSORS.items())  # an empty folder may be filled
    with pytest.raises(FileExistsError, match="there is something already; give a new folder"):
        write_folder(tmp_path / "x", {"new": TENSORS["d"]}.items())
    assert set(load_file(tmp_path / "x" / SINGLE)) == set(TENSORS)
    with pytest.raises(RuntimeError, match="broke"), new_folder(tmp_path / "x", overwrite=True):
        raise RuntimeError("broke")
    assert set(load_file(tmp_path / "x" / SINGLE)) == set(TENSORS)
    write_folder(tmp_path / "x", {"new": TENSORS["d"]}.items(), overwrite=True)
    assert set(load_file(tmp_path / "x" / SINGLE)) == {"new"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_wrong_tensors(tmp_path):
    with pytest.raises(ValueError, match="tensor 'a' is given twice"):
        write_folder(tmp_path / "x", [("a", TENSORS["c"]), ("a", TENSORS["d"])], 1)
    with pytest.raises(ValueError, match="tensor 'a': safetensors has no number type for complex64"):
        write_folder(tmp_path / "x", [("a", np.zeros(2, np.complex64))])
