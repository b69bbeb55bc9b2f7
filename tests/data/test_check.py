import json

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.data.check import check, histogram
from lvlm_jax.data.sources import LlavaJson

from .conftest import jpeg


def record(image="good.png", question="<image>\nwhat is it?", answer="a circle"):
    turns = [{"from": "human", "value": question}] + ([{"from": "gpt", "value": answer}] if answer is not None else [])
    return {"conversations": turns} | ({"image": image} if image else {})


BAD = [
    (record(image="gone.png"), "the file does not exist"),
    (record(image="cut.jpg"), "cut.jpg"),
    (record(image="page.jpg"), "is an HTML or XML page, not a picture"),
    (record(image="empty.png"), "the file is empty"),
    (record(image="../good.png"), "leaves the picture folder"),
    (record(image=["good.png", "good.png"]), "1 x <image> in 'conversations' but 2 picture(s)"),
    (record(image=None), "1 x <image> in 'conversations' but 0 picture(s)"),
    (record(answer=None), "no assistant turn, so nothing to learn from"),
    (record(answer=""), ""),
    ('{"id": 3,', "broken JSON at character"),
]


@pytest.fixture
def folder(tmp_path):
    PIL.Image.new("RGB", (20, 10)).save(tmp_path / "good.png")
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:-900])
    (tmp_path / "page.jpg").write_bytes(b"<!DOCTYPE html><html></html>")
    (tmp_path / "empty.png").write_bytes(b"")
    return tmp_path


def write(folder, records):
    path = folder / "train.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def test_the_report_names_file_line_and_reason_of_every_bad_record(folder, encoder, spec):
    bad = [pair for pair in BAD if pair[1]]
    path = write(folder, [record(), *(r for r, _ in bad), record(image=None, question="hi")])
    report = check(LlavaJson(path), encoder, progress=False, spec=spec)
    assert [entry.index for entry in report.bad] == list(range(1, len(bad) + 1))
    for entry, (_, message) in zip(report.bad, bad, strict=True):
        assert str(entry).startswith(f"{path}:{entry.index + 1}: ")
        assert message in entry.reason
        assert not entry.reason.startswith(str(path))
    assert not report.ok
    assert report.pictures.tolist() == [1, 0]
    page = str(report)
    assert all(str(entry) in page for entry in report.bad)
    assert f"{len(bad) + 2} records: 2 good, {len(bad)} bad; 1 pictures (decoded)" in page
    assert "tokens a record:" in page


def test_pictures_are_left_alone_on_request_and_the_limit_holds(folder, encoder):
    path = write(folder, [record(), record(image="gone.png"), record(image="../x.png"), '{"id": 3,'])
    assert [b.index for b in check(LlavaJson(path), encoder, images=False, progress=False).bad] == [2, 3]
    report = check(LlavaJson(path), encoder, limit=1, progress=False)
    assert report.ok
    assert report.total == 1


def test_a_progress_bar_is_drawn(folder, encoder, capsys):
    check(LlavaJson(write(folder, [record()])), encoder)
    assert "reading records" in capsys.readouterr().err


def test_a_mistake_in_code_is_not_a_bad_record(folder):
    def broken(example):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        check(LlavaJson(write(folder, [record()])), broken, progress=False)


def test_histogram():
    assert histogram(np.asarray([1, 1, 1, 2]), width=6) == ["  1 to 1          3  ######", "  2 to 2          1  ##"]
    assert sum(int(line.split()[3].replace(",", "")) for line in histogram(np.arange(2000))) == 2000
    assert len(histogram(np.asarray([7]))) == 1


def test_words_that_the_tokenizer_does_not_know_are_counted(folder, encoder):
    source = LlavaJson(write(folder, [record()]))
    tokens = encoder(source[0]).tokens
    word = int(tokens[-2])
    found = check(source, encoder, images=False, progress=False, unknown_id=word)
    assert found.unknown == (tokens == word).mean()
    assert f"{found.unknown:.1%} of the tokens stand for words that this tokenizer does not know" in str(found)
    assert "does not know" not in str(check(source, encoder, images=False, progress=False, unknown_id=-1))


def test_records_on_one_line_are_told_apart(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([record(), record()]))
    source = LlavaJson(tmp_path / "x.json")
    assert [source.origin(i).split("/")[-1] for i in range(2)] == ["x.json:1 (record 0)", "x.json:1 (record 1)"]
