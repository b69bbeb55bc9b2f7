import functools
import io
import json

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import encode
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.tokenizer import Tokenizer

Q = 4  # visual tokens of a picture in these tests


@pytest.fixture(scope="session")
def tokenizer():
    from lvlm_jax.data.easy_vqa import word_tokenizer

    return Tokenizer(word_tokenizer())


@pytest.fixture(scope="session")
def encoder(tokenizer):
    template = TEMPLATES["vicuna_v1"].with_system("")
    image = tokenizer.special_id("<image>")
    return functools.partial(encode, template=template, tokenizer=tokenizer, visual_tokens=Q, image_token_id=image)


@pytest.fixture(scope="session")
def spec():
    return ImageSpec(size=16, patch=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), fit="squash")


@pytest.fixture
def album(tmp_path):
    """A folder of twelve pictures, and LLaVA lines of 40 conversations with no, one or two of them."""
    rng = np.random.default_rng(0)
    words = ["what", "is", "the", "color", "of", "shape", "red", "blue", "circle"]
    for number in range(12):
        pixels = rng.integers(0, 256, (12 + number, 16, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    lines = []
    for number in range(40):
        names = [f"{i}.png" for i in rng.choice(12, rng.choice(3, p=[0.2, 0.6, 0.2]), replace=False)]
        said = " ".join(rng.choice(words, rng.integers(2, 9)))
        turns = [{"from": "human", "value": "<image>" * len(names) + said}, {"from": "gpt", "value": "red circle"}]
        lines.append({"id": str(number), "conversations": turns} | ({"image": names} if names else {}))
    path = tmp_path / "album.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def jpeg(size=(64, 64)):
    """The bytes of a noisy JPEG."""
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(out, "JPEG")
    return out.getvalue()


def png(colour=(200, 30, 30), size=(8, 8)):
    """The bytes of a one-coloured PNG."""
    out = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()
