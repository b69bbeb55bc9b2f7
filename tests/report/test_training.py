"""The training report: sound HTML, nothing from outside, nothing unescaped, failures first."""

import base64
import html.parser
import io
import re

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.report import training

VOID = {"meta", "img", "br", "hr", "input", "link", "wbr"}
EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;"


class Reader(html.parser.HTMLParser):
    """Collects tags and text, and insists that every element is closed in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def picture(value: int) -> np.ndarray:
    return np.full((4, 4, 3), value, np.uint8)


def arguments(evil: str = "") -> dict:
    rows = [{"step": step, "loss": 2.0 / (step + 1), "lr": 1e-3, "note": evil} for step in range(20)]
    samples = [
        {"image": picture(i), "question": f"q{i}? {evil}", "answer": f"a{i} {evil}", "prediction": f"p{i} {evil}"}
        | {"correct": i % 3 != 2}
        for i in range(9)
    ]
    return {
        "title": f"quickstart {evil}",
        "recipe_text": f"seed = 0 {evil}",
        "stages": [
            {"name": f"align {evil}", "trained_params": 50, "total_params": 1000, "rows": rows},
            {"name": "instruct", "trained_params": 1000, "total_params": 1000, "rows": []},
        ],
        "evaluations": [
            {"when": f"before align {evil}", "scores": {"exact_match": 0.125}, "floor": 0.67, "count": 9673},
            {
                "when": "after instruct",
                "scores": {"exact_match": 0.9927, f"loss {evil}": 0.5},
                "floor": 0.67,
                "count": 9673,
            },
        ],
        "samples": samples,
    }


def test_the_page_parses_and_says_what_it_is(tmp_path):
    path = tmp_path / "deep" / "report.html"
    training.write(path, **arguments())
    text = path.read_text()
    reader = Reader(text)
    assert text.startswith("<!DOCTYPE html>")
    assert [name.name for name in path.parent.iterdir()] == ["report.html"]
    words = " ".join(" ".join(reader.words).split())
    for expected in ("99.27 %", "12.50 %", "67.00 %", "9,673", "50 of 1,000 weights trained (5 %)", "seed = 0"):
        assert expected in words
    assert "Loss 2 → 0.1 at step 19." in words
    assert "step 19: loss 0.1, lr 0.001" in words
    assert sum(tag == "polyline" for tag, _ in reader.tags) == 1
    assert "Nothing to draw." in words  # the stage that logged nothing


def test_an_unwritable_report_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    bad = arguments() | {"samples": [{"image": 3, "question": "", "answer": "", "prediction": "", "correct": True}]}
    with pytest.raises(TypeError):
        training.write(path, **bad)
    assert path.read_text() == "old"


def test_nothing_comes_from_outside():
    text = training.render(**arguments())
    assert not re.search(r"(?i)https?:|//[a-z]|url\(|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    for tag, attributes in Reader(text).tags:
        assert tag not in {"script", "link", "iframe", "object", "use"}
        assert attributes.get("src", "data:").startswith("data:")
        assert "href" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "default-src &#x27;none&#x27;" in text


def test_everything_a_user_wrote_is_escaped():
    plain, evil = Reader(training.render(**arguments())), Reader(training.render(**arguments(EVIL)))
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in training_with_a_column(plain)]
    assert "".join(evil.words).count(EVIL) >= 4 + 3 * 9  # it is all there, as text
    assert not any(name.startswith("on") for _, attributes in evil.tags for name in attributes)


def training_with_a_column(reader: Reader) -> list:
    """The tags that the page should have: the evil text adds words, hence spans, to one heading and nothing else."""
    extra = [("span", {})] * (len(f"loss {EVIL}".split()) - 1)
    at = max(i for i, (tag, attributes) in enumerate(reader.tags) if attributes.get("class") == "keep")
    return reader.tags[: at + 1] + extra + reader.tags[at + 1 :]


def test_failures_come_first_and_keep_their_order():
    text = training.render(**arguments())
    assert re.findall(r'class="question">(q\d)', text) == ["q2", "q5", "q8", "q0", "q1", "q3", "q4", "q6", "q7"]
    assert re.findall(r"[✓✗] (\w+)", text) == ["Wrong"] * 3 + ["Correct"] * 6
    assert "3 of 9 answers here are wrong" in text


def test_only_so_many_cards_are_shown():
    text = training.render(**arguments(), shown=4)
    assert re.findall(r'class="question">(q\d)', text) == ["q2", "q5", "q8", "q0"]
    assert "The first 4 are shown." in text


def test_every_picture_and_chart_has_a_text_alternative():
    reader = Reader(training.render(**arguments()))
    for tag, attributes in reader.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    assert ("html", {"lang": "en"}) in reader.tags
    assert {"col", "row"} <= {attributes.get("scope") for tag, attributes in reader.tags if tag == "th"}


def test_light_dark_and_narrow_screens_are_provided_for():
    text = training.render(**arguments())
    assert "prefers-color-scheme: dark" in text
    assert 'content="width=device-width, initial-scale=1"' in text


def test_scores_that_are_no_fractions_stay_numbers():
    text = training.render("t", "", [], [{"when": "end", "scores": {"CIDEr-D": 0.9, "BLEU-4": 0.3}, "count": 2}], [])
    words = Reader(text).words
    assert "0.9" in words
    assert "30.00 %" in words
    assert "Floor" not in words


def test_an_empty_run_is_still_a_page():
    Reader(training.render("nothing", "", [], [], []))


def test_boxes_of_both_answers_are_drawn_over_the_picture():
    white = np.full((200, 200, 3), 255, np.uint8)
    sample = {"image": white, "question": "where?", "correct": False}
    sample |= {
        "answer": "<loc0000><loc0000><loc0511><loc0511> cat",
        "prediction": "<loc0511><loc0511><loc1023><loc1023>",
    }
    text = training.render(**arguments() | {"samples": [sample]})
    assert "Boxes of the answer are green, the model's are red." in text
    source = next(a for tag, a in Reader(text).tags if tag == "img")
    assert source["alt"] == "Picture to the question below, boxes of the answer drawn, boxes of the prediction drawn"
    drawn = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(source["src"].partition(",")[2]))))
    assert drawn[50, 0].tolist() == [0x1C, 0x6B, 0x3C]
    assert drawn[150, 199].tolist() == [0xD2, 0x45, 0x2F]
    assert drawn[150, 50].tolist() == [255, 255, 255]
    plain = training.render(**arguments())
    assert "Boxes of the answer" not in plain
