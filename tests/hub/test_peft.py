"""Adapters of the peft package both ways: what is trained here loads there, what is trained there loads here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")  # the reference is installed in one lane only
import peft as reference  # noqa: E402
import transformers as hf  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from lvlm_jax import params as P  # noqa: E402
from lvlm_jax.checkpoint import CheckpointError  # noqa: E402
from lvlm_jax.hub import peft  # noqa: E402
from lvlm_jax.hub.convert import import_folder  # noqa: E402
from lvlm_jax.llm.decoder import Decoder  # noqa: E402
from lvlm_jax.models.lvlm import LVLM, dummy_batch  # noqa: E402
from lvlm_jax.nn import lora, ranges  # noqa: E402
from lvlm_jax.nn.linear import abstract  # noqa: E402
from lvlm_jax.nn.lora import Lora  # noqa: E402
from tests import tiny as ours  # noqa: E402
from tests.hub import tiny  # noqa: E402
from tests.parity.compare import TOLERANCE  # noqa: E402

IDS = np.array([[1, 17, 300, 44, 511 - 3, 9]])


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(torch model, its folder) of a decoder."""
    model = tiny.perturbed(tiny.llama())
    return model, tiny.saved(model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """(torch model, its folder) of a LLaVA."""
    model = tiny.perturbed(tiny.llava())
    return model, tiny.saved(model, tmp_path_factory.mktemp("llava"))


def fresh(base, kind):
    """The reference over again, since peft changes the model that it wraps."""
    return kind.from_pretrained(base[1]).eval()


def moved(model, seed=0):
    """Every trainable weight of a peft model moved away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def decoder_logits(loaded, params):
    decoder, ids = Decoder(loaded.config), jnp.asarray(IDS)
    variables = {"params": params}
    x = decoder.apply(variables, ids, method="embed_tokens")
    hidden, _ = decoder.apply(variables, x, jnp.arange(ids.shape[1])[None], ranges.causal(*ids.shape))
    return np.asarray(decoder.apply(variables, hidden, method="logits"))


def their_logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def near(got, wanted):
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


TARGETS = {
    "two kinds, rsLoRA, ranks and strengths by pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"mlp.down_proj": 3},
    },
    "all linear layers, a head trained whole": {
        "r": 3,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "modules_to_save": ["lm_head"],
    },
}


@pytest.mark.parametrize("case", TARGETS)
def test_an_adapter_of_theirs_gives_the_same_logits_here(case, llama, tmp_path):
    wrapped = moved(
        reference.get_peft_model(
            fresh(llama, hf.LlamaForCausalLM), reference.LoraConfig(task_type="CAUSAL_LM", **TARGETS[case])
        )
    )
    wrapped.save_pretrained(tmp_path)
    wanted = their_logits(wrapped, input_ids=torch.tensor(IDS))
    assert np.abs(wanted - their_logits(llama[0], input_ids=torch.tensor(IDS))).max() > 0.05 * np.abs(wanted).max()
    for scan in (False, True):
        loaded = import_folder(llama[1], scan=scan)
        params = peft.apply(loaded.params, loaded.config, tmp_path)
        assert P.is_stacked(params) is scan
        near(decoder_logits(loaded, P.unstack_layers(params)), wanted)


def adapted(loaded, config, seed=3):
    """A loaded model with random adapters."""
    params = lora.add(loaded.params, loaded.axes, config, jax.random.key(0))
    rng = np.random.default_rng(seed)
    flat = P.flatten(params)
    noise = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 5, jnp.float32)  # noqa: E731
    return P.unflatten({path: noise(leaf) if path.endswith(lora.B) else leaf for path, leaf in flat.items()})


@pytest.mark.parametrize("scan", [False, True])
def test_an_adapter_of_ours_gives_the_same_logits_there(scan, llama, tmp_path):
    loaded = import_folder(llama[1], scan=scan)
    config = Lora(targets=("layers/*/attn/{q,o}", "layers/*/mlp/down"), rank=4, alpha=8.0, rslora=True)
    params = adapted(loaded, config)
    out = peft.save(tmp_path / "adapter", loaded.config, lora.split(params)[1], base="owner/base")
    wrapped = reference.PeftModel.from_pretrained(fresh(llama, hf.LlamaForCausalLM), out).eval()
    wanted = decoder_logits(loaded, P.unstack_layers(lora.merge(params)))
    near(their_logits(wrapped, input_ids=torch.tensor(IDS)), wanted)
    content = json.loads((out / peft.CONFIG).read_text())
    assert (content["r"], content["lora_alpha"], content["base_model_name_or_path"]) == (4, 16, "owner/base")
    assert set(content) <= {*reference.LoraConfig().to_dict(), "task_type"}
    # And back here: the same bits.
    low, whole = peft.load(out, loaded.config)
    assert not whole
    mine = P.flatten(P.unstack_layers(lora.split(params)[1]))
    assert mine.keys() == P.flatten(low).keys()
    for path, leaf in P.flatten(low).items():
        np.testing.assert_allclose(leaf, mine[path], rtol=1e-7 if path.endswith(lora.SCALE) else 0, err_msg=path)


def test_ranks_and_strengths_that_differ_go_out_as_patterns(llama, tmp_path):
    loaded = import_folder(llama[1])
    params = adapted(loaded, Lora(targets=("layers/*/attn/q",), rank=4, alpha=8.0))
    more = lora.add(
        loaded.params, loaded.axes, Lora(targets=("layers/1/mlp/up",), rank=2, alpha=7.0), jax.random.key(1)
    )
    low = P.merge(lora.split(params)[1], lora.split(more)[1])
    out = peft.save(tmp_path / "adapter", loaded.config, low)
    content = json.loads((out / peft.CONFIG).read_text())
    assert content["rank_pattern"] == {"model.layers.1.mlp.up_proj": 2}
    assert content["alpha_pattern"] == {"model.layers.1.mlp.up_proj": 7}
    wrapped = reference.PeftModel.from_pretrained(fresh(llama, hf.LlamaForCausalLM), out)
    layers = [module for module in wrapped.modules() if hasattr(module, "lora_A")]
    assert sorted(layer.scaling["default"] for layer in layers) == [2.0, 2.0, 3.5]


# A tower without attention has none of these leaves; CogVLM's files, EVA's and BLIP-2's hold queries, keys and values
# in one tensor.
FUSED = (
    *("visual_expert", "cogvlm", "minigpt4", "minigpt_v2", "videochat", "videochat2"),
    *("blip2_opt", "blip2_t5", "instructblip"),
)


@pytest.mark.parametrize("name", [name for name in ours.SYSTEMS if name not in ("nfnet", *FUSED)])
def test_adapters_of_every_system_go_out_and_come_back(name, tmp_path):
    config, rng = ours.SYSTEMS[name], np.random.default_rng(0)
    shapes, axes = abstract(LVLM(config), dummy_batch(config))
    grown, _ = lora.add_shapes(shapes, axes, Lora(targets=("llm/**", "vision/**/attn/{q,v}"), rank=2))
    wanted = {p: rng.normal(size=x.shape) for p, x in P.flatten(grown).items() if lora.is_adapter(p)}
    wanted = {path: np.asarray(leaf, np.float32) for path, leaf in wanted.items()}
    out = peft.save(tmp_path / "adapter", config, P.unflatten(wanted))
    low, whole = peft.load(out, config)
    assert not whole
    assert P.flatten(low).keys() == wanted.keys()
    for path, leaf in P.flatten(low).items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-5 if path.endswith(lora.SCALE) else 0)


def picture_batch(config):
    batch, pictures = ours.batch(config, [[2, ours.IMAGE, 3]], image_id=511)
    inputs = {
        "input_ids": torch.tensor(batch.tokens),
        "attention_mask": torch.tensor((batch.segments > 0).astype(np.int64)),
        "pixel_values": torch.tensor(pictures),
    }
    return batch, inputs


@pytest.mark.slow
def test_a_llava_with_its_projector_trained_whole_both_ways(llava, tmp_path):
    loaded = import_folder(llava[1])
    batch, inputs = picture_batch(loaded.config)
    batch = jax.tree.map(jnp.asarray, batch)
    logits = lambda p: np.asarray(LVLM(loaded.config).apply({"params": p}, batch, method=ours.logits))  # noqa: E731
    base = fresh(llava, hf.LlavaForConditionalGeneration)
    wrapped = moved(
        reference.get_peft_model(
            base,
            reference.LoraConfig(
                r=4,
                target_modules=r".*language_model.*\.(q_proj|up_proj)",
                modules_to_save=["multi_modal_projector"],
            ),
        )
    )
    wrapped.save_pretrained(tmp_path / "theirs")
    params = peft.apply(loaded.params, loaded.config, tmp_path / "theirs")
    assert not np.array_equal(
        params["connector"]["linear_1"]["kernel"], loaded.params["connector"]["linear_1"]["kernel"]
    )
    near(logits(params), their_logits(wrapped, **inputs))

    mine = adapted(loaded, Lora(targets=("llm/**/{k,gate}",), rank=2, alpha=4.0))
    mine["connector"] = jax.tree.map(lambda x: x + 0.1, mine["connector"])
    out = peft.save(tmp_path / "ours", loaded.config, {"connector": mine["connector"], **lora.split(mine)[1]})
    content = json.loads((out / peft.CONFIG).read_text())
    assert content["modules_to_save"] == [f"model.multi_modal_projector.linear_{i}" for i in (1, 2)]
    wrapped = reference.PeftModel.from_pretrained(fresh(llava, hf.LlavaForConditionalGeneration), out).eval()
    near(their_logits(wrapped, **inputs), logits(lora.merge(mine)))


def test_the_authors_projector_alone(llava, tmp_path):
    loaded = import_folder(llava[1])
    names = {"linear_1": "0", "linear_2": "2"}
    tensors = {}
    for name, number in names.items():
        part = loaded.params["connector"][name]
        tensors[f"model.mm_projector.{number}.weight"] = torch.tensor(np.asarray(part["kernel"]).T + 1.0)
        tensors[f"model.mm_projector.{number}.bias"] = torch.tensor(np.asarray(part["bias"]) - 1.0)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "mm_projector.safetensors")
    params = peft.apply(loaded.params, loaded.config, tmp_path)
    for name in names:
        np.testing.assert_array_equal(
            params["connector"][name]["kernel"], loaded.params["connector"][name]["kernel"] + 1.0
        )
    assert params["llm"] is not loaded.params["llm"]
    np.testing.assert_array_equal(params["llm"]["norm"]["scale"], loaded.params["llm"]["norm"]["scale"])


@pytest.fixture
def apart(llava, tmp_path):
    """The authors' way, as folders: their LLaVA less its tower, the language model, the tower, the projector."""
    rename, config = tiny.llava_key("llava-original"), tiny.original_config(llava[1])
    key = lambda key: None if key.startswith("vision_tower") else rename(key)  # noqa: E731
    main = tiny.rekeyed(llava[1], tmp_path / "main", key, config)
    no_projector = lambda key: None if "mm_projector" in key else key  # noqa: E731
    base = tiny.rekeyed(main, tmp_path / "base", no_projector, config | {"model_type": "llama"})
    tower = tiny.saved(llava[0].model.vision_tower, tmp_path / "tower")
    (tmp_path / "projector").mkdir()
    (tmp_path / "projector" / "config.json").write_text(json.dumps(config))
    held = {key: value for key, value in load_file(main / "model.safetensors").items() if "mm_projector" in key}
    save_file(held, tmp_path / "projector" / "mm_projector.safetensors")
    return main, base, tower, tmp_path / "projector"


def test_the_authors_projector_on_a_language_model(apart):
    main, base, tower, projector = apart
    loaded = import_folder(projector, base=base, vision=tower)
    assert loaded.layout == "llava-original"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, import_folder(main, vision=tower).params)


def test_the_authors_adapters_on_a_language_model(apart, tmp_path):
    main, base, tower, projector = apart
    whole = import_folder(main, vision=tower)
    mine = adapted(whole, Lora(targets=("llm/**/{q,v}",), rank=2))
    low = lora.split(mine)[1]
    folder = peft.save(tmp_path / "tuned", whole.config, low, layout="llava-original")
    (folder / "config.json").write_text((projector / "config.json").read_text())
    held = load_file(projector / "mm_projector.safetensors")
    save_file({peft.PREFIX + key: value for key, value in held.items()}, folder / "non_lora_trainables.safetensors")
    loaded = import_folder(folder, base=base, vision=tower)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lora.merge(mine))


def test_what_cannot_lie_on_a_base(apart, llava, tmp_path):
    _, base, tower, projector = apart
    with pytest.raises(CheckpointError, match=r"base= completes the LLaVA authors' files, and config.json is none of"):
        import_folder(llava[1], base=base)
    (projector / "mm_projector.safetensors").rename(projector / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"mm_projector.bin: a pickle"):
        import_folder(projector, base=base, vision=tower)
    (projector / "mm_projector.bin").rename(projector / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"what lies on top of the base is not known"):
        import_folder(projector, base=base, vision=tower)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture
def adapter(llama, tmp_path):
    """A good adapter for the decoder, to be spoilt."""
    loaded = import_folder(llama[1])
    params = adapted(loaded, Lora(targets=("layers/*/attn/q",), rank=2))
    return loaded, peft.save(tmp_path / "adapter", loaded.config, lora.split(params)[1], base="owner/base")


def rewrite(out, change=None, rename=None):
    content = json.loads((out / peft.CONFIG).read_text())
    (out / peft.CONFIG).write_text(json.dumps(content | (change or {})))
    tensors = load_file(out / peft.WEIGHTS)
    save_file({(rename or str)(key): value for key, value in tensors.items()}, out / peft.WEIGHTS)


@pytest.mark.parametrize(
    ("change", "rename", "says"),
    [
        ({"peft_type": "IA3"}, None, "adapter_config.json: peft_type is 'IA3'; only 'LORA'"),
        ({"use_dora": True}, None, "use_dora=True is not read here, only False"),
        ({"bias": "lora_only"}, None, "bias='lora_only' is not read here, only 'none'"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "init_lora_weights='pissa_niter_4' trains over a changed base"),
        (None, lambda k: k.replace("q_proj", "qkv"), "of 2 modules are none of this model's.*names 'owner/base'"),
        (None, lambda k: k.replace("lora_A", "lora_embedding_A"), "'model.layers.*lora_embedding_A.* not read here"),
        (
            None,
            lambda k: k.replace("0.self_attn.q_proj.lora_A", "0.self_attn.k_proj.lora_A"),
            "only lora_[AB] is there",
        ),
    ],
)
def test_adapters_that_are_not_read(change, rename, says, adapter):
    loaded, out = adapter
    rewrite(out, change, rename)
    with pytest.raises(CheckpointError, match=says):
        peft.apply(loaded.params, loaded.config, out)


def test_an_adapter_for_another_base(adapter, tmp_path):
    _, out = adapter
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**tiny.DECODER, "hidden_size": 16}))
    other = import_folder(tiny.saved(model, tmp_path / "other"))
    says = r"self_attn.q_proj' is for a weight of shape \[32, 32\], this model's is \[16, 16\]. This adapter"
    with pytest.raises(CheckpointError, match=says):
        peft.apply(other.params, other.config, out)


@pytest.mark.parametrize("name", peft.PICKLES)
def test_pickles_are_refused_with_the_way_out(name, adapter, tmp_path):
    loaded, _ = adapter
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=rf"{name}: a pickle, which runs code.*weights_only=True"):
        peft.load(tmp_path / "pickle", loaded.config)


def test_a_folder_without_an_adapter(adapter, tmp_path):
    loaded, out = adapter
    with pytest.raises(CheckpointError, match=r"no adapter: neither adapter_model.safetensors nor non_lora"):
        peft.load(tmp_path, loaded.config)
    (out / peft.CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config.json is not beside the weights"):
        peft.load(out, loaded.config)
    with pytest.raises(ValueError, match=r"there is no adapter in these parameters"):
        peft.save(tmp_path / "x", loaded.config, {})


def test_half_of_a_module_has_no_place_in_peft(llama, tmp_path):
    loaded = import_folder(llama[1])
    params = adapted(loaded, Lora(targets=("layers/*/attn/q",), rank=2))
    with pytest.raises(ValueError, match=r"\['llm/strange'\] have no name in the torch library's model"):
        peft.save(tmp_path / "x", loaded.config, P.merge(lora.split(params)[1], {"llm": {"strange": np.zeros(3)}}))
