"""Scoring of short answers: exact match, and VQA accuracy by the rules of the official evaluator.

Every rule here that looks odd is one of the official evaluator's (GT-Vision-Lab/VQA, ``vqaEval.py`` of VQA v2.0), kept
because published numbers contain it. Other tools differ: lmms-eval always normalises, TextVQA's rules cut ``'s`` and
treat commas otherwise. ``EXACT_VARIANT`` and ``VQA_VARIANT`` are the names to print beside a score.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

EXACT_VARIANT = "exact match (strip, casefold; any of the answers)"
VQA_VARIANT = "VQA accuracy (official v2.0 evaluator; leave one out; raw comparison where all answers agree)"

NEEDED = 3  # humans that must have given an answer for it to count in full
DIGITS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
# The original's look-behind "(?!<=\d)" is a slip for "(?<!\d)" and is always true, so that a period stays only in front
# of a digit. Its compiled pattern gets re.UNICODE in the place of the count, so that it stops after 32 periods.
PERIOD = re.compile(r"\.(?!\d)", re.ASCII)
PERIODS_REMOVED = 32
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d", re.ASCII)

CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _misspellings(word: str) -> list[str]:
    """The word with any one of its apostrophes missing."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


# "somebody'd" loses its apostrophe in the official table; "Im", "Ive" and "Id've" never match lower-cased text.
CONTRACTIONS = {wrong: right for right in CONTRACTED.split() for wrong in _misspellings(right)}
CONTRACTIONS["somebody'd"] = "somebodyd"


def exact_match(prediction: str, answers: str | Sequence[str]) -> bool:
    """Whether the prediction is one of the answers, after surrounding space and letter case are set aside.

    Nothing else is forgiven: ``"yes."`` is not ``"yes"``. Casefold rather than lower, so that "STRASSE" is "Straße".
    """
    answers = [answers] if isinstance(answers, str) else answers
    return prediction.strip().casefold() in {answer.strip().casefold() for answer in answers}


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Marks beside a space vanish, others become a space; with a digit-comma-digit anywhere all of them vanish."""
    number = DIGIT_COMMA_DIGIT.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        joined = number or f"{mark} " in text or f" {mark}" in text  # of the text as given, not as cleaned so far
        out = out.replace(mark, "" if joined else " ")
    return PERIOD.sub("", out, count=PERIODS_REMOVED)


def vqa_normalise(text: str) -> str:
    """An answer in the official evaluator's normal form.

    In this order: one line, punctuation, lower case, number words to digits (none to ten), articles dropped, missing
    apostrophes put back. ``"The two-tone dogs, dont!"`` becomes ``"two tone dogs don't"``.
    """
    words = [DIGITS.get(word, word) for word in _without_punctuation(_one_line(text)).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _records(answers: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers as records; a plain string gets its position as id, the data set's own records stay as they are."""
    records = []
    for place, answer in enumerate(answers):
        if isinstance(answer, str):
            records.append({"answer": _one_line(answer), "answer_id": place})
        elif isinstance(answer, Mapping) and isinstance(answer.get("answer"), str):
            records.append({**answer, "answer": _one_line(answer["answer"])})
        else:
            raise ValueError(f"answer {place} is {answer!r}; give a string or a record with the string 'answer'")
    if len(records) < 2:
        raise ValueError(
            f"VQA accuracy leaves one human answer out, so {len(records)} answer(s) always score 0; "
            "the data sets give ten per question. With a single answer per question use the score 'exact'."
        )
    return records


def vqa_accuracy(prediction: str, answers: Sequence[str | Mapping[str, Any]]) -> float:
    """Mean over the leave-one-out sets of min(1, matches / 3): a fraction in [0, 1].

    Both sides are normalised only if the answers are not all identical; where all agree, the comparison is raw and
    ``"Yes"`` does not match ``"yes"``. To leave one out means to drop every record that equals it, as the official code
    does: records with an ``answer_id`` (and plain strings, which are told apart by position) drop one, records
    without any id drop all their twins and score lower.

    Raises ValueError for fewer than two answers, or an answer that is neither a string nor a record with one.
    """
    records = _records(answers)
    prediction = _one_line(prediction)
    if len({record["answer"] for record in records}) > 1:
        records = [{**record, "answer": vqa_normalise(record["answer"])} for record in records]
        prediction = vqa_normalise(prediction)
    total = 0.0
    for left_out in records:
        matches = sum(other["answer"] == prediction for other in records if other != left_out)
        total += min(1.0, matches / NEEDED)
    return total / len(records)


def group_means(accuracies: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """Mean accuracy of each group, groups in alphabetical order."""
    members: dict[str, list[float]] = {}
    for accuracy, group in zip(accuracies, groups, strict=True):
        members.setdefault(group, []).append(accuracy)
    return {group: sum(values) / len(values) for group, values in sorted(members.items())}


def vqa_report(accuracies: Sequence[float], questions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The official summary: percentages with two decimals, overall and per answer and question type.

    ``questions`` are the annotation records; ``answer_type`` and ``question_type`` are read where every record has one.
    """
    if not accuracies or len(accuracies) != len(questions):
        raise ValueError(f"{len(accuracies)} accuracies for {len(questions)} questions; give one each, at least one")
    report: dict[str, Any] = {"overall": round(100 * sum(accuracies) / len(accuracies), 2)}
    for field, heading in (("answer_type", "perAnswerType"), ("question_type", "perQuestionType")):
        if all(field in question for question in questions):
            means = group_means(accuracies, [question[field] for question in questions])
            report[heading] = {group: round(100 * mean, 2) for group, mean in means.items()}
    return report
