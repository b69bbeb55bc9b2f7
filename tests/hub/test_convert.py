"""Folders of the torch library in, out, and back: every layout, byte for byte, with the same numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers as hf

from lvlm_jax import cli
from lvlm_jax import mesh as meshes
from lvlm_jax import params as P
from lvlm_jax.hub.configs import from_original, to_original
from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.hub.safetensors_io import TensorFolder, write_folder
from lvlm_jax.hub.verify import verify
from lvlm_jax.zoo import llava
from tests.hub import tiny

LAYOUTS = ("hf-4", "hf-4.52", "hf-5", "hf-5-memory", "llava-original")
DECODERS = ("llama", "qwen2", "gemma", "gemma2", "gemma3", "qwen3", "mistral", "mistral_v03")
ENCODER_DECODERS = ("t5", "flan_t5")
ALONE = (*DECODERS, "clip", "siglip", "clip_vision", "siglip_vision", "clip_text", "siglip_text")
GPTS = ("opt", "gpt2", "gpt_neox", "mpt")
TOWERS = ("siglip2", "siglip2_vision", "vit", "vit_classifier", "dinov2", "dinov2_registers")
BLIP2 = "blip2_vision"


def same_bytes(one, other):
    assert set(one) == set(other)
    for key in one:
        assert one.dtype(key) == other.dtype(key), key
        assert one.shape(key) == other.shape(key), key
        assert one[key].tobytes() == other[key].tobytes(), key


def type_of(folder):
    return json.loads((folder / "config.json").read_text())["architectures"][0]


@pytest.fixture(scope="module")
def llavas(tmp_path_factory):
    """One LLaVA in every layout, float32."""
    root = tmp_path_factory.mktemp("llava")
    fresh = tiny.saved(tiny.perturbed(tiny.llava()), root / "hf-5")
    out = {"hf-5": fresh}
    for layout in LAYOUTS:
        if layout != "hf-5":
            config = None
            if layout == "llava-original":
                tower = json.loads((fresh / "config.json").read_text())["vision_config"]
                config = {**tiny.original_config(fresh), "vision_config": tower}
            out[layout] = tiny.rekeyed(fresh, root / layout, tiny.llava_key(layout), config)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_llava(llavas, tmp_path, layout):
    loaded = import_folder(llavas[layout])
    assert (loaded.kind, loaded.layout) == ("lvlm", layout)
    assert loaded.image_token_id == (0 if layout == "llava-original" else 511)
    assert P.flatten(loaded.params).keys() == P.flatten(loaded.axes).keys()
    reference = import_folder(llavas["hf-5"])
    jax.tree.map(np.testing.assert_array_equal, loaded.params, reference.params)
    export_folder(
        tmp_path / "out", loaded.config, loaded.params, layout=layout, image_token_id=511, max_shard_bytes=20_000
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    same_bytes(TensorFolder(llavas[layout]), TensorFolder(tmp_path / "out"))
    again = import_folder(tmp_path / "out")
    assert (again.config, again.layout) == (loaded.config, layout)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("layout", ["hf-4", "llava-original", *(pytest.param(x, marks=SLOW) for x in LAYOUTS[1:4])])
def test_parity_of_every_layout(llavas, layout):
    comparison = verify(llavas[layout])
    assert comparison.passed, str(comparison)
    assert [part.name for part in comparison.parts] == ["vision features", "connector", "hidden states", "logits"]
    assert "passed at 2e-05" in str(comparison)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for dtype in (tiny.torch.float32, tiny.torch.bfloat16) for name in ALONE]
    + [(name, tiny.torch.float32) for name in (*TOWERS, *ENCODER_DECODERS)]
    + [pytest.param(name, tiny.torch.bfloat16, marks=SLOW) for name in (*TOWERS, BLIP2)]
    + [pytest.param(name, tiny.torch.float32, marks=SLOW) for name in GPTS],
)
def test_models_alone(tmp_path, name, dtype):
    folder = tiny.saved(tiny.perturbed(getattr(tiny, name)(), dtype), tmp_path / "in")
    loaded = import_folder(folder)
    wanted = jnp.bfloat16 if dtype == tiny.torch.bfloat16 else jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(wanted)}
    export_folder(tmp_path / "out", loaded.config, loaded.params, layout=loaded.layout)
    same_bytes(TensorFolder(folder), TensorFolder(tmp_path / "out"))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == jnp.dtype(wanted).name
    assert raw["model_type"] == json.loads((folder / "config.json").read_text())["model_type"]
    assert import_folder(tmp_path / "out").config == loaded.config
    if dtype == tiny.torch.float32:
        comparison = verify(folder, tmp_path / "out")  # we read their folder, they read ours
        assert comparison.passed, str(comparison)


@pytest.mark.parametrize("name", ["gemma2", "clip_vision"])
def test_export_of_a_part_by_command(tmp_path, name, capsys):
    folder = tiny.saved(tiny.perturbed(getattr(tiny, name)()), tmp_path / "in")
    out, layout = str(tmp_path / "out"), import_folder(folder).layout
    assert cli.main(["convert", "export", str(folder), out, "--layout", layout]) == 0
    assert out in capsys.readouterr().out
    same_bytes(TensorFolder(folder), TensorFolder(tmp_path / "out"))
    assert import_folder(tmp_path / "out").config == import_folder(folder).config


@pytest.mark.parametrize("name", ["clip_vision", "siglip_vision", "clip_text", "siglip_text"])
def test_towers_with_their_old_prefix(tmp_path, name):
    folder = tiny.saved(tiny.perturbed(getattr(tiny, name)()), tmp_path / "in")
    prefix = "vision_model." if "vision" in name else "text_model."
    old = tiny.rekeyed(folder, tmp_path / "old", lambda key: prefix + key)
    loaded, fresh = import_folder(old), import_folder(folder)
    assert (loaded.layout, fresh.layout) == ("hf-4", "hf-5")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, fresh.params)
    export_folder(tmp_path / "out", loaded.config, loaded.params)
    same_bytes(TensorFolder(old), TensorFolder(tmp_path / "out"))
    _, said = getattr(hf, type_of(old)).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_a_tower_out_of_a_dual_encoder(tmp_path, name):
    folder = tiny.saved(tiny.perturbed(getattr(tiny, name)()), tmp_path / "in")
    tower, whole = import_folder(folder, kind="vision"), import_folder(folder)
    jax.tree.map(np.testing.assert_array_equal, tower.params, whole.params["vision"])


@pytest.mark.parametrize("name", [*TOWERS, pytest.param(BLIP2, marks=SLOW)])
def test_the_folder_of_a_tower_loads_in_the_library(tmp_path, name):
    """Written under "hf", whatever layout it came in."""
    loaded = import_folder(tiny.saved(tiny.perturbed(getattr(tiny, name)()), tmp_path / "in"))
    export_folder(tmp_path / "out", loaded.config, loaded.params)
    _, said = getattr(hf, type_of(tmp_path / "out")).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_bare_decoder(tmp_path, name):
    model = tiny.perturbed(getattr(tiny, name)(tied=False))
    folder = tiny.saved(model.model, tmp_path / "in")
    loaded = import_folder(folder)
    assert loaded.layout == "bare"
    assert "head" not in loaded.params
    assert "head" not in loaded.axes
    comparison = verify(folder)
    assert [part.name for part in comparison.parts] == ["hidden states"]
    assert comparison.passed, str(comparison)


@pytest.mark.parametrize(
    ("tower", "decoder"),
    [
        ("clip", "qwen2"),
        ("siglip", "llama"),
        ("siglip", "gemma2"),
        *(pytest.param("siglip", name, marks=SLOW) for name in ("gemma3", "qwen3", "mistral")),
    ],
)
def test_llava_of_other_parts_in_bfloat16(tmp_path, tower, decoder):
    folder = tiny.saved(tiny.perturbed(tiny.llava(tower, decoder), tiny.torch.bfloat16), tmp_path / "in", "20KB")
    loaded = import_folder(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    export_folder(tmp_path / "out", loaded.config, loaded.params, layout="hf-5", image_token_id=511)
    same_bytes(TensorFolder(folder), TensorFolder(tmp_path / "out"))
    comparison = verify(tmp_path / "out")
    assert comparison.passed, str(comparison)
    model, said = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.dtype == tiny.torch.bfloat16
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_original_files_with_the_tower_elsewhere(llavas, tmp_path):
    fresh = llavas["hf-5"]
    rename = tiny.llava_key("llava-original")
    config = tiny.original_config(fresh)
    main = tiny.rekeyed(
        fresh, tmp_path / "main", lambda key: None if key.startswith("vision_tower") else rename(key), config
    )
    tower = json.loads((fresh / "config.json").read_text())["vision_config"]
    strip = lambda key: key.removeprefix("vision_tower.") if key.startswith("vision_tower") else None  # noqa: E731
    towers = tiny.rekeyed(fresh, tmp_path / "tower", strip, tower)
    with pytest.raises(
        ValueError, match="holds no vision tower; the authors take it from 'openai/clip-vit-large-patch"
    ):
        import_folder(main)
    loaded = import_folder(main, vision=towers)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, import_folder(fresh).params)
    assert verify(main, vision=towers).passed
    # the tower out of a whole CLIP, as the authors fetch it
    clip = tiny.saved(tiny.perturbed(tiny.clip()), tmp_path / "clip")
    other = import_folder(main, vision=clip)
    jax.tree.map(np.testing.assert_array_equal, other.params["vision"], import_folder(clip, kind="vision").params)


def test_original_shards_without_a_tower(llavas, tmp_path):
    """As the authors' releases are: shards and their index, the tower named by config.json only."""
    rename = tiny.llava_key("llava-original")
    main = tiny.rekeyed(
        llavas["hf-5"],
        tmp_path / "main",
        lambda key: None if key.startswith("vision_tower") else rename(key),
        tiny.original_config(llavas["hf-5"]),
    )
    write_folder(tmp_path / "shards", TensorFolder(main).items(), max_shard_bytes=20_000)
    (tmp_path / "shards" / "config.json").write_text((main / "config.json").read_text())
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    clip = tiny.saved(tiny.perturbed(tiny.clip()), tmp_path / "clip")
    loaded = import_folder(tmp_path / "shards", vision=clip)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, import_folder(main, vision=clip).params)
    export_folder(tmp_path / "out", loaded.config, loaded.params, layout="llava-original", max_shard_bytes=20_000)
    again = TensorFolder(tmp_path / "out")
    shards = TensorFolder(tmp_path / "shards")
    assert {key for key in again if "vision_tower" not in key} == set(shards)
    assert all(again[key].tobytes() == shards[key].tobytes() for key in shards)
    jax.tree.map(np.testing.assert_array_equal, import_folder(tmp_path / "out").params, loaded.params)


def test_the_linear_projector_of_the_first_llava(llavas, tmp_path):
    """One dense layer, whose keys the authors do not number."""
    rename = tiny.llava_key("llava-original")
    tower = json.loads((llavas["hf-5"] / "config.json").read_text())["vision_config"]
    config = {**tiny.original_config(llavas["hf-5"]), "mm_projector_type": "linear", "vision_config": tower}

    def key(name):
        if name.startswith("multi_modal_projector.linear_2"):
            return None
        return rename(name).replace("mm_projector.0.", "mm_projector.")

    folder = tiny.rekeyed(llavas["hf-5"], tmp_path / "in", key, config)
    loaded = import_folder(folder)
    assert loaded.layout == "llava-original"
    assert loaded.params["connector"].keys() == {"linear_1"}
    export_folder(tmp_path / "out", loaded.config, loaded.params, layout="llava-original")
    same_bytes(TensorFolder(folder), TensorFolder(tmp_path / "out"))


def test_a_state_dict_out_of_memory(tmp_path):
    """What `state_dict()` gives has other keys than what `save_pretrained` writes of the same model."""
    model = tiny.perturbed(tiny.llava())
    folder = tiny.saved(model, tmp_path / "saved")
    (tmp_path / "memory").mkdir()
    tiny.save_file(model.state_dict(), tmp_path / "memory" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "memory" / "config.json").write_text((folder / "config.json").read_text())
    loaded, reference = import_folder(tmp_path / "memory"), import_folder(folder)
    assert (loaded.layout, reference.layout) == ("hf-5-memory", "hf-5")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, reference.params)
    export_folder(tmp_path / "out", loaded.config, loaded.params, layout="hf-5-memory", image_token_id=511)
    same_bytes(TensorFolder(tmp_path / "memory"), TensorFolder(tmp_path / "out"))


def test_released_original_config():
    for name, vocab in (("llava15_7b", 32000), ("llava_7b", 32003)):
        config = llava.SYSTEMS[name].config
        config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab=vocab))
        raw = to_original(config)
        assert raw["mm_vision_tower"] == f"openai/clip-vit-large-patch14{'-336' if '15' in name else ''}"
        assert from_original(raw) == config


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_that_was_written_out(tmp_path, tied):
    folder = tiny.saved(tiny.perturbed(tiny.llama(tied=True)), tmp_path / "in")
    tensors = TensorFolder(folder)
    head = tensors["model.embed_tokens.weight"] * (1 if tied else 2)
    write_folder(tmp_path / "w", [*tensors.items(), ("lm_head.weight", head)])
    (tmp_path / "w" / "config.json").write_text((folder / "config.json").read_text())
    if tied:
        assert "head" not in import_folder(tmp_path / "w").params
    else:
        with pytest.raises(ValueError, match=r"ties the output head to the embedding, but 'lm_head.weight' differs"):
            import_folder(tmp_path / "w")


def test_an_encoder_decoder_in_an_old_file(tmp_path):
    """The one table thrice, a table that nobody reads, and a config.json that knows of a head of its own."""
    folder = tiny.saved(tiny.perturbed(tiny.flan_t5()), tmp_path / "in")
    raw = json.loads((folder / "config.json").read_text())
    assert raw["tie_word_embeddings"]  # so writes version 5 of the torch library
    loaded = import_folder(folder)
    assert not loaded.config.tied
    tensors = dict(TensorFolder(folder).items())
    copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")}
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    write_folder(tmp_path / "w", [*tensors.items(), *copies.items(), (unread, np.zeros((32, 4), np.float32))])
    old = {name: value for name, value in raw.items() if name not in ("dense_act_fn", "scale_decoder_outputs")}
    (tmp_path / "w" / "config.json").write_text(json.dumps({**old, "tie_word_embeddings": False}))
    again = import_folder(tmp_path / "w")
    assert again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    # A tied one whose head was written out all the same stays tied.
    tied = tiny.saved(tiny.perturbed(tiny.t5()), tmp_path / "tied")
    tensors = dict(TensorFolder(tied).items())
    write_folder(tmp_path / "x", [*tensors.items(), ("lm_head.weight", tensors["shared.weight"])])
    (tmp_path / "x" / "config.json").write_text((tied / "config.json").read_text())
    assert import_folder(tmp_path / "x").config.tied


def test_buffers_are_ignored(llavas, tmp_path):
    tensors = TensorFolder(llavas["hf-4"])
    extra = {
        "vision_tower.vision_model.embeddings.position_ids": np.arange(17)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    write_folder(tmp_path / "w", [*tensors.items(), *extra.items()])
    (tmp_path / "w" / "config.json").write_text((llavas["hf-4"] / "config.json").read_text())
    loaded = import_folder(tmp_path / "w")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, import_folder(llavas["hf-4"]).params)


@pytest.mark.parametrize(("preset", "scan"), [("DP", False), ("FSDP", True), ("FSDP_TP", False), ("FSDP_TP", True)])
def test_straight_onto_a_mesh(llavas, tmp_path, preset, scan):
    mesh = meshes.make_mesh(preset)
    plain = import_folder(llavas["hf-5"])
    loaded = import_folder(llavas["hf-5"], mesh=mesh, scan=scan)
    wanted = meshes.shardings(mesh, loaded.axes, loaded.params)
    placed = jax.tree.map(lambda leaf, at: leaf.sharding.is_equivalent_to(at, leaf.ndim), loaded.params, wanted)
    assert all(jax.tree.leaves(placed))
    apart = P.unstack_layers(loaded.params)
    jax.tree.map(np.testing.assert_array_equal, apart, plain.params)
    if scan:
        assert loaded.params["llm"]["layers"]["attn"]["q"]["kernel"].shape == (2, 32, 32)
        assert loaded.axes["llm"]["layers"]["attn"]["q"]["kernel"][0] == "layers"
    if preset != "DP":
        kernel = loaded.params["connector"]["linear_1"]["kernel"]
        assert kernel.addressable_shards[0].data.size < kernel.size
    export_folder(tmp_path / "out", loaded.config, loaded.params, layout="hf-5", image_token_id=511)
    same_bytes(TensorFolder(llavas["hf-5"]), TensorFolder(tmp_path / "out"))


def test_dtype_is_what_is_asked_for(llavas, tmp_path):
    loaded = import_folder(llavas["hf-5"], dtype=jnp.bfloat16, scan=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    export_folder(tmp_path / "out", loaded.config, loaded.params, image_token_id=511, dtype=jnp.float16)
    assert {TensorFolder(tmp_path / "out").dtype(key) for key in TensorFolder(tmp_path / "out")} == {np.dtype("f2")}
