"""A P-Former's own losses and the alignment of a Q-Former with it, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.train.losses import total
from lvlm_jax.train.pformer_losses import ALIGNMENT, alignment_loss, mask_words, nearest, sentence_loss, vocabulary_loss
from tests import tiny

TABLE = jnp.array([[0.0, 0.0], [4.0, 0.0], [0.0, 9.0]])


def test_each_prompt_vector_is_drawn_to_its_nearest_word():
    prompt = jnp.array([[[1.0, 0.0], [3.0, 1.0]], [[0.0, 8.0], [5.0, 0.0]]])
    assert np.asarray(tiny.jit(nearest)(prompt, TABLE)).tolist() == [[0, 1], [2, 1]]
    run = tiny.jit(jax.value_and_grad(vocabulary_loss, (0, 1), has_aux=True))
    (loss, weight), pulls = run(prompt, TABLE, np.array([True, True]))
    assert (loss, weight) == (0.75 + 0.5, 2)  # means of 1 0 1 1, and of 0 1 1 0
    np.testing.assert_allclose(pulls[0], 2 / 4 * np.array([[[1, 0], [-1, 1]], [[0, -1], [1, 0]]]))
    assert not np.asarray(pulls[1]).any()  # the words stay where they are
    assert run(prompt, TABLE, np.array([True, False]))[0] == (0.75, 1)


@pytest.mark.parametrize("chunk", [7, 50, 99])
def test_the_nearest_word_in_any_number_of_chunks(chunk):
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(3, 4, 5)).astype(np.float32), rng.normal(size=(50, 5)).astype(np.float32)
    table[33] = table[12]  # of equals the first
    x[0, 0] = table[12]
    expected = np.square(x[:, :, None] - table).sum(-1).argmin(-1)
    assert expected[0, 0] == 12
    got = tiny.jit(nearest, static_argnums=2)(jnp.asarray(x), jnp.asarray(table), chunk)
    np.testing.assert_array_equal(got, expected)


def test_a_sentence_is_its_own_answer():
    sentence = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], np.float32)
    scores = sentence.astype(np.float64) @ sentence.T / 0.5
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    target = 0.9 * np.eye(3) + 0.1 / 3
    loss, weight, correct = tiny.jit(sentence_loss)(jnp.asarray(sentence), 0.5)
    np.testing.assert_allclose(loss / weight, -(target * logs).sum(1).mean(), rtol=1e-6)
    assert correct == 3
    logs = scores[:2, :2] - np.log(np.exp(scores[:2, :2]).sum(1, keepdims=True))
    real = np.array([True, True, False])
    for gathered in (True, False):
        alone = functools.partial(sentence_loss, smoothing=0.0, gathered=gathered)
        run = tiny.jit(jax.value_and_grad(lambda x, f=alone: f(x, 0.5, real)[:2], has_aux=True))
        (loss, weight), pull = run(jnp.asarray(sentence))
        np.testing.assert_allclose(loss / weight, -np.diagonal(logs).mean(), rtol=1e-6)
        # d loss / d scores, times what scores are made of; as the answer a sentence gets a gradient too, or not
        slope = (np.exp(logs) - np.eye(2)) / 0.5
        expected = (slope + slope.T * gathered) @ sentence[:2]
        np.testing.assert_allclose(pull[:2], expected, rtol=1e-5, atol=1e-6)
        assert not np.asarray(pull[2]).any()


def test_visual_tokens_are_drawn_to_the_prompt():
    tokens, prompt = jnp.array([[[1.0, 2.0]], [[0.0, 0.0]]]), jnp.array([[[1.0, 0.0]], [[3.0, 1.0]]])
    run = tiny.jit(jax.value_and_grad(alignment_loss, (0, 1), has_aux=True))
    (loss, weight), pulls = run(tokens, prompt, np.array([True, True]))
    assert (loss, weight) == (2 + 5, 2)
    np.testing.assert_allclose(pulls[0], [[[0, 2]], [[-3, -1]]])
    assert not np.asarray(pulls[1]).any()
    assert run(tokens, prompt, np.array([False, True]))[0] == (5, 1)
    assert ALIGNMENT == {"stage 1": 10.0, "stage 2": 100.0}
    assert total((loss, weight), (loss * 0, weight * 0)) == 3.5  # a loss of nothing adds nothing


def test_a_quarter_of_the_words_is_hidden():
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 90, (64, 50)), jnp.int32)
    segments = jnp.asarray(np.arange(50) < 40).astype(jnp.int32) * jnp.ones((64, 1), jnp.int32)
    masked = np.asarray(tiny.jit(mask_words, static_argnums=3)(jax.random.key(0), tokens, segments, 103))
    hidden = masked == 103
    assert not hidden[:, 0].any()
    assert not hidden[:, 40:].any()
    np.testing.assert_allclose(hidden[:, 1:40].mean(), 0.25, atol=0.03)
    np.testing.assert_array_equal(masked[~hidden], np.asarray(tokens)[~hidden])
