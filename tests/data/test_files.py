import random

import numpy as np
import pytest
from etils import epath

from lvlm_jax.data.files import braces, expand, read_arrays, read_ranges
from lvlm_jax.processing.encode import DataError


def test_braces_count_with_leading_zeros_list_and_multiply():
    assert braces("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert braces("plain.tar") == ["plain.tar"]


def test_a_path_is_a_file_a_folder_a_glob_or_braces(tmp_path):
    for name in ("b-1.tar", "b-0.tar", "c.txt"):
        (tmp_path / name).write_bytes(b"x")
    names = lambda path: [file.name for file in expand(path, (".tar",))]  # noqa: E731
    assert names(tmp_path / "c.txt") == ["c.txt"]
    assert names(tmp_path) == ["b-0.tar", "b-1.tar"]
    assert names(tmp_path / "b-*.tar") == ["b-0.tar", "b-1.tar"]
    assert names(tmp_path / "b-{0..1}.tar") == ["b-0.tar", "b-1.tar"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.tar", r"gone\.tar does not exist; give the path of \.tar files"),
        ("b-{0..2}.tar", r"b-2\.tar does not exist"),
        ("x*.tar", r"x\*\.tar: no file matches; check the folder and the pattern"),
        ("empty", r"empty is a folder without a \.tar file"),
        ("b-{2..0}.tar", r"\{2\.\.0\} counts down"),
        ("b-{x}.tar", r"\{x\} is neither a count like \{00000\.\.00010\} nor a list"),
        ("b-{0,0}.tar", r"names .*b-0\.tar twice"),
    ],
)
def test_a_path_that_means_nothing(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    for name in ("b-0.tar", "b-1.tar"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=message):
        expand(f"{tmp_path}/{path}", (".tar",))


def test_a_file_that_became_shorter(tmp_path):
    from etils import epath

    (tmp_path / "a").write_bytes(b"12345")
    assert read_ranges(epath.Path(tmp_path / "a"), [(1, 3), (0, 1)]) == [b"234", b"1"]
    with pytest.raises(DataError, match="ends at byte 5, the index expects 7; it has changed"):
        read_ranges(epath.Path(tmp_path / "a"), [(4, 3)])


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_no_flipped_bit_of_kept_arrays_passes_as_another_number(tmp_path, capsys, write):
    """A bit of a zip file either matters to nobody (a date), or is found by its checksums."""
    file, wanted = epath.Path(tmp_path / "kept.npz"), {"lengths": np.arange(40), "texts": np.array("{'a': [1, 2]}")}
    write(file, **wanted)
    whole, chance, found = file.read_bytes(), random.Random(0), 0
    for bit in chance.sample(range(8 * len(whole)), 1000):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(data))
        got = read_arrays(file, list(wanted))
        found += got is None
        assert got is None or all(np.array_equal(got[name], wanted[name]) for name in wanted), f"bit {bit}"
    assert capsys.readouterr().err.count("is damaged (") == found > 500
    file.write_bytes(whole)
    assert read_arrays(file, list(wanted)).keys() == wanted.keys()
    assert read_arrays(epath.Path(tmp_path / "gone.npz"), ["lengths"]) is None
