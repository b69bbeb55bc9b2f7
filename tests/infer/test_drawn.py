"""`lvlm generate --draw`: what a model says of places, over the picture."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from lvlm_jax import cli
from lvlm_jax import params as P
from lvlm_jax.infer.drawn import decode_masks, draw_answer
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.boxes import Box, write_boxes
from lvlm_jax.processing.masks import paste_mask
from lvlm_jax.vision import mask_codec
from lvlm_jax.vision.mask_codec import MaskCodec

CAT = Box(y0=0.25, x0=0.25, y1=0.75, x1=0.75, label="cat", codes=tuple(range(16)))
DOG = Box(y0=0.5, x0=0.0, y1=1.0, x1=0.25, label="dog")


@pytest.fixture
def picture(tmp_path):
    PIL.Image.new("RGB", (200, 100), "white").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def read(path):
    return np.asarray(PIL.Image.open(path))


def say(monkeypatch, capsys, answer, *words):
    """(status, what was printed and what went beside it) of a model that gives this answer."""
    pieces = [answer[:7], answer[7:]]
    generate = lambda prompt, stream=False, **settings: iter(pieces) if stream else answer  # noqa: E731
    monkeypatch.setattr(cli, "_load", lambda args: types.SimpleNamespace(generate=generate))
    status = cli.main(["generate", "model", "--prompt", "detect cat", *map(str, words)])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("stream", [True, False])
def test_the_command_draws_what_it_says(monkeypatch, capsys, picture, tmp_path, stream):
    text, out = write_boxes([CAT, DOG], "paligemma"), tmp_path / "out.png"
    words = [] if stream else ["--no-stream"]
    status, told, beside = say(monkeypatch, capsys, text, "--image", picture, "--draw", out, *words)
    assert (status, told, beside) == (0, f"{text}\n", f"drawn in {out}: 2 boxes\n")
    assert (read(out)[50, 48:52] != 255).any()
    assert (read(out)[30, 100] == 255).all()


def test_no_box_writes_nothing(monkeypatch, capsys, picture, tmp_path):
    for answer, broken in (("a cat", ""), ("<loc0001><loc0002> cat", " (1 broken)")):
        out = tmp_path / "none.png"
        status, told, beside = say(monkeypatch, capsys, answer, "--image", picture, "--draw", out)
        assert (status, told, beside) == (0, f"{answer}\n", f"no box in the answer{broken}; {out} is not written\n")
        assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draw", "x.png"], "--draw draws on one picture, and --image names 0; give it once"),
        (["--draw", "x.png", "--image", "a", "--image", "b"], "--image names 2"),
        (["--image", "a", "--mask-codec", "vae-oid.npz"], "--mask-codec decodes the masks that --draw FILE draws"),
    ],
)
def test_words_that_do_not_go_together(monkeypatch, capsys, words, message):
    status, _, beside = say(monkeypatch, capsys, "a", *words)
    assert status == 2
    assert message in beside


@pytest.mark.slow
def test_masks_are_decoded_and_drawn(picture, tmp_path):
    codec = MaskCodec()
    rng, shapes = np.random.default_rng(0), P.flatten(abstract(codec, jnp.zeros((1, 64, 64)))[0])
    flat = {path: 0.05 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in shapes.items()}
    np.savez(tmp_path / "vae-oid.npz", **{row.theirs: np.asarray(row.save(flat)) for row in mask_codec.rows()})
    text = write_boxes([CAT, DOG], "paligemma")
    told = draw_answer(text, str(picture), tmp_path / "out.png", tmp_path / "vae-oid.npz")
    assert told == f"drawn in {tmp_path / 'out.png'}: 2 boxes, 1 masks"
    first, second = decode_masks([CAT, DOG], tmp_path / "vae-oid.npz", 200, 100)
    run = jax.jit(lambda p, codes: codec.apply({"params": p}, codes, method="decode"))
    decoded = run(P.unflatten(flat), jnp.asarray([CAT.codes]))
    np.testing.assert_array_equal(first, paste_mask(np.asarray(decoded[0]), CAT, 200, 100))
    assert second is None
    assert first.any()
    covered = (read(tmp_path / "out.png") != 255).any(-1)
    inside = np.s_[30:70, 60:140]
    np.testing.assert_array_equal(covered[inside], first[inside])
