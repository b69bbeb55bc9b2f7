"""MiniGPT-4's dense layer over a front and a language model of other people: `load`, and the start of a recipe."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import lvlm_jax
from lvlm_jax import assemble, starts
from lvlm_jax import params as P
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.config import ConfigError
from lvlm_jax.connectors import QFormerConfig
from lvlm_jax.hub import minigpt4
from lvlm_jax.hub.configs import describe, public_config, to_original
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.hub.export import export_folder
from lvlm_jax.hub.families import KINDS
from lvlm_jax.hub.safetensors_io import write_file
from lvlm_jax.llm import llama
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.recipe import Start
from lvlm_jax.vision import ClipConfig, blip2_vit
from lvlm_jax.zoo import family_of
from lvlm_jax.zoo import minigpt4 as zoo
from tests import tiny
from tests.hub import tiny as theirs
from tests.tokenizers_tiny import llama_tiny

TOWER = dataclasses.replace(
    blip2_vit.PRESETS["blip2_vit_g14_224"], image_size=28, patch_size=7, width=88, depth=2, heads=1, mlp_dim=48
)
QFORMER = QFormerConfig(queries=4, width=64, depth=2, heads=1, mlp_dim=48)
HOST = llama.from_hf(theirs.llama().config.to_dict())
V1 = LVLMConfig(vision=TOWER, connector=QFORMER, llm=HOST)
NEAR = dataclasses.replace(V1, vision=dataclasses.replace(TOWER, class_feature=False), connector=zoo.FOUR_OF_A_ROW)
VIDEO = dataclasses.replace(
    V1,
    vision=ClipConfig(**dataclasses.asdict(TOWER), global_blocks=2),
    connector=dataclasses.replace(QFORMER, extra=4),
)
V2 = dataclasses.replace(NEAR, vision=dataclasses.replace(NEAR.vision, resize="cubic", max_patches=64))
RANK = 4


def model(config):
    """Weights by path: random ones, none for a key's bias, and the last norm as it begins where no Q-Former reads."""
    flat = P.flatten(tiny.weights(config))
    for path in flat:
        if path.startswith("vision/") and path.endswith("attn/k/bias"):
            flat[path] = np.zeros_like(flat[path])
        if config.connector is zoo.FOUR_OF_A_ROW and path.startswith("vision/post_norm/"):
            flat[path] = np.full_like(flat[path], path.endswith("scale"))
    return flat


def folders(tmp_path, config, lora=False):
    """(the dense layer, the front's two files, the language model) as people have them, and the whole by path."""
    base = theirs.saved(theirs.perturbed(theirs.llama()), tmp_path / "base")
    flat = model(config) | P.flatten({"llm": jax.tree.map(np.asarray, import_folder(base).params)})
    rows = family_of(config).rows(config)
    saved = {row.theirs: np.ascontiguousarray(row.save({p: flat[p] for p in row.leaves})) for row in rows}
    trained = ("llama_proj.",)
    if config is VIDEO:
        trained += ("visual_encoder.gmhra", "extra_query_tokens", "ln_vision.")
        saved[f"visual_encoder.{minigpt4._PATCH}"] = saved[f"visual_encoder.{minigpt4._PATCH}"][:, :, 0].copy()
    own = {key: saved.pop(key) for key in [*saved] if key.startswith(trained)}
    own["Qformer.bert.embeddings.position_ids"] = np.arange(8)[None]  # buffers are saved with what was trained
    tower = {k.removeprefix("visual_encoder."): v for k, v in saved.items() if k.startswith("visual_encoder.")}
    rest = {k: v for k, v in saved.items() if k.startswith(("Qformer.", "query_tokens"))}
    if rest:
        rest |= {k: v for k, v in saved.items() if k.startswith("ln_vision.")}
    if lora:
        own |= adapters()
    for name in ("projection", "front"):
        (tmp_path / name).mkdir()
    write_file(tmp_path / "projection" / "pretrained_minigpt4.safetensors", own)
    write_file(tmp_path / "front" / "eva_vit_g.safetensors", tower | {"norm.weight": np.ones(88, np.float32)})
    if rest:
        write_file(tmp_path / "front" / "blip2.safetensors", rest | {"t5_proj.bias": np.ones(3, np.float32)})
    return tmp_path / "projection", tmp_path / "front", base, flat


def adapters():
    rng, out = np.random.default_rng(0), {}
    for layer in range(HOST.depth):
        for name, wide in (("q_proj", HOST.heads), ("v_proj", HOST.kv_heads)):
            at = f"{minigpt4.ADAPTED}model.layers.{layer}.self_attn.{name}"
            out[f"{at}.lora_A.weight"] = rng.normal(size=(RANK, HOST.width)).astype(np.float32)
            wide = wide * HOST.width // HOST.heads
            out[f"{at}.lora_B.weight"] = rng.normal(size=(wide, RANK)).astype(np.float32)
    return out


def same(params, flat):
    found, flat = P.flatten(params), P.flatten(flat)
    assert found.keys() == flat.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, flat[path], err_msg=path)


@pytest.mark.parametrize("config", [V1, VIDEO, pytest.param(NEAR, marks=pytest.mark.slow)])
def test_a_dense_layer_between_others(tmp_path, config):
    *given, flat = folders(tmp_path, config)
    loaded = minigpt4.import_projection(*given)
    assert (loaded.config, loaded.kind) == (config, "lvlm")
    assert loaded.layout == ("videochat" if config is VIDEO else "minigpt4")
    same(loaded.params, flat)


@pytest.mark.parametrize(
    "name", ["minigpt4", pytest.param("minigpt_v2", marks=pytest.mark.slow), "videochat", "videochat2"]
)
def test_a_whole_model_goes_out_and_comes_back(tmp_path, name):
    config = tiny.SYSTEMS[name]
    flat = model(config)
    out = export_folder(tmp_path / "out", config, P.unflatten(flat), image_token_id=98)
    loaded = import_folder(out)
    assert (loaded.config, loaded.image_token_id) == (config, 98)
    assert loaded.layout == (name if name.startswith("videochat") else "minigpt4")
    same(loaded.params, flat)


def test_the_q_former_of_the_third_stage_goes_out_and_comes_back(tmp_path):
    """VideoChat2's, which reads the question too; it stays a VideoChat2."""
    plain = tiny.SYSTEMS["videochat2"]
    config = dataclasses.replace(plain, connector=dataclasses.replace(plain.connector, vocab=99))
    flat = model(config)
    loaded = import_folder(export_folder(tmp_path / "out", config, P.unflatten(flat), image_token_id=98))
    assert (loaded.config, loaded.layout) == (config, "videochat2")
    same(loaded.params, flat)


@pytest.mark.parametrize("name", ["videochat", "videochat2"])
def test_a_start_token_that_is_not_looked_up(name):
    """VideoChats write it down, alone or under named senses; the file of any other family has no place for it."""
    config = dataclasses.replace(tiny.SYSTEMS[name], compat_bos_bug=1)
    for kept in (config, dataclasses.replace(config, senses=tiny.SENSED.senses)):
        raw = json.loads(json.dumps(public_config(kept, 98)))
        assert describe(raw, Path("config.json")).config == kept
    for other in ("minigpt4", "llava15", "perceiver", "siglip_qwen2"):
        lost = dataclasses.replace(tiny.SYSTEMS[other], compat_bos_bug=1)
        with pytest.raises(ValueError, match=r"compat_bos_bug=1: config\.json of a \w+ has no place for it .*to None"):
            public_config(lost, 98)
    with pytest.raises(ValueError, match="compat_bos_bug=1: config"):
        to_original(dataclasses.replace(tiny.SYSTEMS["llava15"], compat_bos_bug=1))


def test_version_2_has_adapters(tmp_path):
    *given, flat = folders(tmp_path, V2, lora=True)
    loaded = minigpt4.import_projection(*given)
    assert loaded.config == V2
    q, low = "llm/layers/1/attn/q/kernel", adapters()
    a, b = (low[f"{minigpt4.ADAPTED}model.layers.1.self_attn.q_proj.lora_{x}.weight"].T for x in "AB")
    got = P.flatten(loaded.params)
    np.testing.assert_allclose(got[q], flat[q] + minigpt4.ALPHA / RANK * (a @ b), rtol=0, atol=1e-5)
    adapted = {path for path in got if path.startswith("llm/") and path.endswith(("attn/q/kernel", "attn/v/kernel"))}
    same(*(P.unflatten({p: leaf for p, leaf in one.items() if p not in adapted}) for one in (got, flat)))


def test_a_tower_of_the_torch_library(tmp_path):
    """BLIP-2's own last norm stays out where no Q-Former reads: the authors' was a fresh one."""
    projection, _, base, flat = folders(tmp_path, NEAR)
    front = tmp_path / "hf"
    export_folder(front, TOWER, P.unflatten({k.removeprefix("vision/"): v for k, v in flat.items() if k[:2] == "vi"}))
    loaded = minigpt4.import_projection(projection, front, base)
    assert loaded.config == NEAR
    same(loaded.params, flat)


@pytest.mark.slow
def test_load_and_ask(tmp_path):
    projection, front, base, _ = folders(tmp_path, V1)
    llama_tiny().save_pretrained(base)
    spec = ImageSpec(size=28, patch=7, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
    (projection / "preprocessor_config.json").write_text(json.dumps(spec.to_hf()))
    system = lvlm_jax.load(projection, vision=front, model_base=base, template="minigpt4_align")
    picture = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    assert isinstance(system.generate("What is this?", images=picture, max_new_tokens=3), str)
    with pytest.raises(CheckpointError, match=r"MiniGPT-4's dense layer alone; give vision= and model_base="):
        lvlm_jax.load(projection)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (V1, lambda p, f, b: (f / "blip2.safetensors").unlink(), "reads 64 values, but the front .* has no Q-Former"),
        (V1, lambda p, f, b: (f / "eva_vit_g.safetensors").unlink(), "neither config.json nor EVA's tower"),
        (V1, lambda p, f, b: add(p, "llama_head.bias"), "llama_head.bias are no part of a MiniGPT-4's"),
    ],
)
def test_what_does_not_fit(tmp_path, config, change, message):
    *given, _ = folders(tmp_path, config)
    change(*given)
    with pytest.raises(CheckpointError, match=message):
        minigpt4.import_projection(*given)


def add(folder, key):
    write_file(folder / "more.safetensors", {key: np.zeros(3, np.float32)})


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", [V1, VIDEO])
def test_the_start_of_a_recipe(tmp_path, scan, config):
    """Tower and Q-Former from the authors' front, what was trained from its own folder."""
    projection, front, _, flat = folders(tmp_path, config)
    like = P.flatten(KINDS["lvlm"].shapes(config, scan)[0])
    given = {"vision": front, "connector/qformer": front, "connector/linear_1": projection}
    if config is VIDEO:
        more = ("vision/globals", "vision/post_norm", "connector/qformer/extra_queries")
        given |= dict.fromkeys(more, projection)
    begins = starts.begins("stages.align.start", {part: Start(hub=str(f)) for part, f in given.items()}, like)
    assert {path for paths in begins.values() for path in paths} == {p for p in like if not p.startswith("llm/")}
    found = {}
    for part, paths in begins.items():
        wanted = P.unflatten({path: like[path] for path in paths})
        found |= P.flatten(assemble.public_parts(Start(hub=str(given[part])), wanted, None, "hub", set(like), config))
    same(P.unstack_layers(P.unflatten(found)), {p: leaf for p, leaf in flat.items() if not p.startswith("llm/")})


def test_who_begins_with_what():
    leaves = ["vision/a", "connector/qformer/b", "connector/linear_1/c", "connector/linear_10/d", "llm/e"]
    begins = lambda *parts: starts.begins("start", {part: Start(hub="x") for part in parts}, leaves)  # noqa: E731
    assert begins("connector/linear_1", "all") == {"connector/linear_1": [leaves[2]], "all": [*leaves[:2], *leaves[3:]]}
    assert begins("connector", "connector/qformer") == {"connector": leaves[2:4], "connector/qformer": [leaves[1]]}
    assert begins() == {}
    heard = ["senses/audio/connector/a", "senses/depth/vision/b"]
    leaves += heard
    assert begins("all", "senses/audio") == {"all": [*leaves[:5], heard[1]], "senses/audio": heard[:1]}
    with pytest.raises(ConfigError, match=r"start names \['connector/lin'\]; the parts are \['connector', 'llm', 's"):
        begins("connector/lin", "vision")
