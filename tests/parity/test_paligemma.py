"""PaliGemma 1 and 2: the prefix sees itself whole, what follows is causal; pictures, text alone, windows, soft caps."""

import jax
import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.zoo import paligemma
from tests import tiny
from tests.parity import compare
from tests.parity.test_decoders import GEMMA, SIZES
from tests.parity.test_siglip import FACTOR, TOWER

IMAGE_ID = 98
I = tiny.IMAGE
# A window shorter than the prefix: the prefix is not cut by it, what follows is.
CASES = {
    "paligemma": GemmaConfig(**SIZES | GEMMA | {"num_key_value_heads": 1}),
    "paligemma2": Gemma2Config(
        **SIZES | GEMMA, query_pre_attn_scalar=24, sliding_window=6, attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
}  # fmt: skip
ROWS = {
    "pictures first": [[I, 3, 4], [I, I, 2, 5], [I, 6, 1]],
    "text alone": [[9, 4], [12, 2]],
}
UNUSED = ("lm_head.weight",)


def make(case):
    torch.manual_seed(0)
    tower = SiglipVisionConfig(**TOWER, vision_use_head=False, projection_dim=32)
    whole = PaliGemmaConfig(
        vision_config=tower, text_config=CASES[case], image_token_index=IMAGE_ID, projection_dim=32, hidden_size=32
    )
    model = compare.perturb(PaliGemmaForConditionalGeneration(whole), factor=FACTOR)
    config, image_id = paligemma.from_hf(model.config.to_dict())
    assert image_id == IMAGE_ID
    assert paligemma.fits(config)
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    rows = paligemma.rows(config, "hf-5-memory")
    return model, LVLM(config), rows, compare.load(rows, compare.tensors(model, UNUSED), shapes)


def reference(model, batch, pictures):
    """The suffix begins at the first target."""
    suffix = np.cumsum(batch.weights > 0, axis=1) > 0
    return model(
        input_ids=torch.tensor(batch.tokens),
        attention_mask=torch.tensor((batch.segments > 0).astype(np.int64)),
        token_type_ids=torch.tensor(suffix.astype(np.int64)),
        pixel_values=torch.tensor(pictures) if len(pictures) else None,
    ).logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ROWS)
def test_logits(case, name):
    model, module, _, params = make(case)
    batch, pictures = tiny.batch(module.config, ROWS[name], image_id=IMAGE_ID)
    with torch.no_grad():
        expected = reference(model, batch, pictures).numpy()
    ours = np.asarray(jax.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))(params, batch))
    shown = batch.segments > 0
    compare.close(ours[shown], expected[shown], f"{case}, {name}")


@pytest.mark.parametrize("case", ["paligemma", pytest.param("paligemma2", marks=pytest.mark.slow)])
def test_gradients(case):
    model, module, rows, params = make(case)
    batch, pictures = tiny.batch(module.config, ROWS["pictures first"], image_id=IMAGE_ID)
    expected = reference(model, batch, pictures)
    compare.same_gradients(expected, model, module, params, batch, tiny.logits, rows, UNUSED, case)


def test_every_weight_is_read():
    _, module, _, params = make("paligemma2")
    batch, _ = tiny.batch(module.config, [[I, 3, 5]], image_id=IMAGE_ID)
    run = jax.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))
    unread = compare.dead(lambda p: run(p, batch), params)
    # Biases of keys without rotary positions shift all scores of a query alike.
    assert not {path for path in unread if not path.endswith("/k/bias")}
