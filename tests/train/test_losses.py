import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.train.losses import contrastive_loss, language_loss, sigmoid_loss, tokenizer_loss
from lvlm_jax.vision.vq import Reading

B, T, D, V = 3, 19, 8, 11


def _inputs(dtype=jnp.float32):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(B, T, D)), dtype)
    kernel = jnp.asarray(random.normal(size=(D, V)) / 3, jnp.float32)
    tokens = random.integers(0, V, (B, T)).astype(np.int32)
    weights = ((random.random((B, T)) < 0.4) * random.integers(1, 4, (B, T)) / 2).astype(np.float32)
    weights[1] = 0  # a row without a label
    return hidden, kernel, tokens, weights


def _plain(hidden, kernel, tokens, weights):
    logits = hidden[:, :-1].astype(jnp.float32) @ kernel
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[:, 1:, None], 2)[..., 0]
    hit = logits.argmax(-1) == tokens[:, 1:]
    return -(own * weights[:, 1:]).sum(), weights[:, 1:].sum(), (hit * weights[:, 1:]).sum()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 19, 256])
def test_equals_plain_cross_entropy_with_gradients(skip, chunk):
    hidden, kernel, tokens, weights = _inputs()

    def mean(loss, h, k):
        sums = loss(h, k)
        return sums[0] / sums[1], sums[1:]

    def ours(h, k):
        return language_loss(h, k, tokens, weights, chunk=chunk, skip_unlabelled=skip)

    def plain(h, k):
        return _plain(h, k, tokens, weights)

    got = jax.jit(jax.value_and_grad(lambda h, k: mean(ours, h, k), (0, 1), has_aux=True))(hidden, kernel)
    want = jax.value_and_grad(lambda h, k: mean(plain, h, k), (0, 1), has_aux=True)(hidden, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)
    without_gradient = ours(hidden, kernel)
    np.testing.assert_allclose(without_gradient[0] / without_gradient[1], want[0][0], rtol=1e-6)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_final_softcap_bends_loss_and_gradients(shards):
    hidden, kernel, tokens, weights = _inputs()
    cap = 0.7  # most logits are beyond it

    def ours(h, k):
        return language_loss(h, k, tokens, weights, chunk=4, softcap=cap, shards=shards)[0]

    def plain(h, k):
        logits = cap * jnp.tanh(h[:, :-1] @ k / cap)
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[:, 1:, None], 2)[..., 0]
        return -(own * weights[:, 1:]).sum()

    got, want = (jax.value_and_grad(loss, (0, 1))(hidden, kernel) for loss in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("cap", [None, 0.7])
def test_the_z_loss_is_added_with_its_gradient(cap):
    hidden, kernel, tokens, weights = _inputs()

    def ours(h, k):
        return language_loss(h, k, tokens, weights, chunk=4, softcap=cap, z_loss=0.1)[0]

    def plain(h, k):
        logits = h[:, :-1] @ k
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        own = jnp.take_along_axis(logits, jnp.asarray(tokens)[:, 1:, None], 2)[..., 0]
        return ((log_z - own + 0.1 * log_z**2) * weights[:, 1:]).sum()

    got, want = (jax.value_and_grad(loss, (0, 1))(hidden, kernel) for loss in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_the_loss_of_a_picture_tokenizer(distance):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    pixels, made, latents, vectors = draw(2, 4, 4, 3), draw(2, 4, 4, 3), draw(2, 2, 2, 5), draw(2, 2, 2, 5)

    def loss(made, latents, vectors):
        read = Reading(latents, vectors, jnp.zeros((2, 4), jnp.int32), made)
        return tokenizer_loss(pixels, read, distance=distance, commitment=0.3, codebook=0.7)

    total, count, sums = loss(made, latents, vectors)
    half = tokenizer_loss(pixels, Reading(latents, vectors, None, made), np.asarray([True, False]), distance=distance)
    one = tokenizer_loss(pixels[:1], Reading(latents[:1], vectors[:1], None, made[:1]), distance=distance)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), half, one)
    away = np.asarray(made - pixels)
    wanted = np.abs(away) if distance == "l1" else away**2
    apart = np.asarray(vectors - latents)
    np.testing.assert_allclose(sums["reconstruction"], 2 * wanted.mean(), rtol=1e-6)
    np.testing.assert_allclose(total, 2 * (wanted.mean() + (apart**2).mean()), rtol=1e-6)
    assert count == 2
    slopes = jax.grad(lambda *x: loss(*x)[0], (1, 2))(made, latents, vectors)
    for slope, share, sign in zip(slopes, (0.3, 0.7), (-1, 1)):
        np.testing.assert_allclose(slope, sign * share * 2 * apart / 20, rtol=1e-5, atol=1e-7)


def test_bfloat16_hidden_accumulates_in_float32():
    hidden, kernel, tokens, weights = _inputs(jnp.bfloat16)
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    loss, grads = jax.value_and_grad(lambda h, k: language_loss(h, k, tokens, weights, chunk=4)[0], (0, 1))(
        hidden, kernel
    )
    want, slopes = jax.value_and_grad(lambda h, k: _plain(h, k, tokens, weights)[0], (0, 1))(
        hidden.astype(jnp.float32), rounded
    )
    assert grads[0].dtype == jnp.bfloat16
    assert grads[1].dtype == jnp.float32
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    for got, exact in zip(grads, slopes):
        assert float(jnp.abs(got.astype(jnp.float32) - exact).max()) < 2**-7 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("skip", [True, False])
def test_no_label_at_all_gives_zero_and_finite_gradients(skip):
    hidden, kernel, tokens, _ = _inputs()
    hidden = hidden.at[0].set(jnp.inf)  # padding may hold anything
    weights = np.zeros((B, T), np.float32)
    sums, grads = jax.value_and_grad(
        lambda h, k: (lambda s: (s[0], s))(language_loss(h, k, tokens, weights, skip_unlabelled=skip)), (0, 1), True
    )(jnp.where(jnp.isfinite(hidden), hidden, 1e9), kernel)
    assert [float(x) for x in sums[1]] == [0, 0, 0]
    assert all(float(jnp.abs(g).max()) == 0 for g in grads)


def test_frozen_head_has_no_gradient_product():
    hidden, kernel, tokens, weights = _inputs()

    def flops(trained):
        def loss(h, k):
            # chunks at T so that the loop runs once whichever way XLA counts its body
            return language_loss(h, k, tokens, weights, chunk=T, skip_unlabelled=False, head_trained=trained)[0]

        return jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel).compile().cost_analysis()["flops"]

    assert flops(True) - flops(False) > 1.8 * B * T * D * V
    frozen = jax.grad(lambda k: language_loss(hidden, k, tokens, weights, head_trained=False)[0])(kernel)
    assert float(jnp.abs(frozen).max()) == 0


def test_never_holds_all_logits():
    """The largest array of the compiled program is a chunk of logits, not B x T x V."""
    rows, length, width, words = 2, 512, 8, 1000
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, length, width), (width, words))]
    tokens = np.zeros((rows, length), np.int32)
    weights = np.ones((rows, length), np.float32)

    def loss(h, k):
        return language_loss(h, k, tokens, weights, chunk=32)[0]

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * length * words * 4 / 2


def test_unlabelled_positions_are_skipped():
    """A row of 64 chunks with labels in one: the loop runs once (a labelled NaN elsewhere would be seen)."""
    hidden, kernel, tokens, _ = _inputs()
    weights = np.zeros((B, T), np.float32)
    weights[:, [5, 17]] = 1
    poisoned = hidden.at[:, 0:3].set(jnp.nan)  # never gathered: two labels a row, chunks of two
    loss, _, _ = language_loss(poisoned, kernel, tokens, weights, chunk=2)
    assert np.isfinite(loss)


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_contrastive_with_distinct_captions_is_clip_loss():
    image, text = _normal(6, D), _normal(6, D, seed=1)
    a, b = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    logits = 10 * a @ b.T
    want = -(jnp.diag(jax.nn.log_softmax(logits, 1)).mean() + jnp.diag(jax.nn.log_softmax(logits, 0)).mean()) / 2
    loss, weight, _ = contrastive_loss(image, text, 10.0)
    np.testing.assert_allclose(loss / weight, want, rtol=1e-5)
    np.testing.assert_allclose(contrastive_loss(image, text, 10.0, np.arange(6))[0], loss, rtol=1e-6)


def test_equal_captions_share_the_target():
    """With equal captions of equal text, a perfect model reaches the entropy of the shared target, no less."""
    ids = np.array([0, 0, 1, 1], np.int32)
    features = jnp.eye(4)[ids]
    loss, weight, correct = contrastive_loss(features, features, 1000.0, ids)
    np.testing.assert_allclose(loss / weight, np.log(2), rtol=1e-5)
    assert float(correct) == 4
    plain, _, _ = contrastive_loss(features, features, 1000.0, ids[:, None] == ids[None])
    np.testing.assert_allclose(plain, loss)


def test_sigmoid_loss_is_siglips():
    image, text = _normal(5, D), _normal(5, D, seed=1)
    a, b = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    logits = 10 * a @ b.T - 10
    sign = 2 * np.eye(5) - 1
    want = -jax.nn.log_sigmoid(sign * logits).sum(1).mean()
    loss, weight, _ = sigmoid_loss(image, text, 10.0, -10.0)
    np.testing.assert_allclose(loss / weight, want, rtol=1e-5)


def test_zero_features_have_finite_gradients():
    grad = jax.grad(lambda x: contrastive_loss(x, x, 10.0)[0])(jnp.zeros((3, D)))
    assert bool(jnp.isfinite(grad).all())


def test_head_gradient_is_summed_over_shards_once():
    """On eight data shards no collective of the head's size stands inside the loop over chunks."""
    rows, length, width, words = 8, 64, 8, 24
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cut, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("data",), ()))
    random = np.random.default_rng(0)
    hidden = jax.device_put(random.normal(size=(rows, length, width)).astype(np.float32), cut)
    kernel = jax.device_put(random.normal(size=(width, words)).astype(np.float32), whole)
    tokens = jax.device_put(random.integers(0, words, (rows, length)).astype(np.int32), cut)
    weights = jax.device_put(np.ones((rows, length), np.float32), cut)

    def compiled(shards):
        def loss(h, k, t, w):
            return language_loss(h, k, t, w, chunk=16, shards=shards)[0]

        return jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel, tokens, weights).compile()

    def inside(program):
        blocks = [block for block in program.as_text().split("\n\n") if "ENTRY" not in block]
        return len(re.findall(rf"f32\[(1,)?{width},{words}\]\S* all-reduce\(", "\n".join(blocks)))

    once, often = compiled(8), compiled(1)
    assert inside(once) == 0 < inside(often)
    for a, b in zip(once(hidden, kernel, tokens, weights), often(hidden, kernel, tokens, weights)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "loss", [lambda *a, **k: contrastive_loss(*a, 10.0, **k), lambda *a, **k: sigmoid_loss(*a, 10.0, -3.0, **k)]
)
def test_rows_that_only_fill_up_the_batch_are_in_no_loss(loss):
    keys = jax.random.split(jax.random.key(0))
    image, text = (jax.random.normal(key, (6, 8)) for key in keys)
    same, real = jnp.array([0, 1, 0, 2, 9, 9]), jnp.array([True] * 4 + [False] * 2)
    plain = lambda image, text: loss(image[:4], text[:4], same=same[:4])  # noqa: E731
    filled = lambda image, text: loss(image, text, same=same, real=real)  # noqa: E731
    for a, b in zip(filled(image, text), plain(image, text)):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    grads = [jax.grad(lambda i, f=f: f(i, text)[0])(image) for f in (filled, plain)]
    np.testing.assert_allclose(*grads, rtol=1e-5, atol=1e-6)
    assert float(abs(grads[0][4:]).max()) == 0
