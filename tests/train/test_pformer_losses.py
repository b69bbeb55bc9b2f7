"""A P-Former's own losses and the alignment of a Q-Former with it, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.train.losses import total
from lvlm_jax.train.pformer_losses import ALIGNMENT, alignment_loss, mask_words, nearest, sentence_loss, vocabulary_loss

TABLE = jnp.array([[0.0, 0.0], [4.0, 0.0], [0.0, 9.0]])


def test_each_prompt_vector_is_drawn_to_its_nearest_word():
    prompt = jnp.array([[[1.0, 0.0], [3.0, 1.0]], [[0.0, 8.0], [5.0, 0.0]]])
    assert nearest(prompt, TABLE).tolist() == [[0, 1], [2, 1]]
    loss, weight = vocabulary_loss(prompt, TABLE)
    assert (loss, weight) == (0.75 + 0.5, 2)  # means of 1 0 1 1, and of 0 1 1 0
    pulls = jax.grad(lambda x, table: vocabulary_loss(x, table)[0], (0, 1))(prompt, TABLE)
    np.testing.assert_allclose(pulls[0], 2 / 4 * np.array([[[1, 0], [-1, 1]], [[0, -1], [1, 0]]]))
    assert not np.asarray(pulls[1]).any()  # the words stay where they are
    assert vocabulary_loss(prompt, TABLE, np.array([True, False])) == (0.75, 1)


@pytest.mark.parametrize("chunk", [1, 7, 50, 99])
def test_the_nearest_word_in_any_number_of_chunks(chunk):
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(3, 4, 5)).astype(np.float32), rng.normal(size=(50, 5)).astype(np.float32)
    table[33] = table[12]  # of equals the first
    x[0, 0] = table[12]
    expected = np.square(x[:, :, None] - table).sum(-1).argmin(-1)
    assert expected[0, 0] == 12
    np.testing.assert_array_equal(nearest(jnp.asarray(x), jnp.asarray(table), chunk), expected)


def test_a_sentence_is_its_own_answer():
    sentence = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    scores = np.asarray(sentence @ sentence.T, np.float64) / 0.5
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    target = 0.9 * np.eye(3) + 0.1 / 3
    loss, weight, correct = sentence_loss(sentence, 0.5)
    np.testing.assert_allclose(loss / weight, -(target * logs).sum(1).mean(), rtol=1e-6)
    assert correct == 3
    loss, weight, _ = sentence_loss(sentence, 0.5, np.array([True, True, False]), smoothing=0.0)
    logs = scores[:2, :2] - np.log(np.exp(scores[:2, :2]).sum(1, keepdims=True))
    np.testing.assert_allclose(loss / weight, -np.diagonal(logs).mean(), rtol=1e-6)
    # Two sentences push each other away; where the other side gets no gradient, half as hard.
    pair = sentence[:2]
    whole, half = (jax.grad(lambda x, g=g: sentence_loss(x, 0.5, smoothing=0.0, gathered=g)[0])(pair) for g in (1, 0))
    np.testing.assert_allclose(whole - half, half + (whole - 2 * half), rtol=1e-6)
    assert np.abs(np.asarray(half)).max() > 0
    assert not np.allclose(whole, half)


def test_visual_tokens_are_drawn_to_the_prompt():
    tokens, prompt = jnp.array([[[1.0, 2.0]], [[0.0, 0.0]]]), jnp.array([[[1.0, 0.0]], [[3.0, 1.0]]])
    loss, weight = alignment_loss(tokens, prompt)
    assert (loss, weight) == (2 + 5, 2)
    assert not np.asarray(jax.grad(lambda p: alignment_loss(tokens, p)[0])(prompt)).any()
    assert alignment_loss(tokens, prompt, np.array([False, True])) == (5, 1)
    assert ALIGNMENT == {"stage 1": 10.0, "stage 2": 100.0}
    assert total((loss, weight), (loss * 0, weight * 0)) == 3.5  # a loss of nothing adds nothing


def test_a_quarter_of_the_words_is_hidden():
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 90, (64, 50)), jnp.int32)
    segments = jnp.asarray(np.arange(50) < 40).astype(jnp.int32) * jnp.ones((64, 1), jnp.int32)
    hidden = np.asarray(mask_words(jax.random.key(0), tokens, segments, 103)) == 103
    assert not hidden[:, 0].any()
    assert not hidden[:, 40:].any()
    np.testing.assert_allclose(hidden[:, 1:40].mean(), 0.25, atol=0.03)
    kept = np.where(hidden, 0, tokens)
    np.testing.assert_array_equal(kept, np.where(hidden, 0, mask_words(jax.random.key(0), tokens, segments, 103)))
