"""Answers of text and pictures: which tokens may come where, whole pictures, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from lvlm_jax.data.collate import collate
from lvlm_jax.infer.grammar import PictureGrammar, Writing, grammar_of
from lvlm_jax.infer.interleaved import InterleavedSystem, to_uint8
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.models.unified import Unified, UnifiedConfig
from lvlm_jax.processing.image import ImageSpec, preprocess
from lvlm_jax.processing.interleaved import interleave
from lvlm_jax.processing.schema import Encoded, Image, Text
from tests import tiny
from tests.infer.tiny import tiny_system

SPEC = ImageSpec(size=8, patch=4, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
GRAMMAR = PictureGrammar(code_ids=(5, 6), begin_id=2, end_id=3, image_id=4, count=3)


def test_what_may_come_next():
    """Text, text near the end, a picture under way, its end."""
    allowed = lambda due, left: [  # noqa: E731
        np.flatnonzero(row).tolist() for row in GRAMMAR.allowed(Writing(jnp.asarray(due), jnp.int32(left)), 9)
    ]
    assert allowed([0, 4, 2, 1], 5) == [[0, 1, 2, 7, 8], [5, 6], [5, 6], [3]]
    assert allowed([0, 3], 4) == [[0, 1, 7, 8], [5, 6]]  # no whole picture fits any more
    mute = dataclasses.replace(GRAMMAR, pictures=False)
    assert np.flatnonzero(mute.allowed(Writing(jnp.zeros(1, int), jnp.int32(99)), 9)[0]).tolist() == [0, 1, 7, 8]


def test_where_a_row_stands():
    rows = np.asarray([[0, 2, 5, 6, 5, 3, 7], [0, 0, 1, 7, 7, 7, 2], [0, 1, 7, 2, 5, 6, 5], [2, 1, 1, 1, 1, 1, 7]])
    shown = np.asarray([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1] * 7, [0] + [1] * 6])
    start = GRAMMAR.start(rows, shown, jnp.int32(9))
    assert start.due.tolist() == [0, 4, 1, 0]
    after = GRAMMAR.after(start, jnp.asarray([2, 5, 3, 8]))
    assert (after.due.tolist(), int(after.left)) == ([4, 3, 0, 0], 8)


@functools.cache
def system(**changes):
    tokenizer = tiny_system().tokenizer
    config = UnifiedConfig(
        vision=dataclasses.replace(tiny.VQ, codes=48),
        llm=dataclasses.replace(tiny.UNIFIED["pre"].llm, vocab=512, context=96),
        code_ids=tuple(511 - i for i in range(48)),
        begin_id=440,
        end_id=441,
        image_id=442,
        **changes,
    )
    params = jax.tree.map(jnp.asarray, tiny.weights(config))
    kernel = params["llm"]["head"]["kernel"]
    params["llm"]["head"]["kernel"] = kernel.at[:, 440].mul(3.0)  # it likes to begin a picture
    return InterleavedSystem(model=Unified(config), params=params, tokenizer=tokenizer, spec=SPEC)


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@functools.partial(jax.jit, static_argnames="model")
def scores(model, params, batch, last):
    hidden, _ = model.apply({"params": params}, batch)
    return model.apply({"params": params}, hidden[0, last], method="logits")


def by_full_passes(system, prompt, count):
    """Greedy tokens by whole passes and plain Python: what may come is written out as a rule on the list so far."""
    c, out = system.config, []
    text = np.setdiff1d(np.arange(512), [*c.code_ids, c.begin_id, c.end_id, c.image_id])
    for left in range(count, 0, -1):
        tokens = np.concatenate([prompt.tokens, out]).astype(np.int32)
        begun = max((i for i, token in enumerate(tokens) if token == c.begin_id), default=None)
        since = None if begun is None else len(tokens) - 1 - begun
        if since is not None and since < 4:
            may = c.code_ids
        elif since == 4:
            may = [c.end_id]
        else:
            may = [*text, *([c.begin_id] if left >= 6 else [])]
        visual = np.concatenate([prompt.visual, np.full(len(out), -1)]).astype(np.int32)
        longer = Encoded(tokens, np.zeros(len(tokens), np.float32), visual, prompt.images)
        batch = collate([[longer]], length=64, groups=1, vision_rows=1, visual_tokens=4, pad_id=0, spec=SPEC)
        found = np.asarray(scores(system.model, system.params, batch, len(tokens) - 1))
        out.append(int(max(may, key=lambda token: found[token])))
    return out


@pytest.mark.slow
def test_cached_batched_answers_equal_full_passes():
    """Prompts of several lengths, with a picture, without one, and with one begun."""
    one = system()
    plain = [one.encode(["dogs ", picture(), " What is it?"]), one.encode("What is it?")]
    for prompts in (plain, [one.encode("What is it?", picture=True)]):
        one.generator.eos_ids = frozenset()
        answers = one.generator.generate(prompts, max_new_tokens=14)
        expected = [by_full_passes(one, prompt, 14) for prompt in prompts]
        assert [list(answer.tokens) for answer in answers] == expected
        assert any(one.config.begin_id in tokens for tokens in expected) or len(prompts) == 1


@pytest.mark.nightly
def test_answers_are_texts_and_whole_pictures():
    one = system()
    c = one.config
    written = one.generate_batch(
        ["dogs", "What is it?"], picture=True, max_new_tokens=25, sampling=Sampling(temperature=2.0, seed=3)
    )
    assert all(parts[0].shape == (8, 8, 3) and parts[0].dtype == np.uint8 for parts in written)
    assert not np.array_equal(written[0][0], written[1][0])
    tokens = [7, 8, c.begin_id, *c.code_ids[:4], c.end_id, 9, c.begin_id, *c.code_ids[4:8], c.end_id]
    first, drawn, second, other = one.split(tokens)
    assert (first, second) == (one.tokenizer.decode([7, 8]), one.tokenizer.decode([9]))
    pixels = one.model.apply(
        {"params": one.params}, jnp.arange(8).reshape(2, 4), method=lambda m, x: m.vision.decode(x)
    )
    np.testing.assert_array_equal([drawn, other], to_uint8(np.asarray(pixels), SPEC))


def test_prepared_pixels_come_back():
    pixels = preprocess(PIL.Image.fromarray(picture()), SPEC)
    np.testing.assert_array_equal(to_uint8(pixels[None], SPEC)[0], picture())


def test_a_run_of_text_and_pictures():
    tokenizer = tiny_system().tokenizer
    ids = {"count": 2, "begin_id": 440, "end_id": 441, "image_id": 442}
    words = tokenizer.encode_text("dogs")[0].tolist()
    run = interleave([Text("dogs"), Image(picture()), Image(picture(1))], tokenizer, **ids)
    shown = [440, 442, 442, 441]
    assert run.tokens.tolist() == [tokenizer.bos_id, *words, *shown, *shown, tokenizer.eos_id]
    assert run.visual[run.visual >= 0].tolist() == [0, 1, 2, 3]
    assert (run.tokens[run.visual >= 0] == 442).all()
    assert (run.weights == 1).all()
    opened = interleave([Text("dogs")], tokenizer, **ids, ended=False, open_picture=True)
    assert opened.tokens.tolist() == [tokenizer.bos_id, *words, 440]
    with pytest.raises(ValueError, match="begins a picture that ended=True cuts off"):
        interleave([Text("dogs")], tokenizer, **ids, open_picture=True)


def test_what_cannot_be_written():
    with pytest.raises(ValueError, match="max_new_tokens=3 holds no whole picture, which takes 5 tokens"):
        system().generate("dogs", picture=True, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"never predicts picture tokens \(text_only=True"):
        grammar_of(dataclasses.replace(tiny.UNIFIED["pre"], text_only=True))
    with pytest.raises(ValueError, match="pictures come in 4 patches of 12 values"):
        dataclasses.replace(system(), spec=dataclasses.replace(SPEC, size=4, patch=2))
