"""Checkpoints that do not fit: one message each, before any tensor is read."""

import json
import sys

import numpy as np
import pytest

from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.hub.safetensors_io import SINGLE, TensorFolder, write_tensors
from tests.hub import tiny

HEAD, TABLE = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
POSITIONS = "vision_tower.embeddings.position_embedding.weight"
PROJECTOR = "multi_modal_projector.linear_1.weight"


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny.saved(tiny.llava(), tmp_path_factory.mktemp("llava") / "in")


def tensors(change):
    """Damage to the tensors of a folder."""

    def damage(folder):
        found = dict(TensorFolder(folder).items())
        change(found)
        write_tensors(folder, found.items())

    return damage


def config(**change):
    """Damage to config.json."""

    def damage(folder):
        raw = json.loads((folder / "config.json").read_text())
        for name, value in change.items():
            part, _, field = name.rpartition("__")
            (raw[part] if part else raw)[field] = value
        (folder / "config.json").write_text(json.dumps(raw))

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: len(content) // 2])


def pickled(folder):
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def rename_all(found):
    for key in list(found):
        found["wrapped." + key] = found.pop(key)


BAD = {
    "missing": (
        tensors(lambda t: t.pop(PROJECTOR)),
        rf"does not fit the model.\n  missing \(1\): {PROJECTOR}\n  not used",
    ),
    "extra": (
        tensors(lambda t: t.update({"language_model.model.extra.weight": np.zeros(3, np.float32)})),
        r"missing \(0\): none\n  not used \(1\): language_model.model.extra.weight\nIs it another size, fam",
    ),
    "misshapen": (
        tensors(lambda t: t.update({PROJECTOR: t[PROJECTOR][:, :-1]})),
        rf"tensor '{PROJECTOR}' has shape \[32, 31\], but config.json asks for \[32, 32\]. Is config.json that of an",
    ),
    "words": (
        tensors(lambda t: t.update({TABLE: np.zeros((600, 32), np.float32), HEAD: np.zeros((600, 32), np.float32)})),
        r"has shape \[600, 32\], but config.json asks for \[512, 32\]. Were words added .* Then its vocab_size is 600",
    ),
    "picture": (
        config(vision_config__image_size=56),
        rf"tensor '{POSITIONS}' has shape \[17, 32\], but config.json asks for \[65, 32\]. Is the picture .* one",
    ),
    "rank": (
        tensors(lambda t: t.update({PROJECTOR: t[PROJECTOR].reshape(-1)})),
        rf"tensor '{PROJECTOR}' has shape \[1024\], but config.json asks for \[32, 32\]",
    ),
    "layers": (
        config(text_config__num_hidden_layers=3),
        r"missing \(9\): language_model.model.layers.2.input_layernorm",
    ),
    "layout": (
        tensors(rename_all),
        r"these keys are in no known LLaVA layout \(hf-4, .*\): wrapped.language_model.lm_head",
    ),
    "truncated": (cut, r"model.safetensors: not a whole safetensors file .*: fetch or copy it again"),
    "pickle": (
        pickled,
        r"pytorch_model.bin is \(or lists\) a pickle, which runs code when it is read, so it is refused",
    ),
    "model_type": (
        config(model_type="kosmos-2"),
        r"model_type is 'kosmos-2', which is not supported; supported: .* llava, .* clip, siglip, .* mistral",
    ),
    "another model": (
        config(model_type="blip-2"),
        r"config.json and the weights beside it are of two models: a BLIP-2 has no layout 'hf-5'; it has one, blip2",
    ),
    "text_type": (
        config(text_config__model_type="mamba"),
        r"text_config.model_type is 'mamba', which is not supported",
    ),
    "tower_type": (
        config(vision_config__model_type="swin"),
        r"vision_config.model_type is 'swin', which is not support",
    ),
    "activation": (config(projector_hidden_act="mish"), r"projector_hidden_act is 'mish', which is not supported"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"config.json: not there; a checkpoint folder needs",
    ),
    "config is no JSON": (write("config.json", b"{oops"), r"config.json: not JSON \(.*\); fetch it again"),
    "config is a list": (write("config.json", b"[]"), r"config.json: holds a list, not an object with fields"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder(llava, tmp_path, name):
    damage, message = BAD[name]
    folder = tmp_path / "x"
    folder.mkdir()
    for file in llava.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        import_folder(folder)


ORIGINAL = {
    "model_type": (
        {"model_type": "llava_mpt"},
        r"model_type is 'llava_mpt', which is not supported; supported: 'llava',",
    ),
    "projector": ({"mm_projector_type": "cabstractor"}, r"mm_projector_type is 'cabstractor', which is not supported"),
    "tower": ({"mm_vision_tower": "some/tower"}, r"mm_vision_tower is '?.*tower'?, which is not supported"),
    "markers": (
        {"mm_use_im_start_end": True},
        r"mm_use_im_start_end is true, which is not supported; supported: false",
    ),
    "layer": ({"mm_vision_select_layer": 99}, r"layer is 99, "),
    "feature": ({"mm_vision_select_feature": "cls"}, r"mm_vision_select_feature is 'cls', which is not supported"),
}


@pytest.mark.parametrize("name", ORIGINAL)
@pytest.mark.parametrize("described", [False, True], ids=["released tower", "own tower"])
def test_bad_original_config(llava, tmp_path, name, described):
    if name == "tower" and described:
        return  # then the name is not looked at
    change, message = ORIGINAL[name]
    raw = {**tiny.original_config(llava), **change}
    if described:
        raw["vision_config"] = json.loads((llava / "config.json").read_text())["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        import_folder(tmp_path)


def test_bad_arguments(llava, tmp_path):
    with pytest.raises(
        ValueError, match="unknown kind 'towers'; the kinds are lvlm, sense, dual, vision, text, decoder"
    ):
        import_folder(llava, kind="towers")
    with pytest.raises(CheckpointError, match="holds a model of kind 'lvlm', not 'decoder'; see its"):
        import_folder(llava, kind="decoder")
    with pytest.raises(ValueError, match=r"unknown layout 'hf-9'; those of kind 'lvlm' are .*, hf-4, "):
        import_folder(llava, layout="hf-9")
    with pytest.raises(CheckpointError, match=r"missing \(\d+\): lm_head.weight"):
        import_folder(llava, layout="hf-4.52")
    with pytest.raises(ValueError, match="only the LLaVA authors' files take their tower from elsewhere"):
        import_folder(llava, vision=llava)
    with pytest.raises(FileNotFoundError, match="no such folder here, nor \\(wholly\\) in the hub cache, and off"):
        import_folder("lvlm/absent", cache=tmp_path, offline=True)
    with pytest.raises(FileNotFoundError, match="no such folder here, and not a hub name either"):
        import_folder("./absent/folder")


def test_layers_of_different_types_do_not_stack(llava, tmp_path):
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    folder = tmp_path / "x"
    folder.mkdir()
    for file in llava.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors(lambda t: t.update({key: t[key].astype(np.float16)}))(folder)
    assert import_folder(folder).params["llm"]["layers"]["1"]["mlp"]["up"]["kernel"].dtype == np.float16
    with pytest.raises(
        CheckpointError, match=rf"'{key}' is float16, other layers of its stack are float32; give dtype="
    ):
        import_folder(folder, scan=True)


def test_verify_looks_for_the_file_before_it_asks_for_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    from lvlm_jax.hub.verify import verify

    with pytest.raises(FileNotFoundError, match=r"^model\.gguf: no such file$"):
        verify("model.gguf")


def test_verify_without_torch(llava, monkeypatch):
    from lvlm_jax.hub.verify import verify

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"torch is not installed: pip install torch==2\.13\.0"):
        verify(llava)


def test_verify_finds_a_difference(llava, tmp_path):
    from lvlm_jax.hub.verify import verify

    folder = tmp_path / "x"
    folder.mkdir()
    for file in llava.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors(lambda t: t.update({PROJECTOR: t[PROJECTOR] * np.float32(1.001)}))(folder)
    comparison = verify(folder, llava)
    assert not comparison.passed
    assert [part.ratio > 2e-5 for part in comparison.parts] == [False, True, True, True]
    assert "FAILED at 2e-05" in str(comparison)
