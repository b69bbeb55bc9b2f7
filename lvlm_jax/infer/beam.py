"""Beam search over whatever gives scores step by step: static shapes, traced whole, hypotheses reordered on device.

The rules are those of the torch library's ``generate(num_beams=...)``: which hypotheses finish, how they are scored,
and when a prompt's search ends.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.shapes import Array, Bool, Float, Int, pytree

Early = bool | Literal["never"]
Mode = tuple[int, Early]

Step = Callable[[Array, Any], tuple[Array, Any]]
"""(newest token of each row, state) -> (float32 scores of the next one [rows, V], state)."""

NONE = -jnp.inf
"""Score of a hypothesis that there is not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beams:
    """Settings of a beam search, with the torch library's names and defaults.

    count: hypotheses that are followed at once; 1 is greedy. length_penalty: a finished one's score is the sum of its
    log-probabilities, that of its end token included, over length ** length_penalty; so above 0 favours long answers,
    below 0 short ones. early_stopping: a prompt's search ends when `count` hypotheses are finished and, with True, at
    once; with False, when the best running one would not be among them if it ended now; with "never", when it cannot
    come to be among them (with a penalty above 0: if it lost nothing up to the longest answer). min_new_tokens: no end
    token before so many others.

    Raises:
      ValueError: a value out of its range, naming field and range.
    """

    count: int = 5
    length_penalty: float | int = 1.0
    early_stopping: Early = False
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("count", self.count, 1), ("min_new_tokens", self.min_new_tokens, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: must be a whole number, {least} or above")
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not math.isfinite(penalty):
            raise ValueError(f"length_penalty={penalty!r}: must be a finite number")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r}: must be True, False or 'never'")

    @property
    def mode(self) -> Mode:
        """What the program depends on; the numbers are its arguments, so that changing them compiles nothing."""
        return self.count, self.early_stopping

    @property
    def numbers(self) -> tuple[Array, Array]:
        """(length_penalty, min_new_tokens) as arrays."""
        return jnp.float32(self.length_penalty), jnp.int32(self.min_new_tokens)


def settings(sampling: Sampling, beams: int, length_penalty: float) -> Sampling | Beams:
    """What single words ask for: a beam search where they name several beams, else `sampling`.

    Raises:
      ValueError: words that do not go together.
    """
    if beams == 1:
        if length_penalty != 1:
            raise ValueError(
                f"length_penalty={length_penalty} weighs the hypotheses of a beam search against each other, and "
                "beams=1 has but one; give more beams, or leave it out"
            )
        return sampling
    if sampling.mode != "greedy":
        raise ValueError(
            f"beams={beams} and temperature={sampling.temperature}: a beam search draws nothing; leave one of them out"
        )
    if sampling.repetition_penalty != 1:
        raise ValueError(
            f"beams={beams} and repetition_penalty={sampling.repetition_penalty}: a beam search weighs no repetitions "
            "here; leave one of them out"
        )
    return Beams(count=beams, length_penalty=length_penalty)


@pytree
@dataclasses.dataclass(frozen=True)
class Found:
    """The finished hypotheses of each prompt, the best first.

    tokens: up to and with the end token; what stands behind it says nothing. lengths: how many these are. scores: see
    `Beams`; minus infinity where there is none (of a prompt that was not `asked`).
    """

    tokens: Int[Array, "B N T"]
    lengths: Int[Array, "B N"]
    scores: Float[Array, "B N"]


@pytree
@dataclasses.dataclass(frozen=True)
class Running:
    """The hypotheses that go on: their tokens, the newest of them, from which row each came, log-probability so far."""

    tokens: Int[Array, "B N T"]
    newest: Int[Array, "B N"]
    parents: Int[Array, "B N"]
    scores: Float[Array, "B N"]


def repeated(state: Any, count: int) -> Any:
    """The state of B rows as that of B*count rows, those of one prompt side by side; scalars stand for all rows."""
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0) if x.ndim else x, state)


def search(
    step: Step,
    state: Any,
    logits: Float[Array, "B V"],
    *,
    mode: Mode,
    numbers: tuple[Array, Array],
    ends: tuple[int, ...],
    room: int,
    max_new_tokens: Int[Array, ""],
    asked: Bool[Array, "B"],
) -> Found:
    """The best `count` answers to each prompt. Call it inside a jitted function.

    Args:
      step: runs B*count rows.
      state: what `step` hands on, for B*count rows (see `repeated`): rows are the first axis of each leaf, and are put
        in a new order as hypotheses come and go; scalars stay. What no order concerns `step` may close over.
      logits: scores after the prompts.
      mode, numbers: of a `Beams`.
      ends: tokens that end an answer.
      room: T, the most tokens that there is room for; `max_new_tokens` is at most that.
      asked: rows that matter: the search ends when theirs have.
    """
    (count, early), (prompts, vocab) = mode, logits.shape
    early = early if count > 1 else True  # greedy: the first end is the end
    empty = jnp.zeros((prompts, count, room), jnp.int32)
    whole = jnp.zeros((prompts, count), jnp.int32)
    # All begin alike: only the first may be continued, or all would be continued in the same way.
    first = jnp.broadcast_to(jnp.where(jnp.arange(count) == 0, 0.0, NONE), (prompts, count))
    running = Running(empty, whole, whole, first.astype(jnp.float32))
    found = Found(empty, whole, jnp.full((prompts, count), NONE))

    def choose(at: Array, logits: Array, running: Running, found: Found, searching: Array) -> tuple:
        running, more = _continued(logits, running, at, ends, at + 1 >= max_new_tokens, numbers)
        found = _best(found, dataclasses.replace(more, scores=jnp.where(searching[:, None], more.scores, NONE)))
        worst, penalty = found.scores.min(axis=1), numbers[0]
        length = jnp.where((early == "never") & (penalty > 0), max_new_tokens, at + 1)
        searching &= running.scores[:, 0] / length.astype(jnp.float32) ** penalty > worst
        if early is True:
            searching &= worst == NONE
        return at + 1, running, found, searching

    def go_on(carry: tuple) -> tuple:
        at, running, found, searching, state = carry
        scores, state = step(running.newest.reshape(-1), _ordered(state, running.parents))
        return *choose(at, scores.reshape(prompts, count, vocab), running, found, searching), state

    after = choose(jnp.int32(0), jnp.repeat(logits[:, None], count, axis=1), running, found, asked)
    unfinished = lambda carry: (carry[0] < max_new_tokens) & carry[3].any()  # noqa: E731
    return jax.lax.while_loop(unfinished, go_on, (*after, state))[2]


def _continued(
    logits: Float[Array, "B N V"],
    running: Running,
    at: Int[Array, ""],
    ends: tuple[int, ...],
    last: Bool[Array, ""],
    numbers: tuple[Array, Array],
) -> tuple[Running, Found]:
    """One more token of each hypothesis -> (those that go on, those that end with it)."""
    (_, count, vocab), (penalty, least) = logits.shape, numbers
    ending = jnp.zeros(vocab, bool).at[jnp.asarray(ends, jnp.int32)].set(True)
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    scores = jnp.where(ending & (at < least), NONE, scores) + running.scores[..., None]
    # So many that `count` are left to go on, even if every end token of every hypothesis is among the best.
    best, where = jax.lax.top_k(scores.reshape(len(logits), count * vocab), (1 + len(ends)) * count)
    parents, tokens = where // vocab, where % vocab
    ended = ending[tokens] | last

    def grown(parents: Array, tokens: Array) -> Array:
        return _picked(running.tokens, parents).at[:, :, at].set(tokens)

    # Only the best `count` may finish; the others are there to go on in their stead.
    top = parents[:, :count], tokens[:, :count]
    finished = jnp.where(ended[:, :count], best[:, :count] / (at + 1).astype(jnp.float32) ** penalty, NONE)
    more = Found(grown(*top), jnp.broadcast_to(at + 1, finished.shape), finished)
    left, chosen = jax.lax.top_k(jnp.where(ended, NONE, best), count)
    parents, tokens = _picked(parents, chosen), _picked(tokens, chosen)
    return Running(grown(parents, tokens), tokens, parents, left), more


def _best(found: Found, more: Found) -> Found:
    """The best of both, as many as `found` has."""
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), found, more)
    _, chosen = jax.lax.top_k(both.scores, found.scores.shape[1])
    return jax.tree.map(lambda x: _picked(x, chosen), both)


def _picked(x: Array, order: Int[Array, "B N"]) -> Array:
    """x[b, order[b, n]]: within a prompt, so that nothing leaves its device."""
    return jax.vmap(lambda row, at: row[at])(x, order)


def _ordered(state: Any, parents: Int[Array, "B N"]) -> Any:
    """The state's rows in the order of the hypotheses that they now belong to."""

    def rows(x: Array) -> Array:
        return _picked(x.reshape(*parents.shape, *x.shape[1:]), parents).reshape(x.shape)

    return jax.tree.map(lambda x: rows(x) if x.ndim else x, state)
