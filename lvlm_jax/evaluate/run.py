"""Ask a model every question of a data set, freely (by default greedily), and score what it says.

No list of answers is given to the model. Beside every score stands what it was made of: one line a sample with the
prompt, the template, the decoding settings, and one summary with the versions of all that computed it.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_jax.data.collate import picture_key
from lvlm_jax.evaluate import scores as scoring
from lvlm_jax.infer.beam import Beams
from lvlm_jax.infer.generate import Answer, bucket
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.infer.system import System
from lvlm_jax.processing.schema import Encoded, Example, Text
from lvlm_jax.progress import bar as progress_bar
from lvlm_jax.versions import versions

SAMPLES, SUMMARY = "samples.jsonl", "summary.json"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "transformers", "tokenizers")
"""What a score depends on."""
RUNNING = ("exact", "vqa", "refcoco")
"""Scores that are means over samples, so that the progress bar can show them on the way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What an evaluation found.

    scores: name -> value. samples: one dict a sample, in the data set's order, as ``samples.jsonl`` has them.
    summary: scores, settings and versions, as ``summary.json`` has them.
    """

    scores: dict[str, float]
    samples: list[dict[str, Any]] = dataclasses.field(repr=False)
    summary: dict[str, Any] = dataclasses.field(repr=False)


def evaluate(
    system: System,
    samples: Iterable[tuple[Example, Any]],
    *,
    scores: Sequence[str] = ("exact",),
    batch_rows: int = 64,
    max_new_tokens: int = 16,
    sampling: Sampling | Beams | None = None,
    progress: bool = True,
    out: str | os.PathLike | None = None,
    data: str = "",
) -> Result:
    """Answers to every sample, scored.

    Args:
      samples: (conversation that ends with the question, references); a last assistant turn is taken off. References
        are what the scoring rule takes: a string, a list of strings, an annotation record.
      scores: keys of `evaluate.scores.SCORES`.
      sampling: default greedy; captions are often scored with ``Beams(count=5)``.
      batch_rows: questions a batch. Questions about one picture stand in one batch and share its vision row.
      out: folder for ``samples.jsonl`` and ``summary.json``, written when all is done.
      data: what the samples are, for the summary.

    Raises:
      ValueError: no samples, an unknown score, a prompt that does not fit the context.
    """
    names = (scores,) if isinstance(scores, str) else tuple(scores)
    for name in names:
        if name not in scoring.SCORES:
            raise ValueError(f"unknown score {name!r}; choose from {', '.join(sorted(scoring.SCORES))}")
    pairs = list(samples)
    if not pairs or not names:
        raise ValueError(f"{len(pairs)} samples and {len(names)} scores: there is nothing to evaluate")
    references = [reference for _, reference in pairs]
    for name in names:
        # References that a rule cannot use are found now, not after hours of answers.
        some = references if name in RUNNING else references[:2]
        scoring.score(name, ["a"] * len(some), some)
    started = time.perf_counter()
    encoded = [system.encode(example) for example, _ in pairs]
    for (example, _), prompt in zip(pairs, encoded):
        _check(system, example, prompt, max_new_tokens)
    answers = _ask(
        system, encoded, references, plan(encoded, batch_rows), names[0], batch_rows, max_new_tokens, sampling, progress
    )
    seconds = time.perf_counter() - started
    predictions = [answer.text.strip() for answer in answers]
    scored = {name: scoring.score(name, predictions, references) for name in names}
    decoding = _decoding(sampling, max_new_tokens)
    rows = [
        _row(system, example, reference, answer, [found.samples[i] for found in scored.values()], decoding)
        for i, ((example, reference), answer) in enumerate(zip(pairs, answers))
    ]
    summary = {"data": data} | _summary(system, scored, answers, decoding)
    summary |= {"batch_rows": batch_rows, "seconds": round(seconds, 3)}
    if out is not None:
        write(Path(out), rows, summary)
    return Result(scores=summary["scores"], samples=rows, summary=summary)


def load(folder: str | os.PathLike) -> Result | None:
    """What `evaluate` wrote to a folder, None where nothing (or not all of it) stands. ValueError: it is damaged."""
    files = Path(folder) / SAMPLES, Path(folder) / SUMMARY
    if not all(file.exists() for file in files):
        return None
    try:
        rows, summary = [json.loads(line) for line in files[0].open("rb")], json.loads(files[1].read_bytes())
        return Result(scores=summary["scores"], samples=rows, summary=summary)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {SAMPLES} or {SUMMARY} is damaged; delete the folder to score again") from error


def plan(encoded: Sequence[Encoded], batch_rows: int) -> list[list[int]]:
    """Which samples stand in one batch: those about one picture together, batches of one length bucket where they can.

    A function of the samples alone. Few lengths mean few compiled programs, shared pictures fewer runs of the tower.
    """
    if batch_rows < 1:
        raise ValueError(f"batch_rows={batch_rows}: must be at least 1")
    groups: dict[tuple, list[int]] = {}
    for index, prompt in enumerate(encoded):
        # A question without a picture is a group of its own.
        key = tuple(picture_key(image) for image in prompt.images) or (index,)
        groups.setdefault(key, []).append(index)
    longest = {key: max(bucket(len(encoded[i].tokens)) for i in group) for key, group in groups.items()}
    order = sorted(groups, key=lambda key: (longest[key], groups[key][0]))
    flat = [index for key in order for index in groups[key]]
    return [flat[i : i + batch_rows] for i in range(0, len(flat), batch_rows)]


def _decoding(sampling: Sampling | Beams | None, max_new_tokens: int) -> dict[str, Any]:
    """What the records say of how answers were made: every setting that they depend on."""
    if sampling is None or (isinstance(sampling, Sampling) and sampling.mode == "greedy"):
        penalty = 1.0 if sampling is None else sampling.repetition_penalty
        out = {"method": "greedy", "max_new_tokens": max_new_tokens}
        return out if penalty == 1 else out | {"repetition_penalty": penalty}
    method = "beam search" if isinstance(sampling, Beams) else "sampling"
    return {"method": method, "max_new_tokens": max_new_tokens} | dataclasses.asdict(sampling)


def _check(system: System, example: Example, prompt: Encoded, max_new_tokens: int) -> None:
    try:
        system.generator.check(prompt, max_new_tokens)
    except ValueError as error:
        raise ValueError(f"{example.origin or example.id or 'sample'}: {error}") from error


def _ask(
    system: System,
    encoded: Sequence[Encoded],
    references: Sequence[Any],
    batches: list[list[int]],
    shown: str,
    batch_rows: int,
    max_new_tokens: int,
    sampling: Sampling | Beams | None,
    progress: bool,
) -> list[Answer]:
    """The answers in the order of the samples."""
    answers: dict[int, Answer] = {}
    running, bar = [], progress_bar(len(encoded), "evaluate", unit="question", show=progress)
    stream: Iterator[list[Answer]] = system.generator.batches(
        [[encoded[i] for i in batch] for batch in batches],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=system.stop_strings,
        rows=batch_rows,
    )
    with bar:
        for batch, found in zip(batches, stream):
            answers.update(zip(batch, found))
            if progress and shown in RUNNING:
                texts = [answer.text.strip() for answer in found]
                scored = scoring.score(shown, texts, [references[i] for i in batch])
                running += [next(iter(sample.values())) for sample in scored.samples]
                bar.set_postfix({shown: f"{sum(running) / len(running):.2%}"}, refresh=False)
            bar.update(len(batch))
    return [answers[i] for i in range(len(encoded))]


def _row(
    system: System, example: Example, reference: Any, answer: Answer, sample: list[Mapping[str, float]], decoding: dict
) -> dict[str, Any]:
    """One line of ``samples.jsonl``."""
    return {
        "id": example.id,
        "origin": example.origin,
        "images": [image.source if isinstance(image.source, str) else None for image in example.images],
        "videos": [video.source if isinstance(video.source, str) else None for video in example.videos],
        "question": _question(example),
        "prompt": system.prompt_text(example),
        "template": system.template.name,
        "prediction": answer.text.strip(),
        "references": reference,
        "scores": {key: value for part in sample for key, value in part.items()},
        "ended_by": answer.reason,
        "tokens": len(answer.tokens),
        "decoding": decoding,
    }


def _question(example: Example) -> str:
    """The text of the last user turn."""
    asked = next(turn for turn in reversed(example.turns) if turn.role == "user")
    return "".join(segment.text for segment in asked.segments if isinstance(segment, Text))


def _summary(
    system: System, scored: Mapping[str, scoring.Scored], answers: Sequence[Answer], decoding: dict
) -> dict[str, Any]:
    """What ``summary.json`` says."""
    return {
        "scores": {key: value for found in scored.values() for key, value in found.values.items()},
        "variants": {name: found.variant for name, found in scored.items()},
        "samples": len(answers),
        "cut_off": sum(answer.reason == "length" for answer in answers),
        "model": system.name,
        "template": system.template.name,
        "system": system.template.system,
        "decoding": decoding,
        "dtype": np.dtype(system.model.dtype).name,
        "versions": versions(PACKAGES),
    }


def write(folder: Path, rows: list[dict], summary: dict) -> None:
    """What `load` reads: both files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    for name, text in ((SAMPLES, lines), (SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")):
        part = folder / f"{name}.{os.getpid()}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)
