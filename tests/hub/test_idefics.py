"""Idefics folders in and out, and a model of no public class out and in."""

import dataclasses

import jax
import numpy as np
import PIL.Image
import pytest
import transformers as hf

from lvlm_jax import api
from lvlm_jax.connectors import MlpConfig
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.hub import beside
from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.hub.safetensors_io import TensorFolder
from lvlm_jax.hub.verify import verify
from lvlm_jax.infer.prompt import as_example
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec, preprocess
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.zoo import open_flamingo
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD
from tests import tiny as models
from tests.hub import tiny
from tests.hub.test_convert import same_bytes
from tests.parity.test_idefics import CASES, EACH, SIZES
from tests.tokenizers_tiny import llama_tiny

SPEC = ImageSpec(size=28, patch=7, mean=CLIP_MEAN, std=CLIP_STD, fit="squash")


@pytest.mark.slow
@pytest.mark.parametrize("case", EACH)
def test_there_and_back(tmp_path, case):
    theirs = tiny.perturbed(hf.IdeficsForVisionText2Text(hf.IdeficsConfig(**SIZES | CASES[case])))
    folder = tiny.saved(theirs, tmp_path / "in")
    loaded = import_folder(folder)
    assert (loaded.kind, loaded.layout, loaded.image_token_id) == ("lvlm", "idefics", 98)
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, image_token_id=98)
    same_bytes(TensorFolder(folder), TensorFolder(out))
    again = import_folder(out)
    assert (again.config, again.image_token_id) == (loaded.config, 98)
    _, said = hf.IdeficsForVisionText2Text.from_pretrained(out, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.nightly
def test_a_complete_folder(tmp_path):
    """The torch library's processor and model on our folder: the same ids and pixels, and the same answer."""
    sizes = {**SIZES, **CASES["vector gates, all norms"], "vocab_size": 480}
    theirs = tiny.perturbed(hf.IdeficsForVisionText2Text(hf.IdeficsConfig(**sizes, bos_token_id=1, eos_token_id=2)))
    loaded = import_folder(tiny.saved(theirs, tmp_path / "in"))
    tokenizer = Tokenizer(llama_tiny(extra=("<fake_token_around_image>", "<image>")))
    tokenizer.hf.pad_token = "<unk>"
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, tokenizer, SPEC, "idefics")
    assert (beside.image_spec(out, 7), beside.chat_template(out).name) == (SPEC, "idefics")
    comparison = verify(out, prompt="What is the color?")
    assert comparison.passed, str(comparison)
    processor = hf.AutoProcessor.from_pretrained(out)
    assert type(processor).__name__ == "IdeficsProcessor"
    rng = np.random.default_rng(0)
    a, b = (PIL.Image.fromarray(rng.integers(0, 255, (40, 100, 3), np.uint8)) for _ in range(2))
    inputs = processor(text=[["Two birds:", a, "one", b, "and a cat?"]], return_tensors="pt")
    system = api.load(out)
    prompt = system.encode(as_example(["Two birds:", a, "one", b, "and a cat?"]))
    assert prompt.tokens.tolist() == inputs["input_ids"][0].tolist()
    for picture, pixels in zip((a, b), inputs["pixel_values"][0].numpy()):
        np.testing.assert_allclose(pixels, preprocess(picture, SPEC).transpose(2, 0, 1), atol=1e-5)
    model = hf.IdeficsForVisionText2Text.from_pretrained(out)
    model.generation_config.eos_token_id = None
    system.generator.eos_ids = frozenset()
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(prompt.tokens) :].tolist()
    got = system.generator.generate([prompt, system.encode(as_example("no picture"))], max_new_tokens=6)
    assert list(got[0].tokens) == answer
    # The other row's answer is what it is without a row beside it that has pictures.
    alone = system.generator.generate([system.encode(as_example("no picture"))], max_new_tokens=6)
    assert got[1].tokens == alone[0].tokens


def test_the_releases_picture_processor():
    raw = {"image_processor_type": "IdeficsImageProcessor", "image_num_channels": 3, "image_size": 28}
    raw |= {"image_mean": list(SPEC.mean), "image_std": list(SPEC.std)}
    assert ImageSpec.from_hf(raw, 7) == SPEC


OWN = {
    "plain": LVLMConfig(
        vision=models.CLIP,
        connector=dataclasses.replace(models.PERCEIVER, project=False),
        llm=models.LLAMA,
        fusion=CrossAttentionConfig(every=2, heads=2, head_dim=8),
    ),
    "every part of another kind": LVLMConfig(
        vision=models.SIGLIP,
        connector=MlpConfig(),
        llm=models.QWEN2,
        fusion=CrossAttentionConfig(
            place="after_first", scope="all", gate="vector", gated=True, bias=True, norm="rms", qk_norm="layer"
        ),
        words=3,
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("plain", marks=pytest.mark.nightly),
        pytest.param("every part of another kind", marks=pytest.mark.slow),
    ],
)
def test_a_model_without_a_public_class(tmp_path, name):
    config, params = OWN[name], models.weights(OWN[name])
    out = export_folder(tmp_path / "out", config, params, image_token_id=98)
    loaded = import_folder(out)
    assert (loaded.config, loaded.layout, loaded.image_token_id) == (config, "open_flamingo", 98)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert open_flamingo.fits(config)
