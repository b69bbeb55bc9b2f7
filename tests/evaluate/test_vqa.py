"""Hand-worked cases of the VQA rules, one for every quirk of the official evaluator."""

import hashlib
import json

import pytest

from lvlm_jax.evaluate import vqa


def humans(*counted: tuple[str, int]) -> list[dict]:
    """Answer records as the data set has them, with their ids."""
    answers = [answer for answer, count in counted for _ in range(count)]
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers, start=1)]


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        (" Red\n", "red", True),
        ("red", ["blue", "RED "], True),
        ("red.", "red", False),
        ("a red", "red", False),
        ("", "red", False),
        ("STRASSE", "straße", True),
    ],
)
def test_exact_match_sets_aside_case_and_surrounding_space_only(prediction, answers, expected):
    assert vqa.exact_match(prediction, answers) is expected


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Two\tbig\nDogs ", "2 big dogs"),
        ("red/blue", "red blue"),  # no space beside the mark: a space takes its place
        ("red /blue", "red blue"),
        ("red- blue x-ray", "red blue xray"),  # one mark beside a space deletes it everywhere
        ("no-one_else", "no 1 else"),
        ("red;-blue-green", "red blue green"),  # beside a space in the text as given, not as cleaned so far
        ("1,000 red/blue", "1000 redblue"),  # digit-comma-digit anywhere deletes every mark
        ("1,a/b", "1 b"),  # a comma that is not between digits becomes a space; then the article goes
        ("yes, it is!", "yes it is"),
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),  # a period in front of a digit stays
        ("a.5", "a.5"),  # also without a digit before it: the look-behind never works
        ("5.", "5"),
        ("5.a", "5a"),
        ("v1. 2", "v1 2"),
        (". " * 32 + "x.y.", "x.y."),  # only the first 32 periods go
        (". " * 31 + "x.y.", "xy."),
        ("None of ZERO", "0 of 0"),
        ("ten nine eleven", "10 9 eleven"),
        ("a cat on an apple the end", "cat on apple end"),
        ("dont", "don't"),
        ("Im id've IVE", "im id've ive"),  # capitals of the table never meet lower-cased text
        ("shouldntve shouldnt've shouldn'tve", "shouldntve shouldn't've shouldn't've"),
        ("somebody'd", "somebodyd"),  # the table's own slip
        ("y'alld've", "y'all'd've"),
        ("let's", "let's"),
        ("'hello'", "'hello'"),  # apostrophes, colons and percent signs are no marks
        ("5:30 50%", "5:30 50%"),
        ("\u0665.\u0665", "\u0665\u0665"),  # other scripts' digits are none, as for the original's Python 2
    ],
)
def test_normal_form(text, normal):
    assert vqa.vqa_normalise(text) == normal


def test_contractions_are_the_official_table():
    reachable = sorted((wrong, right) for wrong, right in vqa.CONTRACTIONS.items() if wrong == wrong.lower())
    digest = hashlib.sha256(json.dumps(reachable).encode()).hexdigest()
    # From the official file, its entries that can change lower-cased text.
    assert len(reachable) == 114
    assert digest == "853d25c89947b7f6d41f6c5f81b2d6c3119927f4b16f557fc1b03af6ef45605e"


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("yes", humans(("yes", 10)), 1.0),
        ("Yes", humans(("yes", 10)), 0.0),  # all agree: raw comparison
        ("yes.", humans(("yes", 10)), 0.0),
        (" yes\n", humans(("yes", 10)), 1.0),  # the line clean-up always happens
        ("Yes.", humans(("yes", 9), ("no", 1)), 1.0),  # they differ: normalised
        ("yes", humans(("yes", 9), ("Yes", 1)), 1.0),
        ("2", humans(("two", 5), ("Two.", 5)), 1.0),
        ("TWO", humans(("two", 10)), 0.0),
        ("yes", humans(("yes ", 5), ("yes\t", 5)), 1.0),  # identical once on one line, hence raw
        ("YES", humans(("yes ", 5), ("yes\t", 5)), 0.0),
        ("red", humans(("red", 1), ("blue", 9)), 9 / 10 * 1 / 3),
        ("red", humans(("red", 2), ("blue", 8)), (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("red", humans(("red", 3), ("blue", 7)), (3 * 2 / 3 + 7) / 10),
        ("red", humans(("red", 4), ("blue", 6)), 1.0),
        ("green", humans(("red", 4), ("blue", 6)), 0.0),
        ("the red", humans(("red", 4), ("blue", 6)), 1.0),
        ("dont", humans(("don't", 4), ("do not", 6)), 1.0),
    ],
)
def test_accuracy(prediction, answers, expected):
    assert vqa.vqa_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-12)
    strings = [record["answer"] for record in answers]
    assert vqa.vqa_accuracy(prediction, strings) == pytest.approx(expected, abs=1e-12)


def test_records_without_an_id_drop_their_twins():
    answers = [{"answer": "red"}] * 5 + [{"answer": "blue"}] * 5
    # Leaving out a "red" leaves no "red" at all; leaving out a "blue" leaves five.
    assert vqa.vqa_accuracy("red", answers) == pytest.approx(0.5)
    assert vqa.vqa_accuracy("red", [record["answer"] for record in answers]) == 1.0


def test_records_are_compared_after_normalisation():
    answers = [{"answer": "red"}, {"answer": "Red"}, {"answer": "RED."}, {"answer": "blue"}]
    assert vqa.vqa_accuracy("red", answers) == pytest.approx(1 / 4)  # the reds became twins; only "blue" leaves three


def test_the_answers_given_are_not_changed():
    answers = humans(("The Red.", 5), ("blue", 5))
    vqa.vqa_accuracy("red", answers)
    assert answers == humans(("The Red.", 5), ("blue", 5))


def test_one_answer_is_an_error():
    with pytest.raises(ValueError, match=r"1 answer\(s\) always score 0.*'exact'"):
        vqa.vqa_accuracy("yes", ["yes"])


def test_a_record_without_answer_is_an_error():
    with pytest.raises(ValueError, match=r"answer 1 is .*give a string or a record"):
        vqa.vqa_accuracy("yes", ["yes", {"text": "yes"}])


def test_report_groups_and_rounds():
    questions = [
        {"answer_type": "yes/no", "question_type": "is the"},
        {"answer_type": "yes/no", "question_type": "is there"},
        {"answer_type": "number", "question_type": "how many"},
    ]
    assert vqa.vqa_report([1.0, 0.0, 1 / 3], questions) == {
        "overall": 44.44,
        "perAnswerType": {"number": 33.33, "yes/no": 50.0},
        "perQuestionType": {"how many": 33.33, "is the": 100.0, "is there": 0.0},
    }
    assert vqa.vqa_report([1.0, 0.0], [{"answer_type": "other"}, {}]) == {"overall": 50.0}
    with pytest.raises(ValueError, match="1 accuracies for 2 questions"):
        vqa.vqa_report([1.0], [{}, {}])
