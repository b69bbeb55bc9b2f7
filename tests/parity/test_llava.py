"""LLaVA-1.5 with CLIP's and SigLIP's tower, LLaMA and Qwen2: pictures anywhere, padding, gradients, every layout."""

import jax
import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from lvlm_jax import params as P
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.zoo import llava
from tests import tiny
from tests.parity import compare
from tests.parity.test_clip import VISION
from tests.parity.test_decoders import GEMMA3, LLAMA3, SIZES
from tests.parity.test_siglip import FACTOR, TOWER

IMAGE_ID = 98
I = tiny.IMAGE
CASES = {
    "clip + llama": (CLIPVisionConfig(**VISION), LlamaConfig(**SIZES), {}, 5.0),
    "clip with class token + tied llama3": (
        CLIPVisionConfig(**VISION),
        LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "projector_hidden_act": "relu"},
        5.0,
    ),
    "siglip + qwen2": (
        SiglipVisionConfig(**TOWER, vision_use_head=False),
        Qwen2Config(**SIZES),
        {"vision_feature_select_strategy": "full"},
        FACTOR,
    ),
    "siglip with its head + llama": (
        SiglipVisionConfig(**TOWER),
        LlamaConfig(**SIZES),
        {"vision_feature_select_strategy": "full", "vision_feature_layer": 2},
        FACTOR,
    ),
}
HOSTS = {
    "siglip + qwen3": (
        SiglipVisionConfig(**TOWER, vision_use_head=False),
        Qwen3Config(**SIZES, head_dim=16),
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
        FACTOR,
    ),
    "siglip + gemma3": (
        SiglipVisionConfig(**TOWER, vision_use_head=False),
        Gemma3TextConfig(**SIZES | GEMMA3),
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "tie_word_embeddings": True},
        FACTOR,
    ),
}
"""The small systems' make: logits alone, since tower and decoder have their own tests."""
ROWS = {
    "two pictures in one row, none in another": [[2, I, 3, I, 4], [9], [4, I, 2]],
    "text alone": [[9], [12]],
}


def make(case):
    torch.manual_seed(0)
    tower, text, changes, factor = {**CASES, **HOSTS}[case]
    whole = LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE_ID, **changes)
    model = compare.perturb(LlavaForConditionalGeneration(whole), factor=factor)
    config, image_id = llava.from_hf(model.config.to_dict())
    assert image_id == IMAGE_ID
    unused = ("lm_head.weight",) if config.llm.tied else ()
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    rows = llava.rows(config, "hf-5-memory")
    return model, LVLM(config), rows, unused, compare.load(rows, compare.tensors(model, unused), shapes)


def reference(model, batch, pictures):
    return model(
        input_ids=torch.tensor(batch.tokens),
        attention_mask=torch.tensor((batch.segments > 0).astype(np.int64)),
        position_ids=torch.tensor(batch.positions),
        pixel_values=torch.tensor(pictures) if len(pictures) else None,
    ).logits


@pytest.mark.parametrize("case", [*CASES, *HOSTS])
def test_logits(case):
    model, module, _, _, params = make(case)
    run = jax.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))
    for name, rows in ROWS.items():
        for pad in ("right", "left"):
            batch, pictures = tiny.batch(module.config, rows, pad=pad, image_id=IMAGE_ID)
            with torch.no_grad():
                expected = reference(model, batch, pictures).numpy()
            shown = batch.segments > 0
            ours = np.asarray(run(params, batch))
            compare.close(ours[shown], expected[shown], f"LLaVA {case}, {name}, padded on the {pad}")


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_read(case):
    _, module, _, _, params = make(case)
    batch, _ = tiny.batch(module.config, [[3, I, 5]], image_id=IMAGE_ID)
    c = module.config.vision
    first_unread = c.depth + 1 + c.feature_layer
    beyond = tuple(f"vision/trunk/layers/{i}/" for i in range(first_unread, c.depth))
    run = jax.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))
    unread = compare.dead(lambda p: run(p, batch), params)
    # What comes after the layer that is read; and a class token's own final norm and pooling.
    expected = {k for k in P.flatten(params) if k.startswith((*beyond, "vision/post_norm/", "vision/head/"))}
    # Biases of keys without rotary positions shift all scores of a query alike.
    key_biases = {k for k in P.flatten(params) if k.startswith("vision/") and k.endswith("/k/bias")}
    assert unread - key_biases == expected - key_biases


@pytest.mark.parametrize("case", ["clip + llama", "siglip + qwen2"])
def test_gradients(case):
    model, module, rows, unused, params = make(case)
    batch, pictures = tiny.batch(module.config, [[2, I, 3, I, 4], [9], [4, I, 2]], image_id=IMAGE_ID)
    expected = reference(model, batch, pictures)
    compare.same_gradients(expected, model, module, params, batch, tiny.logits, rows, unused, f"LLaVA {case}")


def test_layouts_differ_in_names_only():
    _, module, _, _, params = make("clip + llama")
    flat = {k: np.asarray(v) for k, v in P.flatten(params).items()}
    for layout in llava.LAYOUTS:
        rows = llava.rows(module.config, layout)
        theirs = {row.theirs: row.save(flat) for row in rows}
        assert llava.layout_of(theirs) == layout
        back = compare.load(rows, theirs, params, layout)
        assert all(np.array_equal(flat[k], v) for k, v in P.flatten(back).items())


def test_a_fresh_save_is_in_the_layout_named_hf_5(tmp_path):
    from safetensors.numpy import load_file

    model, module, _, _, params = make("clip + llama")
    model.save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    assert llava.layout_of(theirs) == "hf-5"
    compare.load(llava.rows(module.config, "hf-5"), theirs, params, str(tmp_path))
