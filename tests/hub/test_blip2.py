"""BLIP-2 and InstructBLIP folders in and out: byte for byte, a complete folder, and the torch library's own answers."""

import numpy as np
import PIL.Image
import pytest
import transformers as hf

from lvlm_jax import api
from lvlm_jax.connectors import QFormerConfig
from lvlm_jax.hub import beside
from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.hub.safetensors_io import TensorFolder
from lvlm_jax.hub.verify import verify
from lvlm_jax.infer.beam import Beams
from lvlm_jax.infer.prompt import as_example
from lvlm_jax.processing.image import ImageSpec, preprocess
from lvlm_jax.processing.instruction import Instruction
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.zoo import blip2, instructblip
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD
from tests.hub import tiny
from tests.hub.test_convert import same_bytes
from tests.parity.test_blip2 import CASES, build
from tests.tokenizers_tiny import bert_tiny, llama_tiny, opt_tiny, t5_tiny

SPEC = ImageSpec(size=28, patch=7, mean=CLIP_MEAN, std=CLIP_STD, fit="squash")
WORDS = {"opt": (opt_tiny, "blip2"), "t5": (t5_tiny, "blip2_t5"), "llama": (llama_tiny, "instructblip")}
EACH = [pytest.param(name, marks=pytest.mark.slow) for name in CASES]


def no_key_is_left(case, folder):
    model, said = CASES[case][0].from_pretrained(folder, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("case", EACH)
def test_there_and_back(tmp_path, case):
    folder = tiny.saved(build(case)[0], tmp_path / "in")
    loaded = import_folder(folder)
    name = "instructblip" if "instruct" in case else "blip2"
    assert (loaded.kind, loaded.layout, loaded.image_token_id) == ("lvlm", name, 98)
    assert loaded.config.llm.tied is ("opt" in case)
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, image_token_id=98)
    same_bytes(TensorFolder(folder), TensorFolder(out))
    again = import_folder(out)
    assert (again.config, again.image_token_id) == (loaded.config, 98)
    no_key_is_left(case, out)
    comparison = verify(folder)
    assert comparison.passed, str(comparison)


@pytest.mark.parametrize("case", EACH)
def test_a_complete_folder(tmp_path, case):
    """The torch library's processor and model on our folder: the same ids and pixels, and the same five beams."""
    make, template = WORDS[case.split(", ")[1]]
    tokenizer = Tokenizer(make())
    image_id = tokenizer.special_id("<image>")
    loaded = import_folder(tiny.saved(build(case, image_id, vocab_size=512)[0], tmp_path / "in"))
    said = Instruction(Tokenizer(bert_tiny()), 14) if loaded.config.instructed else None
    out = export_folder(tmp_path / "out", loaded.config, loaded.params, tokenizer, SPEC, template, instruction=said)
    comparison = verify(out, prompt="What is the color?")
    assert comparison.passed, str(comparison)
    assert (beside.image_spec(out, 7), beside.chat_template(out).name) == (SPEC, template)

    model, processor = no_key_is_left(case, out), hf.AutoProcessor.from_pretrained(out)
    assert type(processor).__name__ == ("InstructBlipProcessor" if said else "Blip2Processor")
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 100, 3), np.uint8))
    inputs = processor(images=image, text="What is the color?", return_tensors="pt")
    np.testing.assert_allclose(inputs["pixel_values"][0].numpy(), preprocess(image, SPEC).transpose(2, 0, 1), atol=1e-6)
    system = api.load(out)
    prompt = system.encode(as_example("What is the color?", image))
    assert prompt.tokens.tolist() == inputs["input_ids"][0].tolist()
    if said:
        assert system.instruction.length == 14
        assert [list(ids) for ids in prompt.instructions] == inputs["qformer_input_ids"].tolist()
    system.generator.eos_ids = frozenset()
    theirs = model.generate(**inputs, max_new_tokens=6, num_beams=5, do_sample=False, eos_token_id=None)[0].tolist()
    got = system.generator.generate([prompt], max_new_tokens=6, sampling=Beams(count=5))
    assert list(got[0].tokens) == theirs[-6:]
    greedy = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()
    # Beside another row, which says nothing of a picture.
    both = system.generator.generate([prompt, system.encode(as_example("no picture"))], max_new_tokens=6)
    assert list(both[0].tokens) == greedy[-6:]
    seen = system.embed_images(image, *(["What is the color?"] if said else []))
    assert seen.shape == (1, 6, 32)


def test_a_folder_without_its_second_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="qformer_tokenizer: not there; the connector of this model reads"):
        beside.instruction(tmp_path, QFormerConfig(vocab=99))


HUB = {
    "model_type": "blip-2",
    "image_token_index": 50265,
    "num_query_tokens": 32,
    "qformer_config": {"classifier_dropout": None, "model_type": "blip_2_qformer"},
    "text_config": {
        "eos_token_id": 50118,
        "ffn_dim": 10240,
        "hidden_size": 2560,
        "model_type": "opt",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 50304,
        "word_embed_proj_dim": 2560,
    },
    "vision_config": {"model_type": "blip_2_vision_model", "num_channels": 3},
}
"""Salesforce/blip2-opt-2.7b, less what bears on no number."""


def test_the_hubs_config_is_the_preset():
    assert blip2.from_hf(HUB) == (blip2.SYSTEMS["blip2_opt_2_7b"].config, 50265)
    old = {key: value for key, value in HUB.items() if key != "image_token_index"}  # before 4.46
    assert blip2.from_hf(old)[1] == 50303


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "instructblip"}, "model_type is 'instructblip'.*'blip-2'"),
        ({"qformer_config": {"use_qformer_text_input": True}}, "use_qformer_text_input is True.*supported: False"),
        ({"text_config": {"model_type": "gpt2"}}, "text_config.model_type is 'gpt2'.*'opt', 'llama', 't5'"),
    ],
)
def test_what_we_cannot_run_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        blip2.from_hf(HUB | change)
    with pytest.raises(ValueError, match="has no layout 'hf-5'"):
        instructblip.rows(instructblip.SYSTEMS["instructblip_vicuna_7b"].config, "hf-5")
