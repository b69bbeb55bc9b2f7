"""LLaVA-NeXT folders in and out: every layout byte for byte, the tiles in each file that names them, same numbers."""

import dataclasses
import json

import jax
import numpy as np
import PIL.Image
import pytest
import transformers as hf

from lvlm_jax import api, zoo
from lvlm_jax.hub import beside
from lvlm_jax.hub.configs import from_original, to_original
from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.hub.safetensors_io import TensorFolder
from lvlm_jax.hub.verify import verify
from lvlm_jax.infer.prompt import as_example
from lvlm_jax.processing.image import ImageSpec, preprocess_rows
from lvlm_jax.processing.tiles import Tiles, span
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.zoo import llava_next
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD
from tests.hub import tiny
from tests.hub.test_convert import LAYOUTS, same_bytes
from tests.tokenizers_tiny import llama_tiny

TILES = Tiles(pinpoints=tuple(map(tuple, tiny.PINPOINTS)))
SPEC = ImageSpec(size=28, patch=7, mean=CLIP_MEAN, std=CLIP_STD, fit="squash", tiles=TILES)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return tiny.saved(tiny.perturbed(tiny.llava_next()), tmp_path_factory.mktemp("next") / "hf-5")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(fresh, tmp_path, layout):
    config = None
    if layout == "llava-original":
        # They write (width, height).
        tiles = {"image_grid_pinpoints": [[w, h] for h, w in tiny.PINPOINTS], "image_aspect_ratio": "anyres"}
        tower = json.loads((fresh / "config.json").read_text())["vision_config"]
        config = {
            **tiny.original_config(fresh),
            "vision_config": tower,
            "mm_patch_merge_type": "spatial_unpad",
            **tiles,
        }
    folder = tiny.rekeyed(fresh, tmp_path / "in", tiny.llava_key(layout), config)
    loaded = import_folder(folder)
    assert (loaded.kind, loaded.layout, loaded.config.newline) == ("lvlm", layout, True)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, import_folder(fresh).params)
    out = export_folder(
        tmp_path / "out", loaded.config, loaded.params, image_spec=SPEC, layout=layout, image_token_id=511
    )
    same_bytes(TensorFolder(folder), TensorFolder(out))
    assert (import_folder(out).config, import_folder(out).layout) == (loaded.config, layout)
    assert beside.image_spec(out, 7) == SPEC
    raw = json.loads((out / "config.json").read_text())
    if layout == "llava-original":
        assert raw["image_grid_pinpoints"] == config["image_grid_pinpoints"]
        assert beside.original_tiles(out) == Tiles(pinpoints=TILES.pinpoints, unpad="truncate")
    else:
        assert raw["image_grid_pinpoints"] == tiny.PINPOINTS
        assert raw["architectures"] == ["LlavaNextForConditionalGeneration"]


def test_a_model_that_reads_videos(tmp_path):
    folder = tiny.saved(tiny.perturbed(tiny.llava_next_video()), tmp_path / "in")
    loaded = import_folder(folder)
    assert (loaded.config.pools_frames, loaded.image_token_id) == (True, 511)
    out = export_folder(
        tmp_path / "out", loaded.config, loaded.params, image_spec=SPEC, layout=loaded.layout, image_token_id=511
    )
    same_bytes(TensorFolder(folder), TensorFolder(out))
    raw = json.loads((out / "config.json").read_text())
    assert (raw["architectures"], raw["video_token_index"]) == (["LlavaNextVideoForConditionalGeneration"], 510)
    assert import_folder(out).config == loaded.config
    comparison = verify(out)
    assert comparison.passed, str(comparison)
    assert from_original(to_original(loaded.config, SPEC)) == loaded.config
    with pytest.raises(ValueError, match=r"spatial_pool_mode is 'max', which is not supported; supported: 'average'"):
        zoo.READS["llava_next_video"].from_hf({**raw, "spatial_pool_mode": "max"})


def test_a_complete_folder(fresh, tmp_path):
    loaded = import_folder(fresh)
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, Tokenizer(llama_tiny()), SPEC, "vicuna_v1")
    comparison = verify(out, prompt="What is the color of the shape?")
    assert comparison.passed, str(comparison)
    model, said = hf.LlavaNextForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = hf.AutoProcessor.from_pretrained(out)
    assert type(processor).__name__ == "LlavaNextProcessor"
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 100, 3), np.uint8))
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    inputs = processor(text=text, images=image, return_tensors="pt")
    pixels = preprocess_rows(image, SPEC).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(inputs["pixel_values"][0].numpy(), pixels, atol=1e-6)
    system = api.load(out)
    assert system.spec == SPEC
    prompt = system.encode(as_example("What is it?", image))
    assert prompt.tokens.tolist() == inputs["input_ids"][0].tolist()
    assert prompt.sizes == (len(span(100, 40, TILES, 28, 16).index),)
    system.generator.eos_ids = frozenset()
    model.generation_config.eos_token_id = None
    theirs = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(prompt.tokens) :].tolist()
    assert list(system.generator.generate([prompt], max_new_tokens=6)[0].tokens) == theirs


def test_tiles_of_the_authors_files(fresh, tmp_path):
    """A folder of theirs has no picture processor: the released system's is taken, with the folder's own tiles."""
    config = {"mm_vision_tower": "x", "image_grid_pinpoints": "[[336, 672], [672, 336]]"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert beside.original_tiles(tmp_path) == Tiles(pinpoints=((672, 336), (336, 672)), unpad="truncate")
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_grid_pinpoints": "336 by 672"}))
    with pytest.raises(ValueError, match=r"image_grid_pinpoints is '336 by 672' with .*, which is not supported"):
        beside.original_tiles(tmp_path)


def test_what_a_model_with_a_newline_needs(fresh, tmp_path):
    loaded = import_folder(fresh)
    for layout, message in (
        ("hf", "names the sizes that pictures are cut from"),
        ("llava-original", "names its tiles"),
    ):
        with pytest.raises(ValueError, match=f"image_spec: .*{message}"):
            export_folder(tmp_path / "out", loaded.config, loaded.params, layout=layout, image_token_id=511)
    plain = dataclasses.replace(SPEC, tiles=None)
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, Tokenizer(llama_tiny()), SPEC, "vicuna_v1")
    (out / "preprocessor_config.json").write_text(json.dumps(plain.to_hf()))
    with pytest.raises(
        ValueError, match=r"tiles and the newline go together: .* cuts no tiles, but the model has newline"
    ):
        api.load(out)
    with pytest.raises(ValueError, match="names no image_grid_pinpoints"):
        verify(out)


@pytest.mark.parametrize("name", llava_next.SYSTEMS)
def test_the_authors_config_of_each_system(name):
    spec = zoo.SYSTEMS[name]
    raw = to_original(spec.config, spec.image)
    kind = {"llavanext_mistral_7b": "llava_mistral"}.get(name, "llava_llama")
    assert (raw["model_type"], raw["image_aspect_ratio"]) == (kind, "anyres")
    assert from_original(raw) == spec.config
