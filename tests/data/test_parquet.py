import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvlm_jax.data.parquet import Parquet, ParquetFiles
from lvlm_jax.data.sources import Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Image, Text

from .conftest import png

PNG = png()
TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]


def segments(example):
    return [[s.text if isinstance(s, Text) else s for s in turn.segments] for turn in example.turns]


def write(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_the_columns_of_the_hub(tmp_path):
    struct = [{"bytes": PNG, "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    path = write(tmp_path / "a.parquet", {"id": ["x", "y"], "image": struct, "conversations": [TALK, TALK]})
    source = Parquet(path)
    assert isinstance(source, Source)
    assert segments(source[0]) == [[Image(PNG), "What is it?"], ["A square."]]
    assert source[1].images == (Image(str(tmp_path / "b.png")),)
    assert (source[0].id, source[-1].origin) == ("x", f"{path}: row 1")


def test_messages_with_bare_pictures_of_the_images_column(tmp_path):
    content = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "what?", "index": None}]
    reply = [{"type": "text", "text": "a box", "index": None}]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    path = write(tmp_path / "a.parquet", {"messages": [talk], "images": [[{"bytes": PNG, "path": None}]]})
    assert segments(Parquet(path)[0]) == [[Image(PNG), "what?"], ["a box"]]


LAYOUTS = {
    "cauldron": (
        {"images": [[PNG, PNG]], "texts": [[{"user": "q", "assistant": "a"}, {"user": "r", "assistant": "b"}]]},
        [[Image(PNG), Image(PNG), "q"], ["a"], ["r"], ["b"]],
    ),
    "question": ({"image": [PNG], "question": ["q?"], "answer": ["yes"]}, [[Image(PNG), "q?"], ["yes"]]),
    "answers": ({"image": [PNG], "question": ["q?"], "answers": [["a", "b", "b"]]}, [[Image(PNG), "q?"], ["b"]]),
    "caption": ({"image": [PNG], "caption": ["a cat"]}, [[Image(PNG)], ["a cat"]]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts(tmp_path, name):
    columns, wanted = LAYOUTS[name]
    assert segments(Parquet(write(tmp_path / "a.parquet", columns))[0]) == wanted


def test_columns_called_otherwise(tmp_path):
    path = write(tmp_path / "a.parquet", {"jpg": [PNG], "TEXT": ["a cat"], "other": [1]})
    source = ParquetFiles(path=str(path), rename=("image=jpg", "caption=TEXT")).open()
    assert segments(source[0]) == [[Image(PNG)], ["a cat"]]
    with pytest.raises(DataError, match="no column 'TXT'; there are jpg, TEXT, other"):
        Parquet(path, rename={"caption": "TXT"})
    with pytest.raises(DataError, match="rename: 'caption' must read our_name=their_name"):
        ParquetFiles(path="x", rename=("caption",))
    with pytest.raises(DataError, match="rename: 'imgae' is no field of a record; the fields are id, image, images,"):
        ParquetFiles(path="x", rename=("imgae=jpg", "caption=TEXT"))
    with pytest.raises(DataError, match="rename: a field is named twice"):
        ParquetFiles(path="x", rename=("caption=a", "caption=b"))


def test_row_groups_are_read_when_asked_for_and_the_source_is_small_to_send(tmp_path, monkeypatch):
    for part in range(3):
        rows = {"image": [PNG] * 50, "caption": [f"{part} {n}" for n in range(50)]}
        write(tmp_path / f"part-{part}.parquet", rows, row_group_size=10)
    source = Parquet(tmp_path)
    assert len(source) == 150
    read = []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, n, *a: read.append(n) or whole(self, n, *a))
    assert [source[i].turns[1].segments[0].text for i in (3, 9, 60, 149)] == ["0 3", "0 9", "1 10", "2 49"]
    assert read == [0, 1, 4]
    assert [source.origin(i).rsplit("/", 1)[1] for i in (60, 149)] == [
        "part-1.parquet: row 10",
        "part-2.parquet: row 49",
    ]
    sent = pickle.dumps(source)
    assert len(sent) < 5000
    assert repr(pickle.loads(sent)) == repr(source)
    assert pickle.loads(sent)[60].turns == source[60].turns
    rows["caption"][-1] = "2 48"
    write(tmp_path / "part-2.parquet", rows, row_group_size=10)
    assert repr(Parquet(tmp_path)) != repr(source)


def test_old_row_groups_are_let_go(tmp_path, monkeypatch):
    from lvlm_jax.data import parquet

    rows = {"image": [PNG] * 50, "caption": [str(n) for n in range(50)]}
    source = Parquet(write(tmp_path / "a.parquet", rows, row_group_size=10))
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 25 * len(PNG))
    for index in (0, 15, 25, 35):
        assert source[index].turns[1].segments[0].text == str(index)
    assert [*source._table._kept] == [2, 3]


BAD = {
    "image of numbers": (
        {"image": [3], "caption": ["a"]},
        "column 'image' has type int64, but 'image' must be pictures",
    ),
    "talk of texts": (
        {"conversations": [["a", "b"]]},
        r"column 'conversations' has type list<.*string>, but 'conversations' must be a list of structs {from, value}",
    ),
    "caption of lists": ({"caption": [["a"]]}, "column 'caption' has type list<.*>, but 'caption' must be text"),
    "no talk": (
        {"picture": [PNG], "label": [1]},
        "none of the columns conversations, .*; there are picture, label; say",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_column_of_the_wrong_type(tmp_path, name):
    columns, message = BAD[name]
    with pytest.raises(DataError, match=rf"a\.parquet: {message}"):
        Parquet(write(tmp_path / "a.parquet", columns))


def test_a_file_cut_short_and_files_that_differ(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": [PNG], "caption": ["a"]})
    write(tmp_path / "b.parquet", {"image": ["b.png"], "caption": ["a"]})
    with pytest.raises(
        DataError, match=r"b\.parquet: column 'image' differs from .*a\.parquet; one path must be one table"
    ):
        Parquet(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file .*cut short, or another format"):
        Parquet(path)


def test_a_bad_row_names_its_place(tmp_path):
    rows = {"image": pa.array([PNG, None, PNG], pa.binary()), "conversations": [TALK, TALK, []]}
    source = Parquet(write(tmp_path / "a.parquet", rows))
    with pytest.raises(DataError, match=r"a\.parquet: row 1: 1 x <image> in 'conversations' but 0 picture"):
        source[1]
    with pytest.raises(DataError, match=r"a\.parquet: row 2: 'conversations' must be a list with at least one turn"):
        source[2]


def test_pictures_that_no_column_names_are_an_error(tmp_path):
    """A table that would train on text alone, because its pictures stand in a column of another name."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"photo": pa.array([{"bytes": PNG, "path": "a.png"}], kind), "caption": ["a"], "question": ["b?"]}
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns | {"answer": ["c"]}), path)
    with pytest.raises(DataError, match="column 'photo' holds pictures, but no column is read as 'image'"):
        ParquetFiles(path=str(path)).open()
    assert ParquetFiles(path=str(path), rename=("image=photo",)).open()[0].images
