"""PaliGemma folders in and out: layouts byte for byte, a complete folder, and the torch library's own answers."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
import transformers as hf

from lvlm_jax import api
from lvlm_jax.hub import beside
from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.hub.safetensors_io import TensorFolder
from lvlm_jax.hub.verify import verify
from lvlm_jax.infer.prompt import as_example
from lvlm_jax.processing.image import ImageSpec, preprocess
from lvlm_jax.processing.tokenizer import Tokenizer
from tests.hub import tiny
from tests.hub.test_convert import same_bytes
from tests.tokenizers_tiny import llama_tiny

SPEC = ImageSpec(size=28, patch=7, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return tiny.saved(tiny.perturbed(tiny.paligemma()), tmp_path_factory.mktemp("pali") / "hf-5")


@pytest.mark.parametrize("layout", ["hf-4", "hf-4.52", "hf-5", "hf-5-memory"])
def test_every_layout(fresh, tmp_path, layout):
    folder = tiny.rekeyed(fresh, tmp_path / "in", tiny.llava_key(layout))
    loaded = import_folder(folder)
    assert (loaded.kind, loaded.layout, loaded.image_token_id) == ("lvlm", layout, 511)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, import_folder(fresh).params)
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, layout=layout, image_token_id=511)
    same_bytes(TensorFolder(folder), TensorFolder(out))
    assert (import_folder(out).config, import_folder(out).layout) == (loaded.config, layout)


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_complete_folder(tmp_path, version):
    loaded = import_folder(tiny.saved(tiny.perturbed(tiny.paligemma(version)), tmp_path / "in"))
    tokenizer = Tokenizer(llama_tiny(extra=("<image>", "<bos>", "<eos>")))
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, tokenizer, SPEC, "paligemma")
    comparison = verify(out, prompt="What is the color?")
    assert comparison.passed, str(comparison)
    model, said = hf.PaliGemmaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    raw = json.loads((out / "config.json").read_text())
    assert raw["architectures"] == ["PaliGemmaForConditionalGeneration"]
    assert (beside.image_spec(out, 7), beside.chat_template(out).name) == (SPEC, "paligemma")

    processor = hf.AutoProcessor.from_pretrained(out)
    assert type(processor).__name__ == "PaliGemmaProcessor"
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 100, 3), np.uint8))
    inputs = processor(text="<image>What is it?", images=image, return_tensors="pt")
    np.testing.assert_allclose(inputs["pixel_values"][0].numpy(), preprocess(image, SPEC).transpose(2, 0, 1), atol=1e-6)
    system = api.load(out)
    prompt = system.encode(as_example("What is it?", image))
    model.generation_config.eos_token_id = None
    system.generator.eos_ids = frozenset()
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "token_type_ids")}
    given["input_ids"] = inputs["input_ids"].new_tensor(prompt.tokens.tolist())[None]
    given["attention_mask"] = inputs["attention_mask"].new_ones(given["input_ids"].shape)
    given["token_type_ids"] = inputs["token_type_ids"].new_zeros(given["input_ids"].shape)
    theirs = model.generate(**given, max_new_tokens=6, do_sample=False)[0, len(prompt.tokens) :].tolist()
    assert list(system.generator.generate([prompt], max_new_tokens=6)[0].tokens) == theirs
