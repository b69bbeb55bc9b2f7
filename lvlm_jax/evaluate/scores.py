"""The scoring rules by name, as ``lvlm eval`` uses them, and the floor that no answer should fall below."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lvlm_jax.evaluate import boxes, caption, vqa


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """What a scoring rule found.

    values:  score name -> value over all samples; fractions in [0, 1], CIDEr-D in [0, 10].
    samples: one dict a prediction, in order, score name -> value of that sample alone.
    variant: the exact definition, to print and to write beside the values.
    """

    values: dict[str, float]
    samples: list[dict[str, float]]
    variant: str


def _answers(reference: Any) -> Sequence[Any]:
    """The answers of a reference: a string, a list, or an annotation record with ``answers``."""
    if isinstance(reference, Mapping):
        if "answers" not in reference:
            raise ValueError(f"a reference record needs the field 'answers'; it has {sorted(reference)}")
        reference = reference["answers"]
    return [reference] if isinstance(reference, str) else reference


def _by_type(hits: Sequence[float], references: Sequence[Any]) -> dict[str, float]:
    """The means of yes/no questions and of the others, where a data set has both: guessing does well on the first."""
    closed = [all(answer.strip().casefold() in ("yes", "no") for answer in _answers(ref)) for ref in references]
    if all(closed) or not any(closed):
        return {}
    parts = {"yes/no": [h for h, c in zip(hits, closed) if c], "other": [h for h, c in zip(hits, closed) if not c]}
    return {f"exact_match[{name}]": sum(part) / len(part) for name, part in parts.items()}


def exact(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """Share of predictions that equal one of their answers (case and surrounding space aside)."""
    hits = [float(vqa.exact_match(prediction, _answers(ref))) for prediction, ref in zip(predictions, references)]
    return Scored(
        values={"exact_match": sum(hits) / len(hits), **_by_type(hits, references)},
        samples=[{"exact_match": hit} for hit in hits],
        variant=vqa.EXACT_VARIANT,
    )


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """Official VQA accuracy, overall and, where every reference record names one, per answer and question type."""
    hits = [vqa.vqa_accuracy(prediction, _answers(ref)) for prediction, ref in zip(predictions, references)]
    values = {"vqa_accuracy": sum(hits) / len(hits)}
    for field in ("answer_type", "question_type"):
        if all(isinstance(reference, Mapping) and field in reference for reference in references):
            means = vqa.group_means(hits, [reference[field] for reference in references])
            values |= {f"vqa_accuracy[{field}={group}]": mean for group, mean in means.items()}
    return Scored(values=values, samples=[{"vqa_accuracy": hit} for hit in hits], variant=vqa.VQA_VARIANT)


def captions(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """CIDEr-D, BLEU-1..4 and ROUGE-L of captions, tokenised by PTB-like rules."""
    lists = [list(_answers(reference)) for reference in references]
    cider, ciders = caption.cider_d(predictions, lists)
    blocks, sample_blocks = caption.bleu(predictions, lists)
    rouge, rouges = caption.rouge_l(predictions, lists)

    def named(cider: float, bleus: Sequence[float], rouge: float) -> dict[str, float]:
        return {"CIDEr-D": cider, **{f"BLEU-{n}": value for n, value in enumerate(bleus, start=1)}, "ROUGE-L": rouge}

    return Scored(
        values=named(cider, blocks, rouge),
        samples=[named(*row) for row in zip(ciders, sample_blocks, rouges)],
        variant=caption.CAPTION_VARIANT,
    )


def refcoco(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """Accuracy of boxes that expressions refer to, their mean IoU, and the share of answers without a box."""
    found = [boxes.refer(prediction, reference) for prediction, reference in zip(predictions, references)]
    samples = [
        {f"accuracy@{least}": float((value or 0.0) >= least) for least in boxes.THRESHOLDS}
        | {"mean_iou": value or 0.0, "without_box": float(value is None)}
        for value in found
    ]
    values = {name: sum(sample[name] for sample in samples) / len(samples) for name in samples[0]}
    return Scored(values=values, samples=samples, variant=boxes.REFER_VARIANT)


def detection(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """Precision, recall and F1 of labelled boxes, and how many were said and were there."""
    pairs = [(boxes.said(text), boxes.expected(reference)) for text, reference in zip(predictions, references)]
    counts = [(boxes.matched(*pair), *map(len, pair)) for pair in pairs]

    def rates(right: int, said: int, there: int) -> dict[str, float]:
        precision, recall, f1 = (
            n / of if of else 0.0 for n, of in ((right, said), (right, there), (2 * right, said + there))
        )
        return {
            "f1@0.5": f1,
            "precision@0.5": precision,
            "recall@0.5": recall,
            "boxes_said": said,
            "boxes_there": there,
        }

    return Scored(
        values=rates(*map(sum, zip(*counts))),
        samples=[rates(*count) for count in counts],
        variant=boxes.DETECT_VARIANT,
    )


def segmentation(predictions: Sequence[str], masks: Sequence[Any], decode: boxes.Decode) -> Scored:
    """Mean and cumulative IoU of masks that texts say in shape codes; the codec's weights come as `decode`.

    Args:
      masks: the true ones, bool[H, W] at each picture's size.
    """
    overlaps = boxes.segment(predictions, masks, decode)
    return Scored(
        values={"mean_iou": boxes.mean_iou(overlaps), "cumulative_iou": boxes.cumulative_iou(overlaps)},
        samples=[{"mean_iou": boxes.mean_iou([pair])} for pair in overlaps],
        variant=boxes.SEGMENT_VARIANT,
    )


SCORES: dict[str, Callable[[Sequence[str], Sequence[Any]], Scored]] = {
    "exact": exact,
    "vqa": vqa_accuracy,
    "caption": captions,
    "refcoco": refcoco,
    "detection": detection,
}


def score(name: str, predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """Apply the scoring rule of that name.

    A reference is a string, a list of strings, or an annotation record with ``answers`` (strings or records); of boxes
    see `evaluate.boxes`.
    Raises ValueError for an unknown name, for no samples, and for unequal numbers of predictions and references.
    """
    if name not in SCORES:
        raise ValueError(f"unknown score {name!r}; choose from {', '.join(sorted(SCORES))}")
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one each, and some")
    return SCORES[name](predictions, references)


def question_only_floor(train_pairs: Iterable[tuple[str, str]], test_pairs: Iterable[tuple[str, str]]) -> float:
    """Exact match of a model that never looks: each question's most frequent training answer.

    Pairs are (question, answer). A question that training has not gets the most frequent answer of all; at a tie the
    answer that came first wins.
    """
    by_question: dict[str, Counter[str]] = {}
    overall: Counter[str] = Counter()
    for question, answer in train_pairs:
        by_question.setdefault(question, Counter())[answer] += 1
        overall[answer] += 1
    tests = list(test_pairs)
    if not overall or not tests:
        raise ValueError("the question-only floor needs training pairs and test pairs; one of the two is empty")
    hits = [
        vqa.exact_match(by_question.get(question, overall).most_common(1)[0][0], answer) for question, answer in tests
    ]
    return sum(hits) / len(hits)
