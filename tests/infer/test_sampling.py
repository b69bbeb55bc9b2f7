import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.infer.sampling import Sampling, sample

LOGITS = np.array([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0], [0.0, 3.0, 3.0, -2.0, 1.0, 2.0]], np.float32)
DRAWS = 20_000


def reference(row, temperature, top_k, top_p):
    """The distribution by definition: temper, keep k, keep the smallest set that reaches p, normalise."""
    order = np.argsort(-row, kind="stable")
    probs = np.exp((row - row.max()) / temperature)
    probs /= probs.sum()
    keep = list(order[: top_k or len(row)])
    mass = probs[keep] / probs[keep].sum()
    keep = keep[: int(np.searchsorted(np.cumsum(mass), top_p - 1e-9)) + 1]
    out = np.zeros_like(row, np.float64)
    out[keep] = probs[keep] / probs[keep].sum()
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.7, 3, 1.0), (1.0, 0, 0.6), (1.0, 0, 0.95), (0.8, 4, 0.7), (1.0, 0, 1e-6)],
)
def test_draws_follow_the_reference_distribution(temperature, top_k, top_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for row in LOGITS:
        tokens = sample(jnp.asarray(np.tile(row, (DRAWS, 1))), jax.random.key(0), sampling)
        counts = np.bincount(np.asarray(tokens), minlength=len(row)) / DRAWS
        expected = reference(row, temperature, top_k, top_p)
        assert not counts[expected == 0].any()
        assert np.abs(counts - expected).max() < 4 * np.sqrt(0.25 / DRAWS)


def test_greedy_takes_the_best_and_the_first_of_equals():
    tokens = sample(jnp.asarray(LOGITS), jax.random.key(0), Sampling())
    assert tokens.tolist() == [0, 1]
    assert tokens.dtype == jnp.int32


def test_equal_scores_do_not_bring_in_more_than_k():
    logits = jnp.zeros((4000, 8))
    tokens = np.asarray(sample(logits, jax.random.key(0), Sampling(temperature=1.0, top_k=2)))
    assert set(tokens.tolist()) == {0, 1}


def test_extreme_settings_stay_finite():
    logits = jnp.asarray([[1e4, -1e4, 0.0, -jnp.inf]])
    for sampling in (Sampling(temperature=1e-30), Sampling(temperature=1e30, top_p=0.1), Sampling(temperature=1.0)):
        assert int(sample(logits, jax.random.key(3), sampling)[0]) in ((0,) if sampling.temperature < 10 else (0, 1, 2))


def test_a_key_a_row_draws_independently_of_the_neighbours():
    keys = jax.random.split(jax.random.key(0), 2)
    both = sample(jnp.asarray(LOGITS), keys, Sampling(temperature=1.0))
    alone = sample(jnp.asarray(LOGITS[1:]), keys[1:], Sampling(temperature=1.0))
    assert both[1] == alone[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": float("nan")}, "temperature=nan: must be a number, 0"),
        ({"temperature": -0.1}, "temperature=-0.1: must be 0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0, at most 1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"top_k": -1}, "top_k=-1: must be a whole number, 0 or above"),
        ({"seed": -3}, "seed=-3"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan: must be a number"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Sampling(**settings)
    assert message in str(error.value)


def test_a_repetition_penalty_is_the_torch_librarys():
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    scores = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    ids = np.stack([scores.argmax(-1), [0, 0, 5]], axis=1)
    theirs = RepetitionPenaltyLogitsProcessor(5.0)(torch.tensor(ids), torch.tensor(scores)).numpy()
    written = np.zeros(scores.shape, bool)
    np.put_along_axis(written, ids, True, axis=1)
    sampling = Sampling(repetition_penalty=5.0)
    got = sample(jnp.asarray(scores), None, sampling, jnp.asarray(written))
    assert got.tolist() == theirs.argmax(-1).tolist()
    assert got.tolist() != scores.argmax(-1).tolist()
    assert Sampling().numbers[-1] is None
