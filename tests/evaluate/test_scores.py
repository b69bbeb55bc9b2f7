"""The registry of scoring rules, and the question-only floor on the real easy-VQA questions."""

import importlib.util
import json
from pathlib import Path

import pytest

from lvlm_jax.evaluate import scores


def test_exact_takes_strings_lists_and_records():
    scored = scores.score("exact", ["Red ", "two", "no"], ["red", ["2", "two"], {"answers": "yes"}])
    assert scored.values == {"exact_match": 2 / 3, "exact_match[yes/no]": 0.0, "exact_match[other]": 1.0}
    assert scores.score("exact", ["red"], ["red"]).values == {"exact_match": 1.0}
    assert scored.samples == [{"exact_match": 1.0}, {"exact_match": 1.0}, {"exact_match": 0.0}]
    assert "casefold" in scored.variant


def test_vqa_reports_each_answer_type():
    records = [
        {"answers": ["yes"] * 10, "answer_type": "yes/no"},
        {"answers": ["yes"] * 10, "answer_type": "yes/no"},
        {"answers": ["2"] * 3 + ["3"] * 7, "answer_type": "number"},
    ]
    scored = scores.score("vqa", ["yes", "no", "two"], records)
    assert scored.values == pytest.approx(
        {"vqa_accuracy": 1.9 / 3, "vqa_accuracy[answer_type=number]": 0.9, "vqa_accuracy[answer_type=yes/no]": 0.5}
    )
    assert [sample["vqa_accuracy"] for sample in scored.samples] == pytest.approx([1.0, 0.0, 0.9])
    assert "official" in scored.variant


def test_caption_scores_are_named():
    scored = scores.score("caption", ["A red bus.", "two dogs"], [["a red bus"], "a cat"])
    assert list(scored.values) == ["CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
    assert scored.samples[0]["ROUGE-L"] == 1.0
    assert scored.samples[1]["ROUGE-L"] == 0.0
    assert scored.values["ROUGE-L"] == 0.5
    assert list(scored.samples[0]) == list(scored.values)


def test_bad_calls_name_the_mistake():
    with pytest.raises(ValueError, match="unknown score 'cider'; choose from caption, detection, exact, refcoco, vqa"):
        scores.score("cider", ["a"], ["a"])
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        scores.score("exact", ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 predictions"):
        scores.score("exact", [], [])
    with pytest.raises(ValueError, match=r"needs the field 'answers'; it has \['answer'\]"):
        scores.score("exact", ["a"], [{"answer": "a"}])


def test_floor_by_hand():
    train = [("q", "yes"), ("q", "no"), ("q", "no"), ("r", "red"), ("r", "red"), ("r", "red")]
    test = [("q", "no"), ("q", "yes"), ("unseen", "red"), ("unseen", "no")]
    assert scores.question_only_floor(train, test) == 0.5
    assert scores.question_only_floor([("q", "b"), ("q", "a")], [("q", "b")]) == 1.0  # a tie: the first wins
    with pytest.raises(ValueError, match="one of the two is empty"):
        scores.question_only_floor(train, [])


def test_floor_of_easy_vqa_is_67_percent():
    root = Path(importlib.util.find_spec("easy_vqa").origin).parent / "data"
    train, test = (
        [(question, answer) for question, answer, _ in json.loads((root / split / "questions.json").read_text())]
        for split in ("train", "test")
    )
    assert len(test) == 9673
    assert scores.question_only_floor(train, test) == 6481 / 9673
