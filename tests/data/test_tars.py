import io
import json
import pickle
import tarfile

import pytest

from lvlm_jax.data.documents import Mmc4Tar
from lvlm_jax.data.sources import Source
from lvlm_jax.data.tars import TarFiles, TarPairs
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Image, Text
from lvlm_jax.recipe import Data

from .conftest import png

PNG = png()


def segments(example):
    return [[s.text if isinstance(s, Text) else s for s in turn.segments] for turn in example.turns]


def shard(path, members):
    """A tar of (name, content) pairs; dicts are written as JSON."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(first, count, score=None):
    for n in range(first, first + count):
        yield f"{n:05d}.png", PNG
        yield f"{n:05d}.txt", f"caption {n}\n"
        if score:
            yield f"{n:05d}.json", {"similarity": score(n)}


def test_shards_by_braces_give_captioned_pictures(tmp_path):
    for n in range(3):
        shard(tmp_path / f"s-{n:05d}.tar", pairs(10 * n, 4))
    source = TarPairs(f"{tmp_path}/s-{{00000..00002}}.tar")
    assert isinstance(source, Source)
    assert len(source) == 12
    assert segments(source[5]) == [[Image(PNG)], ["caption 11"]]
    assert (source[5].id, source[5].origin) == ("00011", f"{tmp_path}/s-00001.tar: 00011")
    sent = pickle.dumps(source)
    assert repr(pickle.loads(sent)) == repr(source)
    shard(tmp_path / "s-00002.tar", pairs(21, 4))
    assert repr(TarPairs(tmp_path)) != repr(source)


def test_a_talk_in_json_and_several_pictures(tmp_path):
    talk = [{"from": "human", "value": "<image><image>same?"}, {"from": "gpt", "value": "no"}]
    members = [("a/x.0.jpg", b"0"), ("a/x.1.jpg", b"1"), ("a/x.json", {"image": ["p", "q"], "conversations": talk})]
    source = TarPairs(shard(tmp_path / "a.tar", members))
    assert segments(source[0]) == [[Image(b"0"), Image(b"1"), "same?"], ["no"]]
    assert source[0].id == "a/x"


def test_records_below_a_score_are_left_out_and_counted(tmp_path):
    path = shard(tmp_path / "a.tar", [*pairs(0, 10, lambda n: n / 10), *pairs(50, 1)])
    source = TarFiles(path=str(path), score="similarity", min_score=0.6).open()
    assert [source[i].id for i in range(4)] == ["00006", "00007", "00008", "00009"]
    assert source.left_out == {"records below min_score": 6}
    assert "records=5 of 11, similarity>=0.6, left_out={'records below min_score': 6}" in repr(source)
    with pytest.raises(DataError, match=r"a\.tar: 00050: no number 'similarity' in its \.json, which min_score needs"):
        source[4]
    with pytest.raises(DataError, match=r"no record is left; left out: {'records below min_score': 10}"):
        TarPairs(shard(tmp_path / "b.tar", pairs(0, 10, lambda n: 0.1)), "similarity", 0.6)
    with pytest.raises(ValueError, match="score and min_score go together"):
        Data(source="webdataset", path="x", min_score=0.3)


def test_the_index_is_built_once(tmp_path, monkeypatch, capsys):
    path = shard(tmp_path / "a.tar", pairs(0, 5, lambda n: n / 10))
    wanted = TarPairs(path, "similarity", 0.2, cache=tmp_path / "cache")
    monkeypatch.setattr(tarfile, "open", None)
    again = TarPairs(path, "similarity", 0.2, cache=tmp_path / "cache")
    assert repr(again) == repr(wanted)
    assert again[2].turns == wanted[2].turns
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npz"]
    monkeypatch.undo()
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-40])
    assert repr(TarPairs(path, "similarity", 0.2, cache=tmp_path / "cache")) == repr(wanted)
    assert f"{kept} is damaged" in capsys.readouterr().err
    monkeypatch.setattr(tarfile, "open", None)
    assert repr(TarPairs(path, "similarity", 0.2, cache=tmp_path / "cache")) == repr(wanted)
    monkeypatch.undo()
    shard(path, pairs(0, 7, lambda n: n / 10))
    assert len(TarPairs(path, "similarity", 0.2, cache=tmp_path / "cache")) == 5


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda data: data[: 512 * 8 + 530], "ends in the middle of record 00002, after 2 whole ones"),
        (lambda data: data[: 512 * 11 + 5], "ends in the middle of record 00002, after 2 whole ones"),
        (lambda data: data[:-8192], r"ends without tar's closing blocks, in or after record 00005, after 5 whole ones"),
    ],
)
def test_a_shard_that_ends_in_the_middle_of_a_record(tmp_path, cut, message):
    path = shard(tmp_path / "a.tar", pairs(0, 6))
    whole = path.read_bytes().rstrip(b"\0")
    whole += b"\0" * (-len(whole) % 512)
    path.write_bytes(cut(whole + b"\0" * 8192))
    with pytest.raises(
        DataError, match=rf"a\.tar: {message}; copy or download it again, or keep what is whole with on_bad"
    ):
        TarPairs(path)
    source = TarPairs(path, on_bad="skip")
    assert len(source) == int(message.split("after ")[-1].split()[0])
    assert source.left_out == {"shards cut short": 1}
    assert segments(source[len(source) - 1])[0] == [Image(PNG)]


def test_a_key_that_stands_twice(tmp_path):
    path = shard(tmp_path / "a.tar", [*pairs(0, 3), *pairs(1, 1)])
    with pytest.raises(DataError, match=r"a\.tar: the key '00001' stands twice \(00001\.txt\).*on_bad='skip'"):
        TarPairs(path)
    source = TarPairs(path, on_bad="skip")
    assert [source[i].id for i in range(len(source))] == ["00000", "00002"]
    assert source.left_out == {"keys that stand twice": 1}


BAD = {
    "no text": ([("a.png", PNG)], r"a: has \.png but no \.txt, and no conversations or .* in a \.json; add its text"),
    "no picture": ([("a.txt", "hi")], r"a: has no picture \(\.jpg,"),
    "broken json": ([("a.png", PNG), ("a.json", "{")], r"a\.json: not UTF-8 json"),
    "json of a list": ([("a.png", PNG), ("a.json", "[1]")], r"a\.json: must be a JSON object {\.\.\.}, this is a list"),
    "empty caption": ([("a.png", PNG), ("a.txt", " ")], r"a: 'caption' must be text, this is empty text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_names_shard_and_key(tmp_path, name):
    members, message = BAD[name]
    with pytest.raises(DataError, match=rf"a\.tar: {message}"):
        TarPairs(shard(tmp_path / "a.tar", members))[0]


def test_what_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + b"x" * 3000)
    with pytest.raises(DataError, match=r"a\.tar: not a tar .*; \.tar\.gz must be unpacked"):
        TarPairs(tmp_path / "a.tar")


def test_documents_of_open_flamingo(tmp_path):
    import base64

    picture = {"image_base64": base64.b64encode(PNG).decode(), "matched_text_index": 1, "matched_sim": 0.3}
    record = {"text_list": ["One.", "Two."], "image_info": [picture, {**picture, "matched_sim": 0.1}]}
    source = Mmc4Tar(shard(tmp_path / "a.tar", [("k.json", record)]))
    assert segments(source[0]) == [["One. ", Image(PNG), "Two."]]
    record["image_info"] = [{"image_name": "x.png", "matched_text_index": 0, "matched_sim": 1.0}]
    with pytest.raises(
        DataError, match=r"k: image_info\[0\]: no 'image_base64'; a tar's pictures must stand in the tar"
    ):
        Mmc4Tar(shard(tmp_path / "b.tar", [("k.json", record)]))[0]


def test_more_than_ten_pictures_come_in_the_order_of_their_numbers(tmp_path):
    talk = [{"from": "human", "value": "<image>" * 12 + "which?"}, {"from": "gpt", "value": "x"}]
    members = [(f"a.{n}.jpg", str(n).encode()) for n in range(12)] + [("a.json", {"conversations": talk})]
    shown = TarPairs(shard(tmp_path / "a.tar", members))[0].images
    assert [int(image.source) for image in shown] == list(range(12))


def test_a_broken_json_under_a_threshold_is_one_bad_record(tmp_path):
    path = shard(tmp_path / "a.tar", [*pairs(0, 3, lambda n: 0.9), ("9.png", PNG), ("9.txt", "x"), ("9.json", "{")])
    source = TarFiles(path=str(path), score="similarity", min_score=0.6).open(on_bad="skip")
    assert len(source) == 4
    with pytest.raises(DataError, match=r"a\.tar: 9\.json: not UTF-8 json"):
        source[3]
