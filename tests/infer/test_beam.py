import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.evaluate.run import evaluate
from lvlm_jax.infer import beam
from lvlm_jax.infer.beam import Beams
from lvlm_jax.infer.prompt import as_example
from lvlm_jax.infer.sampling import Sampling
from tests.infer.tiny import few_shapes

END, LONGEST = 3, 3
TABLE = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32) * 2
"""Scores of the next of four tokens, by prompt and by the two tokens before (4: none)."""


def log_probabilities(prompt, before):
    scores = TABLE[prompt][tuple(([4, 4, *before])[-2:])].astype(np.float64)
    return scores - np.log(np.exp(scores).sum())


def every_answer(prompt, penalty, least):
    """(score, tokens) of all answers there are, the best first."""
    out = []
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(4), repeat=length):
            if (
                END in tokens[:-1]
                or (tokens[-1] != END and length < LONGEST)
                or (tokens[-1] == END and length <= least)
            ):
                continue
            total = sum(log_probabilities(prompt, tokens[:i])[token] for i, token in enumerate(tokens))
            out.append((total / length**penalty, tokens))
    return sorted(out, reverse=True)


@functools.partial(jax.jit, static_argnames="mode")
def search(mode, numbers, asked):
    """The state is what was said before, so that a row out of order would be continued wrongly."""
    prompt = beam.repeated(jnp.arange(2), mode[0])
    before = jnp.full(2 * mode[0], 4)

    def step(tokens, state):
        before, at = state
        return jnp.asarray(TABLE)[prompt, before, tokens], (tokens, at + 1)

    settings = {"mode": mode, "numbers": numbers, "ends": (END,), "room": 4, "max_new_tokens": jnp.int32(LONGEST)}
    return beam.search(step, (before, jnp.int32(1)), jnp.asarray(TABLE)[:, 4, 4], asked=asked, **settings)


@pytest.mark.parametrize(("penalty", "least"), [(0.0, 0), (1.0, 0), (-1.0, 0), (2.0, 1)])
def test_enough_beams_find_the_best_of_all_answers(penalty, least):
    beams = Beams(count=12, length_penalty=penalty, early_stopping="never", min_new_tokens=least)
    found = jax.device_get(search(beams.mode, beams.numbers, jnp.ones(2, bool)))
    for prompt in range(2):
        wanted = every_answer(prompt, penalty, least)[: beams.count]
        got = [tuple(tokens[:n].tolist()) for tokens, n in zip(found.tokens[prompt], found.lengths[prompt])]
        assert got == [tokens for _, tokens in wanted]
        np.testing.assert_allclose(found.scores[prompt], [score for score, _ in wanted], rtol=1e-5)
    unasked = search(beams.mode, beams.numbers, jnp.asarray([True, False]))
    np.testing.assert_array_equal(unasked.scores[0], found.scores[0])
    assert np.isneginf(unasked.scores[1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, r"count=0: must be a whole number, 1 or above"),
        ({"count": True}, r"count=True: must be a whole number"),
        ({"min_new_tokens": -1}, r"min_new_tokens=-1: must be a whole number, 0 or above"),
        ({"length_penalty": float("inf")}, r"length_penalty=inf: must be a finite number"),
        ({"length_penalty": False}, r"length_penalty=False: must be a finite number"),
    ],
)
def test_values_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        Beams(**change)


def test_single_words_become_settings():
    greedy, drawn = Sampling(), Sampling(temperature=0.5)
    assert beam.settings(drawn, 1, 1.0) is drawn
    assert beam.settings(greedy, 5, -1.0) == Beams(count=5, length_penalty=-1.0)
    with pytest.raises(ValueError, match=r"length_penalty=0.5 weighs .* beams=1 has but one; give more beams"):
        beam.settings(greedy, 1, 0.5)
    with pytest.raises(ValueError, match=r"beams=5 and temperature=0.5: a beam search draws nothing"):
        beam.settings(drawn, 5, 1.0)
    with pytest.raises(ValueError, match=r"count=0: must be"):
        beam.settings(greedy, 0, 1.0)


@pytest.fixture
def prompts(system, pictures, monkeypatch):
    few_shapes(monkeypatch)
    texts = ["What is it?", "dogs", "Is there a yellow bird near it?"]
    return [system.encode(as_example(text, shown)) for text, shown in zip(texts, [pictures[0], None, pictures[1]])]


@pytest.mark.slow
def test_where_users_ask_for_it(system, prompts, pictures):
    words = {"max_new_tokens": 6, "beams": 3, "length_penalty": -1.0}
    wanted = system.generator.generate(
        prompts[:1], rows=1, max_new_tokens=6, sampling=Beams(count=3, length_penalty=-1.0)
    )[0].text.strip()
    assert system.generate("What is it?", images=pictures[0], **words) == wanted
    example = as_example("What is it?", pictures[0])
    scored = evaluate(
        system,
        [(example, wanted)],
        batch_rows=1,
        max_new_tokens=6,
        sampling=Beams(count=3, length_penalty=-1.0),
        progress=False,
    )
    assert scored.samples[0]["prediction"] == wanted
    assert scored.summary["decoding"] == {
        "method": "beam search",
        "max_new_tokens": 6,
        "count": 3,
        "length_penalty": -1.0,
        "early_stopping": False,
        "min_new_tokens": 0,
    }
