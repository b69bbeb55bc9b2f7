"""Scoring of captions: CIDEr-D, BLEU-1..4 and ROUGE-L, equal to the COCO caption evaluation's numbers.

Definitions: Vedantam et al. 2015 (CIDEr-D), Papineni et al. 2002 (BLEU), Lin 2004 (ROUGE-L), with the constants of the
COCO evaluation server. Captions are tokenised by ``ptb_tokenize``; ``tokenize=str.split`` scores text as it stands.
METEOR and SPICE need Java and are not here.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

CAPTION_VARIANT = "COCO caption evaluation (CIDEr-D, BLEU corpus level with closest length, ROUGE-L beta 1.2; PTB-like)"

ORDERS = 4  # n-grams of one to four tokens
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2
BLEU_TINY, BLEU_SMALL = 1e-15, 1e-9  # the COCO code's guards against 0/0, part of its numbers from the tenth digit on

Tokenize = Callable[[str], list[str]]

QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": " -- ", "\u2014": " -- "})
# First match wins: addresses, abbreviations that keep their period, numbers, words with inner marks, runs of marks.
TOKEN = re.compile(
    r"""
      https?://\S+ | www\.\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | </?[A-Za-z][^<>]*>
    | (?<![\w])(?:[A-Za-z]\.){2,}
    | \b(?:Mr|Mrs|Ms|Dr|St|vs|Jr|Sr|Inc|Co|Corp|Ltd|Prof|etc|mr|mrs|ms|dr|st)\.
    | \b[Nn]o\.(?=\s*\d) | \b[A-Z]\.(?=\s+[A-Z])
    | '\d\ds\b
    | (?<![\w.])[+-]?(?:\d+(?:[.,:/-]\d+)*|\.\d+)(?![\w'])
    | \w+(?:(?:[-/.&'@]|,(?<=\d,)(?=\d))\w+)*
    | '[tT](?:is|was)\b | '(?:s|m|d|re|ve|ll)\b
    | [!?]+ | \.\.\. | --+ | .
    """,
    re.VERBOSE,
)
CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))$")
SPLIT_WORDS = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me", "gimme": "gim me",
    "'tis": "'t is", "'twas": "'t was", "y'all": "y' all",
}  # fmt: skip
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
DROPPED = frozenset(["'", '"', "`", ".", "?", "!", ",", ":", ";", "-", "--", "..."])


def ptb_tokenize(text: str) -> list[str]:
    """Lower-case tokens by Penn Treebank rules, sentence punctuation removed, as COCO captions are scored.

    Follows the Java tokenizer that the COCO evaluation calls on ordinary captions: clitics part (``is n't``,
    ``dog 's``), hyphens and slashes inside a word stay, brackets become ``-lrb-`` (which the COCO code fails to
    remove, since it looks for capitals), ``?!`` stays. It differs on smileys, ``rock'n'roll``, ``C++`` and ``no.1``.
    """
    tokens: list[str] = []
    for match in TOKEN.finditer(" ".join(text.translate(QUOTES).replace("\u2026", " ... ").split())):
        token = match.group().lower()
        if token.isspace() or token in DROPPED or re.fullmatch("--+", token):
            continue
        tokens.extend(_parts(BRACKETS.get(token, token)))
    return tokens


def _parts(token: str) -> list[str]:
    """A word and its clitics: shouldn't've -> should n't 've."""
    if token in SPLIT_WORDS:
        return SPLIT_WORDS[token].split()
    clitics: list[str] = []
    while match := CLITIC.search(token):
        clitics.insert(0, match.group())
        token = token[: match.start()]
    return [token, *clitics]


def _tokenized(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenize
) -> list[tuple[list[str], list[list[str]]]]:
    """(candidate tokens, tokens of each reference) of every picture, checked."""
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} reference lists; give one each, at least one"
        )
    pairs = []
    for place, (prediction, captions) in enumerate(zip(predictions, references)):
        if isinstance(captions, str) or not captions:
            raise ValueError(f"references[{place}] is {captions!r}; give a list with at least one caption")
        pairs.append((tokenize(prediction), [tokenize(caption) for caption in captions]))
    return pairs


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Counts of all n-grams of one to four tokens."""
    return Counter(
        tuple(tokens[i : i + order]) for order in range(1, ORDERS + 1) for i in range(len(tokens) - order + 1)
    )


def _tf_idf(
    counts: Counter[tuple[str, ...]], idf: Callable[[tuple[str, ...]], float]
) -> tuple[list[dict[tuple[str, ...], float]], list[float]]:
    """Vectors of each order, and their lengths."""
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
    for gram, count in counts.items():
        vectors[len(gram) - 1][gram] = count * idf(gram)
    return vectors, [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]


def cider_d(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: Tokenize = ptb_tokenize
) -> tuple[float, list[float]]:
    """CIDEr-D, 0 to 10: (corpus mean, one value a picture).

    Document frequencies come from the references given, over pictures, so a value depends on the whole set: one
    picture alone scores 0. The length penalty compares numbers of bigrams, as the COCO code does.
    """
    pairs = [
        (_ngrams(candidate), [_ngrams(caption) for caption in captions])
        for candidate, captions in _tokenized(predictions, references, tokenize)
    ]
    seen_in = Counter(gram for _, captions in pairs for gram in set().union(*captions))
    log_pictures = math.log(len(pairs))

    def idf(gram: tuple[str, ...]) -> float:
        return log_pictures - math.log(max(1, seen_in[gram]))

    scores = []
    for candidate, captions in pairs:
        vectors, norms = _tf_idf(candidate, idf)
        bigrams = sum(count for gram, count in candidate.items() if len(gram) == 2)
        total = 0.0
        for caption in captions:
            others, other_norms = _tf_idf(caption, idf)
            gap = bigrams - sum(count for gram, count in caption.items() if len(gram) == 2)
            penalty = math.exp(-(gap**2) / (2 * CIDER_SIGMA**2))
            for vector, norm, other, other_norm in zip(vectors, norms, others, other_norms):
                dot = sum(min(value, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, value in vector.items())
                total += penalty * (dot / (norm * other_norm) if norm and other_norm else 0.0)
        scores.append(10.0 * total / ORDERS / len(captions))
    return float(np.mean(scores)), scores


def _bleu_from(correct: Sequence[int], guessed: Sequence[int], length: int, reference_length: int) -> list[float]:
    """BLEU-1..4 from clipped matches, candidate n-grams of each order, and the two lengths."""
    ratio = (length + BLEU_TINY) / (reference_length + BLEU_SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for order in range(ORDERS):
        product *= (correct[order] + BLEU_TINY) / (guessed[order] + BLEU_SMALL)
        scores.append(product ** (1 / (order + 1)) * brevity)
    return scores


def bleu(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: Tokenize = ptb_tokenize
) -> tuple[list[float], list[list[float]]]:
    """BLEU-1..4, 0 to 1: (corpus level, one list of four a picture).

    The corpus figure adds up matches and lengths first; it is not the mean of the pictures' figures. The reference
    length is the one closest to the candidate's, the shorter at a tie.
    """
    totals, samples = np.zeros(2 * ORDERS + 2, np.int64), []
    for candidate, captions in _tokenized(predictions, references, tokenize):
        most: Counter[tuple[str, ...]] = Counter()
        for caption in captions:
            most |= _ngrams(caption)
        clipped = _ngrams(candidate) & most
        correct = [sum(count for gram, count in clipped.items() if len(gram) == order + 1) for order in range(ORDERS)]
        guessed = [max(0, len(candidate) - order) for order in range(ORDERS)]
        closest = min((abs(len(caption) - len(candidate)), len(caption)) for caption in captions)[1]
        samples.append(_bleu_from(correct, guessed, len(candidate), closest))
        totals += np.array([*correct, *guessed, len(candidate), closest])
    sums = totals.tolist()
    return _bleu_from(sums[:ORDERS], sums[ORDERS : 2 * ORDERS], sums[-2], sums[-1]), samples


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    best = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for i, other in enumerate(right, start=1):
            diagonal, best[i] = best[i], diagonal + 1 if word == other else max(best[i], best[i - 1])
    return best[-1]


def rouge_l(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: Tokenize = ptb_tokenize
) -> tuple[float, list[float]]:
    """ROUGE-L, 0 to 1: (corpus mean, one value a picture).

    Precision and recall are each the best over the references (perhaps of two different ones), as in the COCO code.
    """
    scores = []
    for candidate, captions in _tokenized(predictions, references, tokenize):
        common = [_longest_common_subsequence(candidate, caption) for caption in captions]
        precision = max(common) / max(1, len(candidate))
        recall = max(match / max(1, len(caption)) for match, caption in zip(common, captions))
        weight = ROUGE_BETA**2
        scores.append((1 + weight) * precision * recall / (recall + weight * precision) if max(common) else 0.0)
    return float(np.mean(scores)), scores
