"""Exported folders are complete: the torch library's model, tokenizer, processor and chat template come out of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import transformers as hf

from lvlm_jax.connectors import LinearConfig, PerceiverConfig
from lvlm_jax.hub import beside, rewrite
from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.hub.export import add_image_token
from lvlm_jax.hub.families import KINDS
from lvlm_jax.hub.safetensors_io import TensorFolder
from lvlm_jax.hub.verify import verify
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.image import ImageSpec, preprocess
from lvlm_jax.processing.tokenizer import Tokenizer, load_tokenizer
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD
from tests import released_templates
from tests.hub import tiny
from tests.tokenizers_tiny import llama_tiny, qwen_tiny

SPEC = ImageSpec(size=28, patch=7, mean=CLIP_MEAN, std=CLIP_STD, fit="pad")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tiny.saved(tiny.perturbed(tiny.llava()), tmp_path_factory.mktemp("in") / "llava")
    return import_folder(folder)


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "llava"
    return export_folder(path, loaded.config, loaded.params, Tokenizer(llama_tiny()), SPEC, "vicuna_v1")


def test_every_file_is_there(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    raw = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert {name: raw["text_config"][name] for name in ids} == ids
    assert json.loads((folder / "generation_config.json").read_text()) == ids
    assert raw["architectures"] == ["LlavaForConditionalGeneration"]


def test_the_torch_library_loads_and_runs_it(folder):
    comparison = verify(folder, prompt="What is the color of the shape?")
    assert comparison.passed, str(comparison)
    model, said = hf.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = hf.AutoProcessor.from_pretrained(folder)
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert prompt.startswith("A chat between a curious user")
    assert prompt.endswith("USER: <image>\nWhat is it? ASSISTANT:")
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    image_id = load_tokenizer(folder).special_id("<image>")
    assert int((inputs["input_ids"] == image_id).sum()) == 16
    pixels = preprocess(image, SPEC).transpose(2, 0, 1)
    np.testing.assert_allclose(inputs["pixel_values"][0].numpy(), pixels, atol=1e-6)
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= inputs["input_ids"].shape[1] + 3


def test_we_read_back_what_stands_beside(folder, loaded):
    assert beside.image_spec(folder, 7) == SPEC
    assert beside.chat_template(folder) == TEMPLATES["vicuna_v1"]
    again = import_folder(folder)
    assert again.config == loaded.config
    assert again.image_token_id == load_tokenizer(folder).special_id("<image>")


@pytest.mark.parametrize("system", ["It's a \\ test.\nTwo lines", ""])
def test_a_template_comes_back_with_its_system_text(tmp_path, system):
    template = TEMPLATES["qwen_chatml"].with_system(system)
    (tmp_path / "chat_template.jinja").write_text(template.jinja())
    assert beside.chat_template(tmp_path) == template


RELEASED = {
    "LLAVA_15_HF": ("vicuna_v1", ""),
    "LLAVA_NEXT_MISTRAL_HF": ("mistral_instruct", ""),
    "LLAMA_2": ("llama_2", ""),
    "LLAMA_3": ("llama_3", ""),
    "LLAMA_31": ("llama_3", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"),
    "GEMMA": ("gemma", ""),
    "MISTRAL_01": ("mistral", ""),
    "MISTRAL_02": ("mistral", ""),
    "MISTRAL_03": ("mistral_v3", ""),
    "QWEN_2": ("qwen_chatml", "You are a helpful assistant."),
    "QWEN_25": ("qwen_chatml", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "QWEN_2_VL": ("qwen2_vl", "You are a helpful assistant."),
    "QWEN_3": ("qwen_chatml", ""),
    "SMOLLM_2": ("smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "MPT": ("chatml_direct", ""),
}


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # the misspelt end in LLaVA-NeXT's own template
@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("place", ["tokenizer", "list", "file"])
def test_released_templates_are_known_by_what_they_write(tmp_path, name, place):
    text = getattr(released_templates, name)
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(text)
    else:
        value = (
            text if place == "tokenizer" else [{"name": "tools", "template": ""}, {"name": "default", "template": text}]
        )
        marks = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"} if name == "GEMMA" else {}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value, **marks}))
    found = beside.chat_template(tmp_path)
    assert (found.name, found.system) == RELEASED[name]


@pytest.mark.parametrize(
    "text",
    [
        "{{ '<|im_start|>' + messages[0]['role'] }}",  # the marks of one that is known, in no known order
        "{{ raise_exception('no') }}",
        "{% broken",
        "{{ messages }}",
    ],
)
def test_templates_that_are_not_known(tmp_path, text):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    assert beside.chat_template(tmp_path) is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_of_ours_comes_back(tmp_path, name):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name].jinja())
    assert beside.chat_template(tmp_path) == TEMPLATES[name]


def test_nothing_stands_beside(tmp_path):
    assert beside.chat_template(tmp_path) is None
    assert beside.image_spec(tmp_path, 7) is None


def test_processor_saved_by_the_torch_library_is_read(tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = hf.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=llama_tiny(),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(tmp_path)
    spec = beside.image_spec(tmp_path, 7)
    assert (spec.size, spec.fit, spec.resample) == (28, "crop", "bicubic")


@pytest.mark.slow
def test_qwen_with_chatml_stops_at_both_ends(tmp_path):
    folder = tiny.saved(tiny.perturbed(tiny.llava("siglip", "qwen2")), tmp_path / "in")
    loaded = import_folder(folder)
    tokenizer = Tokenizer(qwen_tiny())
    spec = ImageSpec(size=28, patch=7, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, tokenizer, spec, "qwen_chatml")
    assert verify(out).passed
    processor = hf.AutoProcessor.from_pretrained(out)
    image = PIL.Image.fromarray(np.zeros((40, 60, 3), np.uint8))
    inputs = processor(text="<image>\nwhat", images=image, return_tensors="pt")
    assert int((inputs["input_ids"] == tokenizer.special_id("<image>")).sum()) == 16
    raw = json.loads((out / "processor_config.json").read_text())
    assert (raw["num_additional_image_tokens"], raw["vision_feature_select_strategy"]) == (0, "full")


@pytest.mark.parametrize(("name", "kind"), [("llama", "decoder"), ("clip", "dual")])
def test_other_models_with_their_tokenizer(tmp_path, name, kind):
    loaded = import_folder(tiny.saved(tiny.perturbed(getattr(tiny, name)()), tmp_path / "in"))
    tokenizer = Tokenizer(llama_tiny())
    if kind == "dual":
        with pytest.raises(ValueError, match=r"the tokenizer has \d+ ids, but the embedding has 99 rows"):
            export_folder(tmp_path / "out", loaded.config, loaded.params, tokenizer)
        return
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, tokenizer, template="vicuna_v1")
    assert hf.AutoTokenizer.from_pretrained(out).chat_template == TEMPLATES["vicuna_v1"].jinja()
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2
    assert verify(out).passed


def test_a_model_without_a_word_for_pictures_gets_one(tmp_path, loaded):
    """What an import of the LLaVA authors' files needs before it goes to the torch library."""
    tokenizer = Tokenizer(llama_tiny(extra=()))
    with pytest.raises(
        ValueError, match="has no special token '<image>', which the torch library puts where a picture"
    ):
        export_folder(tmp_path / "out", loaded.config, loaded.params, tokenizer)
    config, params = add_image_token(loaded.config, loaded.params, tokenizer)
    assert config.llm.vocab == 512  # room enough already
    small = dataclasses.replace(loaded.config, llm=dataclasses.replace(loaded.config.llm, vocab=480))
    cut = jax.tree.map(lambda x: x, loaded.params)
    cut["llm"]["embed"] = {"table": cut["llm"]["embed"]["table"][:480]}
    cut["llm"]["head"] = {"kernel": cut["llm"]["head"]["kernel"][:, :480]}
    config, params = add_image_token(small, cut, tokenizer)
    assert config.llm.vocab == 512
    np.testing.assert_allclose(
        params["llm"]["embed"]["table"][500], cut["llm"]["embed"]["table"].mean(0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(params["llm"]["head"]["kernel"][:, :480], cut["llm"]["head"]["kernel"])
    out = export_folder(tmp_path / "out", config, params, tokenizer, SPEC, "vicuna_v1")
    assert verify(out).passed


@pytest.mark.parametrize("layout", ["hf-4", "hf-4.52", "hf-5"])
def test_a_tied_language_model(tmp_path, loaded, layout):
    config = dataclasses.replace(loaded.config, llm=dataclasses.replace(loaded.config.llm, tied=True))
    llm = {name: tree for name, tree in loaded.params["llm"].items() if name != "head"}
    out = export_folder(tmp_path / "out", config, {**loaded.params, "llm": llm}, layout=layout, image_token_id=5)
    assert not any("lm_head" in key for key in TensorFolder(out))
    assert import_folder(out).config == config
    if layout == "hf-4":
        comparison = verify(out)
        assert comparison.passed, str(comparison)
    _, said = hf.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_connectors_that_the_torch_library_lacks(tmp_path, loaded):
    rng = np.random.default_rng(0)
    for connector in (LinearConfig(), PerceiverConfig(latents=4, depth=1, heads=2, head_dim=8)):
        config = dataclasses.replace(loaded.config, connector=connector)
        params = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), KINDS["lvlm"].shapes(config, False)[0]
        )
        out = export_folder(tmp_path / type(connector).__name__, config, params, image_token_id=5)
        again = import_folder(out)
        assert (again.config, again.image_token_id) == (config, 5)
        jax.tree.map(np.testing.assert_array_equal, again.params, params)
        with pytest.raises(ValueError, match="the torch library has no class for this model"):
            verify(out)
        if isinstance(connector, LinearConfig):  # LLaVA 1's; the authors' code does have it
            again = import_folder(export_folder(tmp_path / "original", config, params, layout="llava-original"))
            assert again.config == config
        else:
            with pytest.raises(
                ValueError, match="layout has no perceiver connector between tower and language model; choose anoth"
            ):
                export_folder(tmp_path / "x", config, params, layout="llava-original")


BAD = [
    (
        {"layout": "hf-9"},
        "unknown layout 'hf-9'; for kind 'lvlm' there are hf, senses, hf-4, hf-4.52, hf-5, hf-5-memory, ll",
    ),
    ({"template": "alpaca"}, "no chat template 'alpaca'; there are plain, vicuna_v1, qwen_chatml"),
    ({"tokenizer": None}, "give the tokenizer, or image_token_id=: config.json names the token where a picture goes"),
    ({"params": {}}, r"the parameters are not those of this config: missing \['connector/linear_1/bias'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(tmp_path, loaded, change, message):
    given = {"config": loaded.config, "params": loaded.params, "tokenizer": Tokenizer(llama_tiny()), **change}
    with pytest.raises(ValueError, match=message):
        export_folder(tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_other_parameters_are_refused(tmp_path, loaded):
    params = jax.tree.map(lambda x: x, loaded.params)
    params["llm"]["norm"]["scale"] = jnp.zeros(5)
    params["llm"]["new"] = {"bias": jnp.zeros(5)}
    with pytest.raises(
        ValueError, match=r"extra \['llm/new/bias'\], other shapes \['llm/norm/scale \[5\] for \[32\]'\]"
    ):
        export_folder(tmp_path / "out", loaded.config, params, image_token_id=5)


def test_a_failure_leaves_nothing_and_the_old_folder_stands(tmp_path, loaded, monkeypatch):
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, image_token_id=5)
    with pytest.raises(FileExistsError, match="there is something already; give a new folder, or ask to overwrite"):
        export_folder(out, loaded.config, loaded.params, image_token_id=5)
    before = {key: TensorFolder(out)[key].tobytes() for key in TensorFolder(out)}
    monkeypatch.setattr("lvlm_jax.hub.export._tensors", lambda rows, read: iter([("a", np.zeros(3)), 1 / 1]))
    with pytest.raises(TypeError):
        export_folder(out, loaded.config, loaded.params, image_token_id=5, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {key: TensorFolder(out)[key].tobytes() for key in TensorFolder(out)} == before
    monkeypatch.undo()
    export_folder(out, loaded.config, loaded.params, image_token_id=6, overwrite=True)
    assert json.loads((out / "config.json").read_text())["image_token_index"] == 6


def test_bfloat16_logits_need_no_float32_copy(tmp_path, loaded):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params)
    half["connector"] = loaded.params["connector"]  # a trained part in float32: the folder promises the wider type
    out = export_folder(tmp_path / "out", loaded.config, half, image_token_id=5)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    model = hf.LlavaForConditionalGeneration.from_pretrained(out)
    got = model.model.multi_modal_projector.linear_1.bias.detach()
    assert got.dtype == tiny.torch.float32
    np.testing.assert_array_equal(got.numpy(), half["connector"]["linear_1"]["bias"])


def test_every_kind_names_its_layouts():
    released = ["hf-4", "hf-5", "hf-vit", "hf-vit-classifier"]
    assert {name: list(kind.layouts) for name, kind in KINDS.items()} == {
        "lvlm": [
            *("senses", "hf-4", "hf-4.52", "hf-5", "hf-5-memory", "llava-original"),
            *("idefics", "open_flamingo", "cogvlm", "qwen_vl", "qwen_vl-nested", "videochat2", "videochat", "minigpt4"),
            *("blip2", "instructblip", "big_vision-paligemma"),
        ],
        "sense": ["hf"],
        "dual": ["hf", "big_vision", "big_vision-scan"],
        "vision": [*released, "big_vision", "big_vision-scan", "timm", "nfnet", "vit_jax"],
        "text": ["hf-4", "hf-5"],
        "decoder": ["hf", "bare"],
        "encoder_decoder": ["hf"],
        "vq": ["hf"],
        "unified": ["hf"],
    }


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("vit_classifier", "big_vision", r"layout 'big_vision' cannot hold this model \(classifier/bias, "),
        ("dinov2", "big_vision", "layout 'big_vision' cannot hold this model"),
        ("siglip_vision", "vit_jax", "layout 'vit_jax' cannot hold this model"),
        ("vit", "hf-4", "nobody writes a vit in layout 'hf-4'; its layouts are hf-vit, hf-vit-classifier"),
    ],
)
def test_a_layout_without_a_place_for_every_weight_is_refused(tmp_path, name, layout, message):
    one = import_folder(tiny.saved(tiny.perturbed(getattr(tiny, name)()), tmp_path / "in"))
    with pytest.raises(ValueError, match=message):
        export_folder(tmp_path / "out", one.config, one.params, layout=layout)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer_goes_out_without_one(tmp_path):
    """Of Qwen's and Gemma's folders the library makes a tokenizer of a word or five where there is none."""
    for name in ("qwen2", "gemma2"):
        out = rewrite.as_folder(
            tiny.saved(tiny.perturbed(getattr(tiny, name)()), tmp_path / name), tmp_path / f"{name}-out"
        )
        assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]


def test_the_picture_processor_goes_out_with_a_tower(tmp_path):
    folder = tiny.saved(tiny.perturbed(tiny.clip_vision()), tmp_path / "in")
    spec = dataclasses.replace(SPEC, mean=(0.1, 0.2, 0.3))
    (folder / "preprocessor_config.json").write_text(json.dumps(spec.to_hf()))
    out = rewrite.as_folder(folder, tmp_path / "out")
    assert beside.image_spec(out, 7) == spec
