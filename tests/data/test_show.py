import PIL.Image

from lvlm_jax.data.show import half_blocks, show
from lvlm_jax.processing.schema import Example, Image, Text, Turn


def conversation(picture, question="what is the color?"):
    asked = Turn(role="user", segments=(Image(picture), Text(question)))
    return Example(turns=(asked, Turn(role="assistant", segments=(Text("red"),))), origin="train.json:12")


def test_trained_tokens_are_green_and_the_rest_dim(encoder, tokenizer):
    example = conversation(PIL.Image.new("RGB", (30, 20), (255, 0, 0)))
    page = show(example, encoder(example), tokenizer)
    assert "train.json:12" in page
    assert "[image 30x20 x4 tokens]" in page
    assert "\x1b[1;32m red </s>\x1b[0m" in page
    dim = [part.split("\x1b[0m")[0] for part in page.split("\x1b[2m")[1:]]
    assert any("what is the color ?" in part for part in dim)
    assert "red" not in "".join(dim)
    assert "2 trained; 1 picture(s)" in page
    assert "\x1b[38;2;255;0;0;48;2;255;0;0m▀" in page


def test_without_colour_the_page_is_plain_text(encoder, tokenizer):
    example = conversation(PIL.Image.new("RGB", (30, 20)))
    page = show(example, encoder(example), tokenizer, colour=False)
    assert "\x1b" not in page
    assert "» red </s>«" in page


def test_a_broken_picture_does_not_hide_the_text(encoder, tokenizer, tmp_path):
    example = conversation(str(tmp_path / "gone.png"))
    page = show(example, encoder(example), tokenizer)
    assert "[image broken x4 tokens]" in page
    assert "gone.png: the file does not exist" in page


def test_half_blocks_keep_the_shape():
    lines = half_blocks(PIL.Image.new("RGB", (200, 100)), columns=20).split("\n")
    assert len(lines) == 5
    assert lines[0].count("▀") == 20
    assert half_blocks(PIL.Image.new("RGB", (1, 1))).count("▀") == 1
