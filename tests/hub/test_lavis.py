"""BLIP-2's and InstructBLIP's own files (LAVIS): what was trained, over EVA's tower and a language model of others."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import transformers as hf
from safetensors.numpy import load_file

import lvlm_jax
from lvlm_jax import assemble, starts
from lvlm_jax import params as P
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub import minigpt4
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.hub.families import KINDS
from lvlm_jax.hub.safetensors_io import write_file
from lvlm_jax.models.image_text import ImageText, ImageTextConfig
from lvlm_jax.models.lvlm import dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.recipe import Start
from lvlm_jax.zoo import blip2, image_text
from tests import tiny
from tests.hub import tiny as theirs
from tests.hub.test_minigpt4 import QFORMER, TOWER, same
from tests.tokenizers_tiny import opt_tiny

READS = dataclasses.replace(QFORMER, vocab=40, context=8)


def opt():
    return hf.OPTForCausalLM(hf.OPTConfig(**theirs.DECODER, ffn_dim=48, word_embed_proj_dim=32))


CASES = {
    "blip2 on opt": (opt, QFORMER, "blip2"),
    "blip2 on flan-t5": (theirs.flan_t5, QFORMER, "blip2"),
    "instructblip on llama": (theirs.llama, READS, "instructblip"),
}


def written(folder, rows, flat):
    """A folder with the tensors of these rows; buffers are saved with what was trained."""
    saved = {row.theirs: np.ascontiguousarray(row.save({p: flat[p] for p in row.leaves})) for row in rows}
    folder.mkdir()
    write_file(folder / "model.safetensors", saved | {"Qformer.bert.embeddings.position_ids": np.arange(8)[None]})
    return folder


def folders(tmp_path, case):
    """(what was trained, EVA's tower, the language model) as people have them, the whole model and its weights."""
    host, connector, _ = CASES[case]
    base = theirs.saved(theirs.perturbed(host()), tmp_path / "base")
    words = import_folder(base)
    config = blip2.authors_config(TOWER, connector, words.config)
    flat = P.flatten(tiny.weights(config)) | P.flatten({"llm": jax.tree.map(np.asarray, words.params)})
    for path in flat:
        if path.startswith("vision/") and path.endswith("attn/k/bias"):
            flat[path] = np.zeros_like(flat[path])  # no score feels it, and EVA's file has none
    trained = blip2.lavis_rows(config)
    tower = [row for row in blip2.authors_rows(config) if row not in trained]
    eva = {row.theirs: np.ascontiguousarray(row.save({p: flat[p] for p in row.leaves})) for row in tower}
    (tmp_path / "eva").mkdir()
    plain = {key.removeprefix("visual_encoder."): tensor for key, tensor in eva.items()}
    write_file(tmp_path / "eva" / "eva_vit_g.safetensors", plain | {"norm.weight": np.ones(88, np.float32)})
    return written(tmp_path / "trained", trained, flat), tmp_path / "eva", base, config, flat


@pytest.mark.parametrize("case", CASES)
def test_what_was_trained_between_others(tmp_path, case):
    *given, config, flat = folders(tmp_path, case)
    loaded = minigpt4.import_projection(*given)
    assert (loaded.config, loaded.kind, loaded.layout) == (config, "lvlm", CASES[case][2])
    if "t5" in case:  # its config.json says the other GELU, and LAVIS builds it with this
        assert (loaded.config.llm.activation, loaded.config.attention) == ("gelu", "prefix")
    same(loaded.params, flat)


@pytest.mark.slow
def test_load_and_ask(tmp_path):
    trained, eva, base, *_ = folders(tmp_path, "blip2 on opt")
    opt_tiny().save_pretrained(base)
    spec = ImageSpec(size=28, patch=7, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
    (trained / "preprocessor_config.json").write_text(json.dumps(spec.to_hf()))
    system = lvlm_jax.load(trained, vision=eva, model_base=base, template="blip2")
    picture = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    assert isinstance(system.generate("What is this?", images=picture, max_new_tokens=3), str)
    with pytest.raises(CheckpointError, match=r"BLIP-2's Q-Former .* alone; give vision= and model_base="):
        lvlm_jax.load(trained)


def begun(given, config, scan=False):
    """Leaves by path, layers apart, of a recipe's start: part -> folder."""
    like = P.flatten(KINDS["lvlm"].shapes(config, scan)[0])
    found = {}
    for part, paths in starts.begins("start", {part: Start(hub=str(f)) for part, f in given.items()}, like).items():
        wanted = P.unflatten({path: like[path] for path in paths})
        found |= P.flatten(assemble.public_parts(Start(hub=str(given[part])), wanted, None, "hub", set(like), config))
    return P.flatten(P.unstack_layers(P.unflatten(found)))


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["blip2 on opt", "instructblip on llama"])
def test_the_start_of_a_connector(tmp_path, capsys, case, scan):
    trained, eva, _, config, flat = folders(tmp_path, case)
    capsys.readouterr()
    found = begun({"connector": trained, "vision/post_norm": trained, "vision": eva}, config, scan)
    same(P.unflatten(found), {p: leaf for p, leaf in flat.items() if not p.startswith("llm/")})
    assert "left out" not in capsys.readouterr().err


def first_stage(tmp_path):
    """(folder, weights by path) of the authors' first stage: a Q-Former with its texts and heads."""
    config = ImageTextConfig(vision=TOWER, qformer=READS, projection=8)
    batch = dummy_batch(tiny.SYSTEMS["llava15"], length=4)
    flat = P.flatten(tiny.randomize(abstract(ImageText(config), batch)[0]))
    return written(tmp_path / "first", image_text.lavis_rows(config), flat), flat


def test_a_qformer_begins_with_the_first_stage(tmp_path, capsys):
    first, flat = first_stage(tmp_path)
    config = dataclasses.replace(tiny.SYSTEMS["blip2_opt"], vision=TOWER, connector=QFORMER)
    found = begun({"connector/qformer": first, "vision/post_norm": first}, config)
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, flat[path.removeprefix("connector/")], err_msg=path)
    assert {path.rpartition("/")[0] for path in found} >= {"connector/qformer", "vision/post_norm"}
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert said == [
        f"{first}: Qformer.bert.embeddings.position_embeddings, Qformer.bert.embeddings.word_embeddings, "
        "Qformer.bert.encoder.layer.*.intermediate, Qformer.bert.encoder.layer.*.output, Qformer.cls, itm_head, temp, "
        "text_proj, vision_proj left out, of which this model has none"
    ]


def test_what_does_not_fit(tmp_path):
    first, _ = first_stage(tmp_path)
    config = dataclasses.replace(tiny.SYSTEMS["blip2_opt"], vision=TOWER, connector=QFORMER)
    with pytest.raises(CheckpointError, match=r"opt_proj.bias, opt_proj.weight of 2 tensors are not there"):
        begun({"connector": first}, config)
    with pytest.raises(CheckpointError, match=r"is neither of them, nor a VideoChat"):
        begun({"connector": first}, tiny.SYSTEMS["llava15"])
    trained, eva, base, *_ = folders(tmp_path, "blip2 on opt")
    file = trained / "model.safetensors"
    write_file(file, load_file(file) | {"itm_head.bias": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match=r"itm_head.bias are no part of a MiniGPT-4's, VideoChat's or BLIP-2's"):
        minigpt4.import_projection(trained, eva, base)
    bare = tmp_path / "bare"
    bare.mkdir()
    write_file(bare / "model.safetensors", {"opt_proj.weight": np.zeros((32, 64), np.float32)})
    with pytest.raises(CheckpointError, match=r"a BLIP-2's dense layer without its Q-Former"):
        minigpt4.import_projection(bare, eva, base)
