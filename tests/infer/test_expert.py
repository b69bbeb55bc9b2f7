"""Generation with a visual expert: what a picture's positions hold depends on their row, so rows do not share them."""

import dataclasses
import functools

import pytest

from lvlm_jax.connectors import GatedConfig
from lvlm_jax.infer.prompt import as_example
from lvlm_jax.models.lvlm import LVLM
from tests.infer import tiny


@functools.cache
def expert():
    plain = tiny.tiny_system()
    decoder = dataclasses.replace(plain.config.llm, kv_heads=plain.config.llm.heads)
    config = dataclasses.replace(plain.config, expert=True, connector=GatedConfig(hidden=24), llm=decoder)
    return dataclasses.replace(plain, model=LVLM(config), params=tiny._weights(config))


def prompts(pictures):
    return [["What is it?", pictures[0]], ["dogs", pictures[0]], [pictures[0], "Which color?"], ["no picture"]]


def vision_rows(system, pictures):
    encoded = [system.encode(as_example(prompt)) for prompt in prompts(pictures)]
    return system.generator.batch_of(encoded, 4).patches.shape[1]


def test_rows_about_one_picture_have_it_each(system, pictures):
    assert (vision_rows(system, pictures), vision_rows(expert(), pictures)) == (1, 4)  # three, rounded up


@pytest.mark.nightly
def test_questions_about_one_picture_in_one_batch_are_answered_as_alone(pictures):
    together = expert().generate_batch(prompts(pictures), max_new_tokens=6)
    assert together == [expert().generate(prompt, max_new_tokens=6) for prompt in prompts(pictures)]
    assert len(set(together)) > 2
