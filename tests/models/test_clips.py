"""A model that reads clips: cached decoding, what each token depends on, pictures that stand still, wrong numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as M
from lvlm_jax import params as P
from lvlm_jax.data.collate import collate
from lvlm_jax.infer.system import System
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import encode
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.schema import Example, Image, Text, Turn, Video
from lvlm_jax.processing.tokenizer import Tokenizer
from tests import tiny
from tests.models.test_lvlm import TOLERANCE, logits, loss, prefill, split_at, step, system
from tests.tokenizers_tiny import llama_tiny

I = tiny.IMAGE
CONFIG = tiny.SYSTEMS["videochat"]
CLIP = [I] * CONFIG.vision.frames
SPEC = ImageSpec(size=28, patch=7, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
SHOWN = VideoSpec(sampler="videochat", frames=2, sentence="videochat", stills=True)


@pytest.mark.slow
def test_prefill_and_decode_equal_the_full_pass():
    model, params = system("videochat")
    batch, _ = tiny.batch(CONFIG, [[3, *CLIP, 9], [9], [2, *CLIP, 1, *CLIP, 8]], pad="left")
    full = np.asarray(logits(model, params, batch))
    length, shown = batch.tokens.shape[1], batch.segments > 0
    start, at = jnp.asarray((~shown).sum(1), jnp.int32), batch.tokens.shape[1] - 4
    got, cache = prefill(model, params, split_at(batch, at), length)
    tiny.close(np.asarray(got)[shown[:, :at]], full[:, :at][shown[:, :at]], full)
    for i in range(at, length):
        new = slice(i, i + 1)
        tokens, positions = jnp.asarray(batch.tokens[:, new]), jnp.asarray(batch.positions[:, new])
        got, cache = step(model, params, tokens, positions, start, cache, jnp.int32(i))
        tiny.close(got, full[:, new], full)


@pytest.mark.slow
def test_a_frame_moves_its_own_clip_and_no_other():
    model, params = system("videochat")
    params = jax.tree.map(jnp.asarray, params)
    batch = jax.tree.map(jnp.asarray, tiny.batch(CONFIG, [[2, *CLIP, 1, *CLIP, 8]])[0])
    images = lambda b: model.apply(  # noqa: E731
        {"params": params}, b.patches, b.patch_positions, b.patch_segments, method="embed_images"
    )
    run, other = tiny.jit(images), batch.patches.at[0, 1].add(1.0)  # the first clip's second frame
    moved = np.abs(np.asarray(run(batch)) - np.asarray(run(batch.replace(patches=other)))).max(-1)[0]
    made = CONFIG.visual_tokens * CONFIG.vision.frames
    assert (moved[:made] > 0).all()
    assert (moved[made:] == 0).all()


@pytest.mark.slow
def test_a_clip_is_asked_once():
    """A Q-Former that reads the question, VideoChat2's of the third stage: beside the frames of a clip together."""
    config = tiny.SYSTEMS["videochat2"]
    config = dataclasses.replace(config, connector=dataclasses.replace(config.connector, vocab=99))
    model, params = LVLM(config), tiny.weights(config)
    batch = jax.tree.map(jnp.asarray, tiny.batch(config, [[2, *CLIP, 1, *CLIP, 8]])[0])
    run = tiny.jit(
        lambda b: model.apply(
            {"params": params}, b.patches, b.patch_positions, b.patch_segments, b.instruction, method="embed_images"
        )
    )
    second = config.vision.frames  # the first vision row of the second clip
    other = batch.replace(instruction=batch.instruction.at[0, second, 0].set(0))
    moved = np.abs(np.asarray(run(batch)) - np.asarray(run(other))).max(-1)[0]
    made = config.visual_tokens * config.vision.frames
    assert (moved[:made] == 0).all()
    assert (moved[made:] > 0).all()


@pytest.mark.nightly
def test_sharded_equals_unsharded():
    """Loss and gradients on 8 devices; scanned, as a pod runs it, clips whole on their shard."""
    model, mesh = LVLM(CONFIG, scan=True), M.make_mesh("FSDP_TP")
    rows = [[3, *CLIP, 4], [2, *CLIP, 5]] * 4
    batch = jax.tree.map(jnp.asarray, tiny.batch(CONFIG, rows, groups=8)[0])
    plain, params = system("videochat")
    expected = tiny.jit(jax.value_and_grad(loss), static_argnums=1)(params, plain, batch)
    shapes, axes = abstract(model, dummy_batch(CONFIG))
    cut = M.shardings(mesh, axes, shapes)
    sharded = tiny.jit(jax.value_and_grad(loss), static_argnums=1, out_shardings=(None, cut))
    with M.use(mesh):
        stacked = jax.device_put(P.stack_layers(params), cut)
        value, grads = sharded(stacked, model, jax.device_put(batch, M.batch_sharding(mesh)))
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=TOLERANCE * largest)  # noqa: E731
    jax.tree.map(close, P.unstack_layers(grads), expected[1])


def shown(*segments):
    turns = (Turn("user", (*segments, Text("what?"))), Turn("assistant", (Text("a cat"),)))
    tokenizer = Tokenizer(llama_tiny())
    q = CONFIG.visual_tokens
    return encode(Example(turns), TEMPLATES["videochat_instruct"], tokenizer, q, 480, spec=SPEC, video=SHOWN)


def test_a_picture_stands_still():
    pixels = np.random.default_rng(0).integers(0, 255, (5, 30, 30, 3), np.uint8)
    both = shown(Image(pixels[0]), Video(pixels, fps=2.0))
    assert both.rows == (2, 2)
    assert both.sizes == (2 * CONFIG.visual_tokens,) * 2
    assert both.visual[both.visual >= 0].tolist() == list(range(4 * CONFIG.visual_tokens))
    batch = collate(
        [[both]], length=256, groups=1, vision_rows=4, visual_tokens=CONFIG.visual_tokens, pad_id=0, spec=SPEC
    )
    np.testing.assert_array_equal(batch.patches[0, 0], batch.patches[0, 1])
    assert (batch.patches[0, 2] != batch.patches[0, 3]).any()
    assert batch.patch_segments.all()


@pytest.mark.slow
def test_a_system_sees_pictures_as_clips():
    """Three of them run in the program of four."""
    tokenizer = Tokenizer(llama_tiny())
    config = dataclasses.replace(CONFIG, llm=dataclasses.replace(CONFIG.llm, vocab=512))
    asked = System(
        model=LVLM(config),
        params=tiny.weights(config),
        tokenizer=tokenizer,
        spec=SPEC,
        template=TEMPLATES["videochat_instruct"],
        image_token_id=tokenizer.special_id("<image>"),
        video=SHOWN,
    )
    pixels = list(np.random.default_rng(0).integers(0, 255, (3, 30, 30, 3), np.uint8))
    seen = asked.embed_images(pixels)
    assert seen.shape == (3, CONFIG.vision.frames * CONFIG.visual_tokens, 32)
    np.testing.assert_allclose(asked.embed_images(pixels[2])[0], seen[2], atol=1e-5)
    assert isinstance(asked.generate("what?", images=pixels, max_new_tokens=2), str)


def test_numbers_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"8 visual tokens of a clip do not divide among its frames=3 vision rows"):
        dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, frames=3))
    with pytest.raises(ValueError, match=r"video: frames=8, sampler='uniform', stills=False.* reads frames=2 as one"):
        VideoSpec().check_reads(2)
    SHOWN.check_reads(2)
    for own in ({"pool": "bilinear"}, {"newline": "frame"}):
        with pytest.raises(ValueError, match=r"video.pool=.*own resolution .* neither pooled nor ended by a newline"):
            VideoSpec(**own).check_reads(1, native=True)
    _, params = system("videochat")
    batch = jax.tree.map(jnp.asarray, tiny.batch(CONFIG, [[2, I, 3]])[0])
    with pytest.raises(ValueError, match=r"1 vision rows are no whole clips of frames=2"):
        jax.eval_shape(lambda p: LVLM(CONFIG).apply({"params": p}, batch), params)
    for change, message in (
        ({"global_blocks": 9}, "global_blocks=9: .*depth=3 blocks"),
        ({"joint": True}, "joint=True reads patches alone, here class_token=True"),
        ({"class_feature": False}, "a clip's frames are read whole, here class_feature=False"),
        ({"frames": 0}, "frames=0: a clip has at least one frame"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG.vision, **change)
