"""A unified token model from nothing: its tokenizer, then text and pictures in one loss; it says and draws both."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from lvlm_jax import params as P
from lvlm_jax.data.collate import collate
from lvlm_jax.infer.interleaved import InterleavedSystem
from lvlm_jax.models.lvlm import dummy_batch
from lvlm_jax.models.unified import Unified, UnifiedConfig
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.interleaved import interleave
from lvlm_jax.processing.schema import Image, Text
from lvlm_jax.train.step import init_state, make_train_step
from lvlm_jax.train.unified import started_codebook, token_loss, tokenizer_loss
from lvlm_jax.vision.vq import VQ
from tests import tiny
from tests.infer.tiny import tiny_system

SPEC = ImageSpec(size=8, patch=4, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40), "black": (0, 0, 0)}
CONFIG = UnifiedConfig(
    vision=tiny.VQ,
    llm=dataclasses.replace(tiny.UNIFIED["swin"].llm, vocab=512, context=64),
    code_ids=tuple(range(450, 474)),
    begin_id=440,
    end_id=441,
    image_id=442,
)


def drawings():
    """Two colours a picture, side by side or one above the other."""
    out = {}
    for left, a in COLOURS.items():
        for right, b in COLOURS.items():
            if left < right:
                picture = np.zeros((8, 8, 3), np.uint8)
                picture[:, :4], picture[:, 4:] = a, b
                out[f"{left} {right}"] = picture
    return out


def fresh(model):
    """Initial weights, drawn on the host: to compile the initializers takes longer than to train."""
    rng, out = np.random.default_rng(0), {}
    for path, leaf in P.flatten(abstract(model, dummy_batch(CONFIG))[0]).items():
        name = path.split("/")[-1]
        spread = {"kernel": np.prod(leaf.shape[:-1]) ** -0.5, "table": 0.02}.get(name, 0.0)
        out[path] = (spread * rng.normal(size=leaf.shape) + (name == "scale")).astype(np.float32)
    return P.unflatten(out)


def train(loss, params, trains, batch, steps, rate):
    """(parameters, loss of each step)"""
    trained, frozen = P.split(params, P.mask(params, trains))
    tx = optax.adam(optax.linear_schedule(rate, 0.0, steps))
    step, state, seen = make_train_step(loss, tx), init_state(trained, tx), []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        seen.append(float(metrics["loss"]))
    return P.merge(state.trained, frozen), seen


def batch_of(rows):
    return collate(
        [[row] for row in rows],
        length=max(len(row.tokens) for row in rows),
        groups=1,
        vision_rows=len(rows),
        visual_tokens=4,
        pad_id=0,
        spec=SPEC,
    )


@pytest.mark.nightly
def test_it_says_and_draws_what_it_saw():
    tokenizer, shown = tiny_system().tokenizer, drawings()
    words = {"begin_id": 440, "end_id": 441, "image_id": 442, "count": 4}
    rows = []
    for name, picture in shown.items():
        for parts in ([Text(name), Image(picture)], [Image(picture), Text(name)]):
            rows.append(interleave(parts, tokenizer, **words))
    batch = jax.device_put(batch_of(rows))
    model = Unified(CONFIG)
    params = fresh(model)

    tokenizer_model = VQ(CONFIG.vision)
    started = started_codebook(tokenizer_model, params["vision"], batch, jax.random.key(1))
    vision, fell = train(tokenizer_loss(tokenizer_model), started, ("**",), batch, 150, 3e-3)
    assert fell[-1] < 0.15 * fell[0]
    params = {**params, "vision": vision}
    params, fell = train(token_loss(model), params, ("llm/**",), batch, 150, 5e-3)
    assert fell[-1] < 0.15 * fell[0]
    jax.tree.map(np.testing.assert_array_equal, params["vision"], vision)

    system = InterleavedSystem(model=model, params=params, tokenizer=tokenizer, spec=SPEC)
    # From a name the picture, from a picture the name.
    drawn = [parts[0] for parts in system.generate_batch(list(shown), picture=True)]
    away = np.abs(np.stack(drawn)[:, None].astype(float) - np.stack(list(shown.values()))).mean((2, 3, 4))
    assert away.argmin(1).tolist() == list(range(len(shown)))
    assert away.diagonal().max() < 25  # of 255
    said = system.generate_batch([[picture] for picture in shown.values()])
    assert [parts[0].strip() for parts in said] == list(shown)
