"""How many drawings of each vendor the tower of a `smollm2_emoji` run finds the right name for, among all names.

Run:      python -m tests.e2e.emoji_tower runs/emoji
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import assemble, checkpoint, recipe, workdir
from lvlm_jax.data.emoji import VENDORS
from lvlm_jax.params import is_stacked


def features(found, stage, tokenizer, params, cache):
    """Image and text features and the ids of the names, one row a drawing."""
    loader = assemble.loader_of(found, stage, tokenizer, cache=cache)
    model, _ = assemble.stage_model(found, stage)
    model = model.clone(scan=is_stacked(params))
    run = jax.jit(lambda batch: model.apply({"params": params}, batch)[:2])
    out, drawings = [], len(loader.source)
    for _, batch in loader.iterate(0):
        real = np.asarray(batch.segments).max(1) > 0
        out.append([np.asarray(part)[real] for part in (*run(batch), batch.tokens)])
        drawings -= real.sum()
        if drawings <= 0:
            break
    return [np.concatenate(parts)[: len(loader.source)] for parts in zip(*out)]


def recall(images, texts, names):
    """Share of images whose likeliest name is their own; equal names count as one."""
    names, first, own = np.unique(names, axis=0, return_index=True, return_inverse=True)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    return float((jnp.argmax(unit(images) @ unit(texts[first]).T, 1) == own.ravel()).mean()), len(images), len(names)


def main(folder):
    found = recipe.resolve(workdir.recipe_of(folder))
    params = checkpoint.load_params(Path(folder) / "vision" / "params")
    tokenizer, stage = assemble.tokenizer_of(found.model), found.stages["vision"]
    for vendor in VENDORS:
        data = dataclasses.replace(stage.data, augment=recipe.Augment(), vendors=(vendor,))
        of, drawings, names = recall(
            *features(found, dataclasses.replace(stage, data=data), tokenizer, params, Path(folder) / "cache")
        )
        print(f"{vendor}: {of:.1%} of {drawings:,} drawings, {names:,} names", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
