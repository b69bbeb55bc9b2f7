"""What an evaluation asks of a data set of conversations: every answer is a sample."""

import dataclasses
import sys
from typing import Any

from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Example, Text


def questions(source: Any, limit: int = 0, on_bad: str = "raise") -> list[tuple[Example, list[str]]]:
    """(conversation up to an answer, [that answer]) of every answer; the earlier answers of a conversation are given.

    Args:
      source: conversations by number.
      limit: so many answers; 0 takes all.
      on_bad: "raise", or "skip" to leave bad records out and say how many.

    Raises:
      DataError: a record that cannot be read, ends with a question, has no answer at all, or one that is no text.
    """
    samples: list[tuple[Example, list[str]]] = []
    bad: list[DataError] = []
    for i in range(len(source)):
        if limit and len(samples) >= limit:
            break
        try:
            samples += _answers(source[i], i)
        except DataError as error:
            if on_bad == "raise":
                raise
            bad.append(error)
    if bad:
        print(f"{len(bad):,} bad records are not asked about; the first: {bad[0]}", file=sys.stderr, flush=True)
    return samples[: limit or None]


def _answers(example: Example, number: int) -> list[tuple[Example, list[str]]]:
    where, found = example.origin or f"record {number}", []
    if example.turns[-1].role != "assistant":
        raise DataError(f"{where}: the last turn is the {example.turns[-1].role}'s: there is no answer to score by")
    for at, turn in enumerate(example.turns):
        if turn.role != "assistant":
            continue
        if not turn.segments or not all(isinstance(segment, Text) for segment in turn.segments):
            raise DataError(f"{where}: turn {at}: the answer is not a text; only texts can be scored")
        answer = "".join(segment.text for segment in turn.segments)
        found.append((dataclasses.replace(example, turns=example.turns[: at + 1]), [answer]))
    return found
