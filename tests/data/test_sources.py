import base64
import io
import json
import pickle

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.data.sources import LlavaJson, Messages, Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Image, Text


def png(colour=(200, 30, 30), size=(8, 8)):
    out = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def llava(image="a.png", question="<image>\nWhat is it?", answer="A square.", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    record = {"id": "7", "image": image, "conversations": turns, **more}
    return {key: value for key, value in record.items() if value is not None}


def write_list(path, records):
    path.write_text("[\n" + ",\n".join(json.dumps(r, indent=1, ensure_ascii=False) for r in records) + "\n]\n", "utf-8")
    return path


def write_lines(path, records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def segments(example):
    return [[s.text if isinstance(s, Text) else s for s in turn.segments] for turn in example.turns]


def test_list_and_lines_give_the_same_examples_with_the_line_of_each(tmp_path):
    records = [llava(), llava(image=None, question="Grüß Gott, 你好?", answer="ja"), llava(image=["b.png"])]
    whole = LlavaJson(write_list(tmp_path / "a.json", records))
    lines = LlavaJson(write_lines(tmp_path / "a.jsonl", records))
    assert isinstance(whole, Source)
    assert len(whole) == len(lines) == 3
    assert [e.turns for e in (whole[i] for i in range(3))] == [e.turns for e in (lines[i] for i in range(3))]
    assert [lines[i].origin for i in range(3)] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 2, 3)]
    text = (tmp_path / "a.json").read_text("utf-8").splitlines()
    for i in range(3):
        line = int(whole[i].origin.rsplit(":", 1)[1])
        assert text[line - 1].startswith("{")
    assert segments(whole[0]) == [[Image(str(tmp_path / "a.png")), "What is it?"], ["A square."]]
    assert segments(whole[1])[0] == ["Grüß Gott, 你好?"]
    assert [t.role for t in whole[0].turns] == ["user", "assistant"]


def test_blank_lines_bom_windows_breaks_and_missing_last_break(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(llava()).encode() + b"\r\n\r\n" + json.dumps(llava(id="9")).encode())
    source = LlavaJson(path)
    assert [source[i].origin[-2:] for i in range(2)] == [":1", ":3"]
    assert source[-1].id == "9"
    with pytest.raises(IndexError, match="record 2 of 2"):
        source[2]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([llava(id="é"), llava(id="z")], ensure_ascii=False).encode())
    assert [LlavaJson(path)[i].id for i in range(2)] == ["é", "z"]


def test_repr_names_the_content_and_the_source_is_small_to_send(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [llava()] * 100)
    first = LlavaJson(path, images="pictures")
    assert repr(first) == repr(LlavaJson(path, images="pictures")) == repr(pickle.loads(pickle.dumps(first)))
    assert "records=100" in repr(first)
    assert "pictures" in repr(first)
    write_lines(path, [llava(answer="A squirl.")] * 100)  # same size, other content
    assert repr(LlavaJson(path, images="pictures")) != repr(first)
    assert len(pickle.dumps(first)) < 5000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("<image>\nQ", ["I", "Q"]),
        ("Q\n<image>", ["I", "Q"]),  # one mark: the picture goes first, as the authors' code does
        ("<image>", ["I"]),
        ("A <image> B\n<image>\nC", ["A ", "I", " B", "I", "C"]),
    ],
)
def test_where_the_pictures_of_a_turn_stand(tmp_path, value, expected):
    count = value.count("<image>")
    images = [f"{i}.png" for i in range(count)]
    source = LlavaJson(write_lines(tmp_path / "a.jsonl", [llava(images, value)]), images="root")
    found = segments(source[0])[0]
    assert ["I" if isinstance(s, Image) else s for s in found] == expected
    assert [s.source for s in found if isinstance(s, Image)] == [f"root/{name}" for name in images]


NO_TURNS = "'conversations' must be a list with at least one turn"
BAD_LLAVA = {
    "more pictures than marks": (
        llava(["a.png", "b.png"]),
        "1 x <image> in 'conversations' but 2 picture(s)",
    ),
    "fewer pictures than marks": (
        llava(["a.png"], "<image><image>Q"),
        "2 x <image> in 'conversations' but 1",
    ),
    "picture without a mark": (
        llava("a.png", "What?"),
        "but 1 picture(s) in 'image'; add <image>",
    ),
    "mark without a picture": (
        llava(None),
        "but 0 picture(s) in 'image'; name the missing",
    ),
    "image is a number": (llava(3), "'image' must hold a path or a data: URL, this is a number"),
    "image is empty": (llava(""), "'image' must hold a path or a data: URL, this is empty text"),
    "image list of objects": (llava([{"path": "a"}]), "'image' must hold a path or a data: URL, this is an object"),
    "path traversal": (llava("../../etc/passwd"), "'image' is '../../etc/passwd', which leaves the picture folder"),
    "absolute path": (llava("/etc/passwd"), "'image' is '/etc/passwd', which leaves the picture folder"),
    "backslashes": (llava("..\\secret.png"), "which leaves the picture folder"),
    "drive letter": (llava("C:\\secret.png"), "which leaves the picture folder"),
    "address": (llava("http://169.254.169.254/x.png"), "nothing is fetched from the network while training; download"),
    "file address": (llava("file:///etc/passwd"), "nothing is fetched from the network"),
    "no conversations": ({"id": "1", "messages": []}, "no field 'conversations'; this record has ['id', 'messages']"),
    "empty conversations": ({"conversations": []}, NO_TURNS),
    "conversations is text": ({"conversations": "hello"}, NO_TURNS),
    "unknown speaker": (
        {"conversations": [{"from": "bot", "value": "x"}]},
        "[0]: 'from' is 'bot'; valid:",
    ),
    "value is null": ({"conversations": [{"from": "gpt", "value": None}]}, "conversations[0]: 'value' must be text"),
    "broken line": ('{"id": "1", "conversations": [', "broken JSON at character"),
    "a list in a line": ("[1, 2]", "a record must be a JSON object {...}, this is a list of 2"),
}


@pytest.mark.parametrize("name", BAD_LLAVA)
def test_a_bad_llava_record_names_file_line_and_fix(tmp_path, name):
    record, message = BAD_LLAVA[name]
    path = write_lines(tmp_path / "a.jsonl", [llava(), record, llava(id="last")])
    source = LlavaJson(path)
    with pytest.raises(DataError) as caught:
        source[1]
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert source[2].id == "last"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1},\n{"id": 2', "a.json:2: broken JSON list"),
        ('[{"id": 1}\n{"id": 2}]', "a.json:2: broken JSON list: expected ',' or ']' after a record"),
        ('[{"id": 1}]\n\n{"id": 2}', "something follows the closing ']'"),
        ("[]", "holds no record"),
        ("\n \n", "holds no record"),
        (b"[\n\xff]", "a.json:2: not UTF-8 text"),
    ],
)
def test_a_broken_file_is_refused_at_once(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        LlavaJson(path)
    assert message in str(caught.value)


def test_a_line_that_is_not_utf8_is_one_bad_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(llava()).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not UTF-8 text"):
        LlavaJson(path)[1]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"none\.json does not exist; give the path of a \.json list or a \.jsonl file"):
        LlavaJson(tmp_path / "none.json")
    with pytest.raises(DataError, match="is a folder"):
        LlavaJson(tmp_path)


def messages(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def test_messages_with_every_kind_of_part(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    parts = [
        {"type": "text", "text": "Look: "},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "text": None},
        {"type": "image", "image": "c/d.png", "text": None},
        {"type": "text", "text": " <image>?"},
    ]
    record = messages(("system", "Be brief."), ("user", parts), ("assistant", "Yes <image></s>"), images=["b.png"])
    example = Messages(write_lines(tmp_path / "m.jsonl", [record]), images=tmp_path / "pics")[0]
    assert [t.role for t in example.turns] == ["system", "user", "assistant"]
    column, inline = Image(str(tmp_path / "pics/b.png")), Image(str(tmp_path / "pics/c/d.png"))
    # What a person typed stays text: only parts are pictures.
    assert segments(example) == [
        ["Be brief."],
        ["Look: ", Image(png()), column, inline, " <image>?"],
        ["Yes <image></s>"],
    ]


ASK, ANSWER = ("user", "Hi"), ("assistant", "Hello")


def asked(part):
    return messages(("user", [part]), ANSWER)


def url(value):
    return asked({"type": "image_url", "image_url": {"url": value}})


BAD_MESSAGES = {
    "pictures without a part": (messages(ASK, ANSWER, images=["a.png"]), "parts in 'messages' but 1 picture(s)"),
    "part without a picture": (asked({"type": "image"}), "but 0 picture(s) in 'images'; name the missing"),
    "unknown role": (messages(("tool", "x"), ANSWER), "messages[0]: 'role' is 'tool'; valid: 'system', 'user'"),
    "unknown part": (asked({"type": "audio"}), "messages[0]: unknown part type 'audio'; valid:"),
    "text part without text": (asked({"type": "text"}), "a text part needs 'text'"),
    "content is a number": (messages(("user", 4), ANSWER), "'content' must be text or a list of parts"),
    "address": (url("https://x.org/a.png"), "nothing is fetched"),
    "data URL that is not base64": (url("data:image/png,xyz"), "is a data: URL without ';base64,'"),
    "broken base64": (url("data:image/png;base64,@@@"), "whose base64 does not decode"),
    "traversal": (asked({"type": "image", "path": "a/../../b.png"}), "leaves the picture folder"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_a_bad_message_record_names_file_line_and_fix(tmp_path, name):
    record, message = BAD_MESSAGES[name]
    path = write_lines(tmp_path / "m.jsonl", ["", record])
    with pytest.raises(DataError) as caught:
        Messages(path)[0]
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_numpy_indices_are_taken(tmp_path):
    source = LlavaJson(write_lines(tmp_path / "a.jsonl", [llava(id="x"), llava(id="y")]))
    assert source[np.int64(1)].id == "y"
