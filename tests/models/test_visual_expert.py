"""The visual expert: what it computes and what it leaves alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import params as P
from lvlm_jax.fusion import visual_expert
from lvlm_jax.models.lvlm import LVLM
from tests import tiny

CONFIG = tiny.SYSTEMS["visual_expert"]
Q = CONFIG.visual_tokens
I = tiny.IMAGE


@functools.cache
def weights():
    return tiny.weights(CONFIG)


@functools.partial(tiny.jit, static_argnames="model")
def logits(model, params, batch):
    return model.apply({"params": params}, batch, method=tiny.logits)


def without(params, part):
    """The same weights with those of one part moved."""
    return P.unflatten({path: leaf + 0.5 if part in path else leaf for path, leaf in P.flatten(params).items()})


@pytest.mark.slow
def test_text_alone_is_the_plain_decoder_bit_for_bit():
    plain = LVLM(dataclasses.replace(CONFIG, expert=False))
    batch, _ = tiny.batch(CONFIG, [[9], [5, 7], [12]])
    assert batch.patches.shape[1] == 0
    batch = jax.tree.map(jnp.asarray, batch)
    flat = {path: leaf for path, leaf in P.flatten(weights()).items() if "expert" not in path and "ends" not in path}
    expected, got = logits(plain, P.unflatten(flat), batch), logits(LVLM(CONFIG), weights(), batch)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_each_position_is_computed_by_its_expert_alone():
    """With one layer, a weight behind attention moves the positions of its own kind and no other."""
    one = dataclasses.replace(CONFIG, llm=dataclasses.replace(CONFIG.llm, depth=1))
    model, params = LVLM(one), tiny.weights(one)
    batch, _ = tiny.batch(one, [[3, I, 4], [2, I, 1, I, 5], [9], [I, 2]], groups=2)
    base = np.asarray(logits(model, params, batch))
    place = np.where(batch.image_index < 0, -1, batch.image_index % Q)
    visual = (place >= 0) & (place < Q - 1)
    for part, mine in (("expert_mlp", visual), ("expert_attn/o", visual), ("mlp", ~visual), ("attn/o", ~visual)):
        moved = np.abs(np.asarray(logits(model, without(params, f"llm/layers/0/{part}"), batch)) - base).max(-1)
        np.testing.assert_array_equal((moved > 1e-6)[batch.segments > 0], mine[batch.segments > 0], err_msg=part)


def test_pictures_hold_one_position_and_packed_examples_begin_anew():
    # Two examples packed in one row: 2 texts, a picture, 1 text, a picture, 3 texts; then 1 text, a picture, 2 texts.
    q = 6
    kinds = [None] * 2 + [*range(q)] + [None] + [*range(q)] + [None] * 3, [None] + [*range(q)] + [None] * 2
    index, positions, expected, picture = [], [], [], 0
    for example in kinds:
        place = -1
        for number, kind in enumerate(example):
            positions.append(number)
            index.append(-1 if kind is None else picture * q + kind)
            picture += kind == q - 1
            place += 0 if kind is not None and 1 < kind < q - 1 else 1
            expected.append(place)
    row = lambda values: jnp.asarray([values, values], jnp.int32)  # noqa: E731
    behind = tiny.jit(visual_expert.skipped, static_argnums=2)(row(positions), row(index), q)
    np.testing.assert_array_equal(row(positions) - behind, [expected, expected])


def test_routing_is_its_own_inverse_and_leaves_ends_to_the_text():
    batch, _ = tiny.batch(CONFIG, [[3, I, 4], [2, I, 1, I, 5], [9], [I, 2]], groups=2)
    x = np.random.default_rng(0).normal(size=(*batch.tokens.shape, 5)).astype(np.float32)
    visual = (batch.image_index >= 0) & (batch.image_index % Q != Q - 1)

    @tiny.jit
    def there_and_back(index, x):
        found = visual_expert.routing(index, 2, batch.patches.shape[1], Q)
        return found, found.overlay(jnp.zeros_like(x), found.gather(x))

    found, back = there_and_back(batch.image_index, x)
    np.testing.assert_array_equal(back, np.where(visual[..., None], x, 0))
    assert visual_expert.routing(jnp.asarray(batch.image_index), 2, 0, Q) is None
    flat = np.asarray(batch.image_index).reshape(2, -1)
    for group, places in enumerate(np.asarray(found.places)):
        for token, place in enumerate(places):
            assert place == flat.shape[1] or flat[group, place] == token


def test_what_cannot_stand_beside_it():
    with pytest.raises(ValueError, match=r"this decoder differs in .*qk_norm"):
        dataclasses.replace(CONFIG, llm=tiny.QWEN3)
    with pytest.raises(ValueError, match="expert=True with newline=False, attention='prefix'"):
        dataclasses.replace(CONFIG, attention="prefix")
    with pytest.raises(ValueError, match="kv_heads=2 of heads=4: CogVLM's files have as many of both"):
        visual_expert.rows(tiny.LLAMA)


def test_a_biased_expert_keeps_its_biases_in_the_fused_tensors():
    config = dataclasses.replace(CONFIG.llm, qkv_bias=True)
    row = next(row for row in visual_expert.rows(config) if row.theirs.endswith("vision_expert_query_key_value.bias"))
    biases = row.load(np.arange(12.0))
    assert list(biases) == [f"llm/layers/0/expert_attn/{name}/bias" for name in "qkv"]
    np.testing.assert_array_equal(biases["llm/layers/0/expert_attn/k/bias"], np.arange(4.0, 8.0))
