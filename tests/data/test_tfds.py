import io
import json
import pickle
import struct
import subprocess
import sys

import pytest

from lvlm_jax.cli import main
from lvlm_jax.data.sources import Source
from lvlm_jax.data.tfds import Tfds, TfdsSplit, convert_tfrecord
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Image, Text

from .conftest import png

PNG = png()


def segments(example):
    return [[s.text if isinstance(s, Text) else s for s in turn.segments] for turn in example.turns]


def features():
    import tensorflow_datasets as tfds

    talk = tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()})
    picture = tfds.features.Image(encoding_format="png")
    label = tfds.features.ClassLabel(names=["cat", "dog"])
    fields = {"image": picture, "conversations": talk, "label": label, "asked": tfds.features.Text()}
    return tfds.features.FeaturesDict(fields)


def serialized(kind, count):
    for n in range(count):
        talk = [{"from": "human", "value": f"<image>what is {n}?"}, {"from": "gpt", "value": "red"}]
        values = {"image": io.BytesIO(PNG), "conversations": talk, "label": n % 2, "asked": f"is it {n}?"}
        yield kind.serialize_example(kind.encode_example(values))


def masked(data):
    import google_crc32c

    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecord(rows):
    out = b""
    for row in rows:
        length = struct.pack("<Q", len(row))
        out += length + masked(length) + row + masked(row)
    return out


@pytest.fixture(scope="module")
def kind():
    return features()


@pytest.fixture
def prepared(tmp_path, kind):
    """A set of five records in two TFRecord files, as TFDS writes it."""
    folder = tmp_path / "pets" / "1.0.0"
    folder.mkdir(parents=True)
    rows = list(serialized(kind, 5))
    for number, part in enumerate((rows[:3], rows[3:])):
        (folder / f"pets-train.tfrecord-{number:05d}-of-00002").write_bytes(tfrecord(part))
    split = {"name": "train", "numBytes": "1", "shardLengths": ["3", "2"]}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "pets", "version": "1.0.0", "fileFormat": "tfrecord", "moduleName": "pets.pets", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    kind.save_config(folder)
    return folder


def test_a_converted_set_is_read_by_number_without_tensorflow(prepared, tmp_path, capsys):
    assert main(["data", "convert-tfrecord", str(prepared), str(tmp_path / "new")]) == 0
    assert "5 records written to" in capsys.readouterr().out
    source = Tfds(tmp_path / "new")
    assert isinstance(source, Source)
    assert len(source) == 5
    assert segments(source[4]) == [[Image(PNG), "what is 4?"], ["red"]]
    assert source.origin(4) == f"{tmp_path}/new: train[4]"
    assert len(Tfds(tmp_path / "new", split="train[:2]")) == 2
    assert "tensorflow" not in sys.modules
    sent = pickle.loads(pickle.dumps(source))
    assert repr(sent) == repr(source)
    assert sent[1].turns == source[1].turns


def test_features_called_otherwise_and_labels_by_name(prepared, tmp_path):
    convert_tfrecord(prepared, tmp_path / "new", progress=False)
    source = TfdsSplit(path=str(tmp_path / "new"), rename=("question=asked", "answer=label")).open()
    assert "'question': 'asked'" in repr(source)
    assert segments(source[3]) == [[Image(PNG), "is it 3?"], ["dog"]]
    with pytest.raises(DataError, match=r"no feature 'lable'; there are .*label"):
        Tfds(tmp_path / "new", rename={"answer": "lable"})


def test_pickled_sources_work_in_a_new_process(prepared, tmp_path):
    convert_tfrecord(prepared, tmp_path / "new", progress=False)
    (tmp_path / "source").write_bytes(pickle.dumps(Tfds(tmp_path / "new")))
    line = "import pickle, sys; s = pickle.loads(open(sys.argv[1], 'rb').read()); print(len(s), s[3].turns[1].segments)"
    done = subprocess.run([sys.executable, "-c", line, tmp_path / "source"], capture_output=True, text=True, check=True)
    assert done.stdout == "5 (Text(text='red'),)\n"


def test_sets_that_cannot_be_read(prepared, tmp_path):
    with pytest.raises(
        DataError, match=r"format 'tfrecord', which cannot be read by number; .*lvlm data convert-tfrecord"
    ):
        Tfds(prepared)
    with pytest.raises(DataError, match=r"no dataset_info\.json; give the folder of one prepared version"):
        Tfds(tmp_path)
    convert_tfrecord(prepared, tmp_path / "new", progress=False)
    with pytest.raises(DataError, match=r"new: split 'test': .*train"):
        Tfds(tmp_path / "new", split="test")
    with pytest.raises(DataError, match=r"new: there is something already; give a new folder"):
        convert_tfrecord(prepared, tmp_path / "new")
    with pytest.raises(DataError, match="format 'array_record' already; only tfrecord is converted"):
        convert_tfrecord(tmp_path / "new", tmp_path / "newer")


def damage(change):
    def apply(folder):
        file = folder / "pets-train.tfrecord-00001-of-00002"
        file.write_bytes(change(file.read_bytes()))

    return apply


DAMAGE = {
    "cut in a record": (damage(lambda d: d[:-30]), r"00001-of-00002: ends in the middle of record 1; copy"),
    "cut in a head": (damage(lambda d: d + b"123"), r"00001-of-00002: ends in the middle of record 2; copy"),
    "a changed byte": (
        damage(lambda d: d[:40] + b"?" + d[41:]),
        r"record 0: its checksum differs; the file is damaged",
    ),
    "another format": (damage(lambda d: b"x" * 64), r"record 0: the checksum of its length differs; not a TFRecord"),
    "one record fewer": (damage(lambda d: b""), r"0 records, but dataset_info\.json lists 2 for split 'train'"),
    "a file missing": (
        lambda f: (f / "pets-train.tfrecord-00001-of-00002").unlink(),
        r"of split 'train' is missing; copy",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_set_is_not_converted(prepared, tmp_path, name):
    change, message = DAMAGE[name]
    change(prepared)
    with pytest.raises(DataError, match=message):
        convert_tfrecord(prepared, tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_without_the_checksum_library(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    assert main(["data", "convert-tfrecord", str(prepared), str(tmp_path / "new")]) == 2
    assert "the records' checksums need google-crc32c; pip install 'lvlm-jax[tfrecord]'" in capsys.readouterr().err
