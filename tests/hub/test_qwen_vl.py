"""Qwen-VL folders in and out, in the layouts that the torch library has in files and in memory; `verify`."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from lvlm_jax import api
from lvlm_jax.hub import beside
from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.hub.safetensors_io import TensorFolder
from lvlm_jax.hub.verify import verify
from lvlm_jax.infer.prompt import as_example
from lvlm_jax.processing.tokenizer import Tokenizer
from tests.hub import tiny
from tests.hub.test_convert import same_bytes
from tests.parity.qwen_vl_tiny import CASES, IMAGE_ID, reference
from tests.tokenizers_tiny import qwen_tiny

WORDS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def picture(width=40, height=28):
    rng = np.random.default_rng(0)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(tmp_path, case):
    theirs, family, spec = reference(case)
    folder = tiny.saved(theirs, tmp_path / "in")
    loaded = import_folder(folder)
    flat = case != "qwen3_vl"
    assert (loaded.kind, loaded.layout, loaded.image_token_id) == (
        "lvlm", "qwen_vl" if flat else "qwen_vl-nested", IMAGE_ID,
    )  # fmt: skip
    assert family.fits(loaded.config)
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, image_spec=spec, image_token_id=IMAGE_ID)
    same_bytes(TensorFolder(folder), TensorFolder(out))
    again = import_folder(out)
    assert (again.config, again.image_token_id) == (loaded.config, IMAGE_ID)
    assert beside.image_spec(out, 0) == spec
    _, said = type(theirs).from_pretrained(out, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if flat:
        nested = export_folder(
            tmp_path / "nested", loaded.config, loaded.params, layout="qwen_vl-nested", image_token_id=IMAGE_ID
        )
        assert import_folder(nested).layout == "qwen_vl-nested"


@pytest.mark.parametrize(
    "case",
    ["qwen2_5_vl", pytest.param("qwen2_vl", marks=pytest.mark.slow), pytest.param("qwen3_vl", marks=pytest.mark.slow)],
)
def test_verify(tmp_path, case):
    theirs, _, spec = reference(case)
    loaded = import_folder(tiny.saved(theirs, tmp_path / "in"))
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, image_spec=spec, image_token_id=IMAGE_ID)
    for folder in (tmp_path / "in", out):
        comparison = verify(folder, picture=picture())
        assert comparison.passed, str(comparison)


def test_a_loaded_folder_answers(tmp_path):
    """Config, weights, picture processor, chat template and tokenizer of a folder are one system."""
    theirs, _, spec = reference("qwen2_5_vl", vocab_size=492)
    tokenizer = Tokenizer(qwen_tiny(extra=WORDS))
    loaded = import_folder(tiny.saved(theirs, tmp_path / "in"))
    spec = dataclasses.replace(spec, max_patches=loaded.config.vision.max_patches, size=loaded.config.vision.image_size)
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, tokenizer, spec, "qwen2_vl")
    system = api.load(out)
    assert (system.spec, system.template.name) == (spec, "qwen2_vl")
    assert system.image_token_id == tokenizer.special_id("<|image_pad|>")
    prompt = system.encode(as_example(["What is ", picture(), "?"]))
    text = tokenizer.decode(prompt.tokens, skip_special=False)
    assert "<|im_start|>user\nWhat is <|vision_start|>" + "<|image_pad|>" * prompt.sizes[0] + "<|vision_end|>?" in text
    assert isinstance(system.generate(["What is ", picture(), "?"], max_new_tokens=4), str)
    assert system.embed_images([picture(), picture(16, 16)])[0].shape == (prompt.sizes[0], 32)
