import base64
import functools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvlm_jax.data.documents import Mmc4, Obelics
from lvlm_jax.data.sources import Source
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import DataError, encode
from lvlm_jax.processing.schema import Image, Text

from .conftest import Q, png

PNG = png()


def segments(example):
    (turn,) = example.turns
    assert turn.role == "assistant"
    return [s.text if isinstance(s, Text) else s for s in turn.segments]


def obelics(path, images, texts):
    pq.write_table(pa.table({"images": images, "texts": texts}), path)
    return path


def test_obelics_runs_two_lists_in_parallel(tmp_path):
    path = obelics(tmp_path / "a.parquet", [[None, "b.png", None, "c.png"]], [["Red.", None, "Blue.", None]])
    source = Obelics(path)
    assert isinstance(source, Source)
    b, c = Image(str(tmp_path / "b.png")), Image(str(tmp_path / "c.png"))
    assert segments(source[0]) == ["Red.", b, "Blue.", c]
    assert segments(Obelics(path, max_pictures=1)[0]) == ["Red.", b, "Blue."]
    assert source[0].origin == f"{path}: row 0"
    held = obelics(tmp_path / "b.parquet", [[{"bytes": PNG, "path": "x"}, None]], [[None, "Text."]])
    assert segments(Obelics(held)[0]) == [Image(PNG), "Text."]


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (["a.png"], ["both"], "row 0: place 0 holds a picture and a text; each place holds exactly one"),
        ([None, "a.png"], [None, None], "row 0: place 0 holds neither a picture nor a text"),
        (["a.png"], [None, "x"], "row 0: 1 'images' but 2 'texts'"),
        (["a.png"], [None], "row 0: a document without text, so nothing to learn from"),
        (["https://x.org/a.png", None], [None, "t"], r"row 0: 'images\[0\]' is .*nothing is fetched from the network"),
    ],
)
def test_a_bad_document(tmp_path, images, texts, message):
    columns = pa.array([images], pa.list_(pa.string())), pa.array([texts], pa.list_(pa.string()))
    with pytest.raises(DataError, match=message):
        Obelics(obelics(tmp_path / "a.parquet", *columns))[0]


def test_a_table_that_holds_no_documents(tmp_path):
    pq.write_table(pa.table({"images": [["a"]], "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'texts'; a table of documents has 'images' and 'texts', this one"):
        Obelics(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'texts' has type .*, but 'texts' must be a list of texts"):
        Obelics(obelics(tmp_path / "b.parquet", [["a"]], [[{"user": "q"}]]))


def mmc4(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_mmc4_puts_a_picture_before_its_sentence(tmp_path):
    info = [
        {"image_name": "a.png", "matched_text_index": 1, "matched_sim": 0.31},
        {"image_name": "b.png", "matched_text_index": 0, "matched_sim": 0.2},
        {"image_name": "c.png", "matched_text_index": 1, "matched_sim": 0.25},
    ]
    record = {"text_list": ["One.", "Two.", "Three."], "image_info": info}
    source = Mmc4(
        mmc4(tmp_path / "a.jsonl", record, {"text_list": ["Words."], "image_info": []}), images=tmp_path / "p"
    )
    a, b, c = (Image(str(tmp_path / "p" / f"{name}.png")) for name in "abc")
    assert segments(source[0]) == ["One. ", a, c, "Two. ", "Three."]
    assert segments(source[1]) == ["Words."]
    assert source.origin(1) == f"{tmp_path}/a.jsonl:2"
    everything = Mmc4(tmp_path / "a.jsonl", images=tmp_path / "p", min_similarity=0.0, max_pictures=2)
    assert segments(everything[0]) == [b, "One. ", a]
    assert repr(everything) != repr(source)


def test_mmc4_by_its_matrix_and_with_pictures_inside(tmp_path):
    info = [{"image_base64": base64.b64encode(PNG).decode()}]
    record = {"text_list": ["One.", "Two."], "image_info": info, "similarity_matrix": [[0.1, 0.4]]}
    assert segments(Mmc4(mmc4(tmp_path / "a.jsonl", record))[0]) == ["One. ", Image(PNG), "Two."]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_list": "x"}, "a.jsonl:1: 'text_list' must be a list of sentences, this is text"),
        (
            {"image_info": [{"image_name": "a.png"}]},
            r"image_info\[0\]: no 'matched_text_index' with 'matched_sim', and no",
        ),
        (
            {"image_info": [{"image_name": "a", "matched_text_index": 9, "matched_sim": 1.0}]},
            r"image_info\[0\]: matches sentence 9, but there are 2",
        ),
        (
            {"image_info": [{"image_base64": "?", "matched_text_index": 0, "matched_sim": 1.0}]},
            r"image_info\[0\]: 'image_base64' does not decode",
        ),
        (
            {"image_info": [{"image_name": "../a", "matched_text_index": 0, "matched_sim": 1.0}]},
            "'image_name' is '../a', which leaves the picture folder",
        ),
    ],
)
def test_a_bad_mmc4_record(tmp_path, change, message):
    record = {"text_list": ["One.", "Two."], "image_info": []} | change
    with pytest.raises(DataError, match=message):
        Mmc4(mmc4(tmp_path / "a.jsonl", record))[0]


def test_all_text_of_a_document_is_learnt(tmp_path, tokenizer):
    path = obelics(tmp_path / "a.parquet", [[None, PNG, None]], [["red circle", None, "blue"]])
    image = tokenizer.special_id("<image>")
    reading = functools.partial(
        encode, template=TEMPLATES["document"], tokenizer=tokenizer, visual_tokens=Q, image_token_id=image
    )
    encoded = reading(Obelics(path)[0])
    text = encoded.visual < 0
    assert encoded.weights[text].tolist() == [0, *[1] * (text.sum() - 1)]  # the first token has none before it
    assert not encoded.weights[~text].any()
    assert text.sum() == 5  # <s> red circle blue </s>
