"""LLaVA-OneVision folders in and out: every layout byte for byte, the authors' own files among them, same numbers."""

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
from lvlm_jax.processing.frames import DEFAULT
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.tiles import Tiles, span
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.zoo import llava_onevision
from lvlm_jax.zoo.spec import HALF
from tests.hub import tiny
from tests.hub.test_convert import LAYOUTS, same_bytes
from tests.tokenizers_tiny import qwen_tiny

TILES = Tiles(pinpoints=tuple(map(tuple, tiny.PINPOINTS)), most=2, several="whole")
SPEC = ImageSpec(size=28, patch=7, mean=HALF, std=HALF, fit="squash", tiles=TILES)
AUTHORS = {
    "model_type": "llava_qwen",
    "architectures": ["LlavaQwenForCausalLM"],
    "image_aspect_ratio": "anyres_max_2",
    "image_grid_pinpoints": [[w, h] for h, w in tiny.PINPOINTS],  # they write (width, height)
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "vision_config",
}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return tiny.saved(tiny.perturbed(tiny.llava_onevision()), tmp_path_factory.mktemp("onevision") / "hf-5")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(fresh, tmp_path, layout):
    raw, config = json.loads((fresh / "config.json").read_text()), None
    if layout == "llava-original":
        config = {**raw["text_config"], **AUTHORS, "mm_vision_select_layer": -1, "vision_config": raw["vision_config"]}
    folder = tiny.rekeyed(fresh, tmp_path / "in", tiny.llava_key(layout), config)
    loaded = import_folder(folder)
    assert (loaded.kind, loaded.layout, loaded.config.public) == ("lvlm", layout, "llava_onevision")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, import_folder(fresh).params)
    out = export_folder(
        tmp_path / "out", loaded.config, loaded.params, image_spec=SPEC, layout=layout, image_token_id=483
    )
    same_bytes(TensorFolder(folder), TensorFolder(out))
    assert (import_folder(out).config, import_folder(out).layout) == (loaded.config, layout)
    assert beside.image_spec(out, 7) == SPEC
    written = json.loads((out / "config.json").read_text())
    if layout == "llava-original":
        assert {name: written[name] for name in AUTHORS} == AUTHORS
        assert beside.original_tiles(out) == dataclasses.replace(TILES, unpad="truncate")
    else:
        assert written["architectures"] == ["LlavaOnevisionForConditionalGeneration"]
        names = ("image_token_index", "video_token_index", "vision_aspect_ratio", "image_grid_pinpoints")
        assert {name: written[name] for name in names} == {name: raw[name] for name in names}


def test_the_same_numbers_in_a_complete_folder(fresh, tmp_path):
    loaded, tokenizer = import_folder(fresh), Tokenizer(qwen_tiny(extra=("<image>", "<video>")))
    assert [tokenizer.special_id(name) for name in ("<image>", "<video>")] == [483, 484]
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, tokenizer, SPEC, "qwen_chatml")
    for size in ((100, 40), (60, 60)):  # the second is interpolated
        picture = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
        comparison = verify(out, picture=picture)
        assert comparison.passed, str(comparison)
        assert (span(*size, TILES, 28, 16).blend is not None) is (size == (60, 60))
    model, said = hf.LlavaOnevisionForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.vision_aspect_ratio == "anyres_max_2"
    kept = json.loads((out / "processor_config.json").read_text())
    assert (kept["processor_class"], kept["num_image_tokens"]) == ("LlavaOnevisionProcessor", 16)
    assert (kept["vision_aspect_ratio"], kept["vision_feature_select_strategy"]) == ("anyres_max_2", "full")
    system = api.load(out)
    assert (system.spec, system.video, system.template.name) == (SPEC, llava_onevision.VIDEO, "qwen_chatml")
    pictures = [PIL.Image.fromarray(np.full((40, 30, 3), shade, np.uint8)) for shade in (40, 200)]
    assert system.encode(as_example("What is it?", pictures)).sizes == (17, 17)
    assert isinstance(system.generate("What is it?", images=pictures, max_new_tokens=3), str)
    other = dataclasses.replace(llava_onevision.VIDEO, frames=8)
    for number, video in enumerate((other, DEFAULT)):
        again = export_folder(
            tmp_path / str(number), loaded.config, loaded.params, tokenizer, SPEC, "qwen_chatml", video=video
        )
        assert beside.video_spec(again, llava_onevision.VIDEO) == video


@pytest.mark.slow
def test_the_authors_files_give_the_same_numbers(fresh, tmp_path):
    raw = json.loads((fresh / "config.json").read_text())
    config = {**raw["text_config"], **AUTHORS, "mm_vision_select_layer": -1, "vision_config": raw["vision_config"]}
    folder = tiny.rekeyed(fresh, tmp_path / "in", tiny.llava_key("llava-original"), config)
    comparison = verify(folder)
    assert comparison.passed, str(comparison)


def test_the_released_config_of_the_authors(tmp_path):
    """What is said of the tower's layer is not what their code does: it drops the last block, and the head."""
    spec = zoo.SYSTEMS["llava_onevision_7b_ov"]
    config = dataclasses.replace(spec.config, llm=dataclasses.replace(spec.config.llm, vocab=152064))
    raw = to_original(config, spec.image)
    assert (raw["mm_vision_tower"], raw["model_type"]) == ("google/siglip-so400m-patch14-384", "llava_qwen")
    assert (config.vision.depth, config.vision.pool, config.visual_tokens) == (26, "none", 729)
    for layer in (-1, -2):
        assert from_original({**raw, "mm_vision_select_layer": layer}) == config
    raw["image_grid_pinpoints"] = "(1x1),...,(6x6)"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = beside.original_tiles(tmp_path)
    assert set(found.pinpoints) == set(llava_onevision.PINPOINTS)
    assert found.pinpoints[:2] == ((384, 384), (768, 384))  # theirs go through the heights first
    assert (found.most, found.several, found.unpad) == (9, "whole", "truncate")
    (tmp_path / "config.json").write_text(json.dumps({**raw, "image_aspect_ratio": "anyres_max_nine"}))
    with pytest.raises(ValueError, match=r"with image_aspect_ratio 'anyres_max_nine', which is not supported"):
        beside.original_tiles(tmp_path)


def test_tiles_that_the_class_reads_otherwise(fresh, tmp_path):
    loaded = import_folder(fresh)
    for tiles, message in (
        (dataclasses.replace(TILES, most=None), "most=None; set several='whole' and most=9"),
        (None, "names the sizes that pictures are cut from"),
    ):
        spec = dataclasses.replace(SPEC, tiles=tiles)
        with pytest.raises(ValueError, match=message):
            export_folder(tmp_path / "out", loaded.config, loaded.params, image_spec=spec, image_token_id=483)
    plain = dataclasses.replace(loaded.config, public=None)
    with pytest.raises(ValueError, match=r"their class keeps every token of every picture, but here most=2"):
        export_folder(tmp_path / "out", plain, loaded.params, image_spec=SPEC, image_token_id=483)
