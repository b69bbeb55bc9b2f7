"""Gated cross-attention: who sees which picture, closed gates, packed rows, where blocks stand, what trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import params as P
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.infer.generate import Generator
from lvlm_jax.llm.decoder import Decoder
from lvlm_jax.models.lvlm import LVLM, LVLMConfig
from lvlm_jax.nn import ranges as R
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.schema import Encoded, Image
from tests import tiny

I = tiny.IMAGE
CONFIG = tiny.SYSTEMS["flamingo"]
ALL = dataclasses.replace(CONFIG, fusion=dataclasses.replace(CONFIG.fusion, scope="all"))


@functools.cache
def weights():
    return tiny.weights(CONFIG)


@functools.partial(tiny.jit, static_argnames="config")
def logits(config, params, batch):
    return LVLM(config).apply({"params": params}, batch, method=tiny.logits)


def test_where_blocks_stand():
    """A block number is that of the layer that it stands before, 6 behind the last of six."""
    spots = lambda place, every: CrossAttentionConfig(place=place, every=every).spots(6)  # noqa: E731
    assert [spots("before_first", n) for n in (1, 2, 4)] == [(0, 1, 2, 3, 4, 5), (0, 2, 4), (0, 4)]
    assert [spots("before_last", n) for n in (1, 2, 4)] == [(0, 1, 2, 3, 4, 5), (1, 3, 5), (3,)]
    assert [spots("after_first", n) for n in (1, 2, 3)] == [(1, 2, 3, 4, 5, 6), (1, 3, 5), (1, 4)]


def dense(segments, pictures, tokens, scope, keys):
    """Which keys each position sees, in plain loops."""
    seen = np.zeros((*segments.shape, keys), bool)
    for b, t in np.ndindex(*segments.shape):
        row = [s for s in range(t + 1) if segments[b, s] == segments[b, t] > 0 and pictures[b, s] >= 0]
        for s in row[-1:] if scope == "last" else row:
            seen[b, t, pictures[b, s] * tokens : (pictures[b, s] + 1) * tokens] = True
    return seen


@pytest.mark.parametrize("scope", ["last", "all"])
def test_ranges_are_the_dense_mask(scope):
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    pictures = np.array([[-1, 0, -1, 1, -1, -1, 2, 3, -1, -1, -1, -1], [-1, -1, -1, 4, -1, -1, -1, -1, 5, -1, 6, -1]])
    expected = dense(segments, pictures, 3, scope, 21)
    got = R.media(jnp.asarray(segments), jnp.asarray(pictures), 3, scope)
    np.testing.assert_array_equal(got.dense(21), expected)
    assert not expected[0, [0, 5, 9, 10, 11]].any()
    assert (expected.sum(-1) > 3).any() == (scope == "all")


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_closed_gates_are_the_language_model_alone(scan):
    """Bit by bit: what stands in ``llm`` is a decoder's own tree, and nothing else is added to it."""
    closed = {
        path: np.zeros_like(leaf) if path.endswith("_gate") else leaf for path, leaf in P.flatten(weights()).items()
    }
    params = P.unflatten(closed)
    batch, _ = tiny.batch(CONFIG, [[3, I, 4, I, 2], [9]])
    run = (P.stack_layers if scan else dict)(params)
    decoder, model = Decoder(CONFIG.llm, scan=scan), LVLM(CONFIG, scan=scan)

    @tiny.jit
    def text(params, batch):
        x = decoder.apply({"params": params}, batch.tokens, method="embed_tokens")
        return decoder.apply({"params": params}, x, batch.positions, R.packed_causal(batch.segments))[0]

    whole = tiny.jit(lambda params, batch: model.apply({"params": params}, batch)[0])
    np.testing.assert_array_equal(whole(run, batch), text(run["llm"], batch))
    opened = {**params, "fusion": weights()["fusion"]}
    assert not np.array_equal(whole((P.stack_layers if scan else dict)(opened), batch), whole(run, batch))


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, pytest.param(ALL, marks=pytest.mark.nightly)], ids=["last", "all"])
def test_a_picture_moves_what_follows_it(config):
    batch, _ = tiny.batch(config, [[2, I, 3, I, 4], [5, I, 1]])
    base = np.asarray(logits(config, weights(), batch))
    for picture, row, at in ((0, 0, 2), (1, 0, 6), (2, 1, 5)):
        patches = batch.patches.copy()
        patches[0, picture] += 1.0
        moved = np.abs(np.asarray(logits(config, weights(), batch.replace(patches=patches))) - base).max(-1) > 1e-6
        # Later tokens read those that saw it, so that all that follows moves, and nothing before or beside.
        expected = np.zeros_like(moved)
        expected[row, at:] = batch.segments[row, at:] > 0
        np.testing.assert_array_equal(moved, expected)


@pytest.mark.slow
def test_the_last_picture_alone_is_seen_and_all_are():
    """A model of one block behind every layer: no token reads another that has seen a picture."""
    llm = dataclasses.replace(CONFIG.llm, depth=1)
    batch, _ = tiny.batch(CONFIG, [[2, I, 3, I, 4]])
    patches = batch.patches.copy()
    patches[0, 0] += 1.0
    for scope, stop in (("last", 6), ("all", 11)):
        fusion = dataclasses.replace(CONFIG.fusion, scope=scope, every=1, place="after_first")
        config = dataclasses.replace(CONFIG, llm=llm, fusion=fusion)
        params = {**weights(), **{part: {**weights()[part], "layers": {"0": weights()[part]["layers"]["0"]}}
                                  for part in ("llm", "fusion")}}  # fmt: skip
        base, other = (np.asarray(logits(config, params, b)) for b in (batch, batch.replace(patches=patches)))
        moved = np.abs(base - other).max(-1)[0] > 1e-6
        assert np.flatnonzero(moved).tolist() == list(range(2, stop))


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, pytest.param(ALL, marks=pytest.mark.nightly)], ids=["last", "all"])
def test_packed_examples_equal_examples_alone(config):
    parts = [tiny.batch(config, [row], seed=seed)[0] for seed, row in enumerate(([3, I, 4], [5, I, 2], [5]))]
    join = lambda name: np.concatenate([getattr(part, name) for part in parts], axis=1)  # noqa: E731
    firsts = np.cumsum([0, *(part.patches.shape[1] for part in parts)])
    both = parts[0].replace(
        **{name: join(name) for name in ("tokens", "weights", "positions", "patches", "patch_positions")},
        patch_segments=join("patch_segments"),
        segments=np.concatenate([part.segments * (i + 1) for i, part in enumerate(parts)], 1),
        image_index=np.concatenate(
            [np.where(part.image_index < 0, -1, part.image_index + firsts[i]) for i, part in enumerate(parts)], 1
        ),
    )
    packed = np.asarray(logits(config, weights(), both))[0]
    alone = np.concatenate([np.asarray(logits(config, weights(), part))[0] for part in parts])
    tiny.close(packed, alone)


@pytest.mark.parametrize(("config", "rows"), [(CONFIG, [0, 0, 1]), (ALL, [0, 1, 2])], ids=["last", "all"])
def test_a_picture_shown_twice_has_one_vision_row_where_one_is_seen(config, rows):
    """Where a range of pictures is seen, it must be the prompt's own, in order, and so each shows up each time."""
    one, other = (Image(np.full((28, 28, 3), value, np.uint8)) for value in (0, 255))
    visual = np.array([-1, 0, 1, 2, -1], np.int32)
    prompt = Encoded(visual + 5, np.zeros(5, np.float32), visual, (one, one, other))
    spec = ImageSpec(size=28, patch=7, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
    batch = Generator(LVLM(config), {}, spec=spec).batch_of([prompt], rows=1)
    assert batch.image_index[0, -5:].tolist() == [-1, *rows, -1]
    for row, value in zip(rows, (-1.0, -1.0, 1.0)):
        np.testing.assert_allclose(batch.patches[0, row], value)


@pytest.mark.slow
def test_new_words_have_rows_of_their_own():
    batch, _ = tiny.batch(CONFIG, [[3, I, 4]], image_id=100)
    batch = batch.replace(tokens=np.where(np.arange(8) == 6, 99, batch.tokens))
    base = np.asarray(logits(CONFIG, weights(), batch))
    assert base.shape[-1] == CONFIG.vocab == 101
    for word, first in ((1, 3), (0, 6)):  # <image> stands at 3, word 99 at 6
        words = {**weights()["words"], "table": weights()["words"]["table"] + np.eye(2, dtype=np.float32)[:, [word]]}
        moved = np.asarray(logits(CONFIG, {**weights(), "words": words}, batch)) != base
        assert np.flatnonzero(moved.any(-1)[0]).tolist() == list(range(first, 8))
    kernel = jax.jit(lambda p: LVLM(CONFIG).apply({"params": p}, method="head_kernel"))(weights())
    np.testing.assert_array_equal(kernel[:, 99:], weights()["words"]["kernel"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": None}, r"words=2: where pictures are soft tokens, new words are rows of llm.vocab"),
        ({"newline": True}, r"newline=True with fusion"),
        ({"llm": tiny.GEMMA2}, r"words=2.*scale_embeddings=True, final_softcap=3.0.*grow llm.vocab"),
    ],
)
def test_what_does_not_go_together(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_bad_numbers_of_layers():
    with pytest.raises(ValueError, match="every=0"):
        CrossAttentionConfig(every=0)
    with pytest.raises(ValueError, match=r"activation='mish': the activations are .*squared_relu"):
        CrossAttentionConfig(activation="mish")


@pytest.mark.parametrize(
    "place", ["before_first", *(pytest.param(p, marks=pytest.mark.slow) for p in ("before_last", "after_first"))]
)
def test_layers_left_over_are_woven_in(place):
    """Three layers in groups of two, as Flamingo's 80 in groups of seven: scanned as one by one."""
    odd: LVLMConfig = dataclasses.replace(
        CONFIG,
        llm=dataclasses.replace(CONFIG.llm, depth=3),
        fusion=dataclasses.replace(CONFIG.fusion, place=place),
    )
    batch, _ = tiny.batch(odd, [[3, I, 4], [2, I, 1]])
    batch, params = jax.tree.map(jnp.asarray, batch), tiny.weights(odd)
    run = lambda scan, p: tiny.jit(  # noqa: E731
        lambda p, b: LVLM(odd, scan=scan).apply({"params": p}, b, method=tiny.logits)
    )(p, batch)
    tiny.close(run(True, P.stack_layers(params)), run(False, params))
