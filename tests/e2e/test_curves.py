"""One hundred steps of one small LLaVA-1.5 in the torch library and here: same weights and batches, equal curves."""

import jax
import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    get_cosine_schedule_with_warmup,
)

from lvlm_jax import assemble
from lvlm_jax import params as trees
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.models.lvlm import LVLM
from lvlm_jax.recipe import Data, StageRecipe
from lvlm_jax.train.optim import OptimizerConfig, make_optimizer, make_schedule
from lvlm_jax.train.step import init_state, make_train_step
from tests import tiny

STEPS, WARMUP, CLIP, DECAY = 100, 3, 1.0, 0.1
BETAS, EPS = (0.9, 0.98), 1e-8
STAGES = {
    "align": (("connector/**",), 1e-2),
    "instruct": (("connector/**", "llm/**"), 1e-3),
}
IMAGE_ID = 98
I = tiny.IMAGE
ROWS = [[3, I, 2], [2, I, 3, I, 2], [6, I, 1], [6, 1]]

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
PICTURE = {"image_size": 28, "patch_size": 7}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def reference():
    """A small LLaVA-1.5 whose frozen decoder is not deaf to its input: fresh weights of 0.02 are."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, **PICTURE),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE_ID,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5) if weight.ndim > 1 else weight.add_(0.1 * torch.randn(weight.shape))
    return model


def batches(config):
    """Two batches in turn: few enough to be learnt by heart."""
    return [tiny.batch(config, ROWS, image_id=IMAGE_ID, seed=seed) for seed in (0, 1)]


def theirs(model, stage, made):
    """The losses of the torch library's own training."""
    model.requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.requires_grad_("projector" in name or ("llm/**" in stage.trains and "vision_tower" not in name))
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": DECAY},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0},
    ]
    adam = torch.optim.AdamW(groups, lr=stage.optimizer.learning_rate, betas=BETAS, eps=EPS)
    schedule = get_cosine_schedule_with_warmup(adam, WARMUP, STEPS)
    losses = []
    for step in range(STEPS):
        batch, pictures = made[step % len(made)]
        loss = model(
            input_ids=torch.tensor(batch.tokens),
            attention_mask=torch.tensor((batch.segments > 0).astype(np.int64)),
            position_ids=torch.tensor(batch.positions),
            pixel_values=torch.tensor(pictures),
            labels=torch.tensor(np.where(batch.weights > 0, batch.tokens, -100)).long(),
        ).loss
        losses.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        adam.step()
        schedule.step()
    return np.array(losses)


def ours(config, params, recipe, made):
    """The losses of this library's step, with the loss that a recipe gives it."""
    model, stage = LVLM(config), recipe.stage("stage")
    mask = stage.mask(params)
    trained, frozen = trees.split(params, mask)
    tx = make_optimizer(stage.optimizer, STEPS, trained)
    loss_fn = assemble.loss_of(recipe, model, trees.flatten(mask)["llm/head/kernel"])
    step = make_train_step(loss_fn, tx, schedule=make_schedule(stage.optimizer, STEPS))
    state, losses = init_state(jax.tree.map(lambda x: x.copy(), trained), tx), []
    for number in range(STEPS):
        state, metrics = step(state, frozen, made[number % len(made)][0])
        losses.append(float(metrics["loss"]))
    return np.array(losses)


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost more than they give on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["align", pytest.param("instruct", marks=pytest.mark.slow)])
def test_curves_are_equal(name, tmp_path):
    trains, rate = STAGES[name]
    adam = OptimizerConfig(
        learning_rate=rate, warmup=WARMUP, b1=BETAS[0], b2=BETAS[1], eps=EPS, weight_decay=DECAY, clip=CLIP
    )
    recipe = StageRecipe(trains=trains, steps=STEPS, optimizer=adam, data=Data(source="easy_vqa"))
    model = reference()
    model.save_pretrained(tmp_path / "llava")
    loaded = import_folder(tmp_path / "llava")
    made = batches(loaded.config)
    with jax.default_matmul_precision("highest"):
        got = ours(loaded.config, loaded.params, recipe, made)
    want = theirs(model, recipe, made)
    apart = np.abs(got - want)
    print(
        f"{name}: loss {want[0]:.4f} to {want[-1]:.4f}, largest difference {apart.max():.1e} at step {apart.argmax()}"
    )
    assert rate >= 1e-3
    assert want[-2:].mean() <= 0.7 * want[:2].mean()
    assert apart.max() <= 1e-4
