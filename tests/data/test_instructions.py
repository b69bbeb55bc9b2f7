"""What a connector reads beside each picture travels with the picture, from threads and from workers alike."""

import contextlib
import functools

import numpy as np
import pytest

from lvlm_jax.data.loader import Loader, measure_lengths
from lvlm_jax.data.packing import PackingPlan
from lvlm_jax.data.sources import LlavaJson
from lvlm_jax.processing.instruction import Instruction
from lvlm_jax.processing.tokenizer import Tokenizer
from tests.data.conftest import Q
from tests.tokenizers_tiny import bert_tiny

LENGTH = 12


def make(album, encoder, spec, workers=0):
    encode = functools.partial(encoder, instruction=Instruction(Tokenizer(bert_tiny()), LENGTH))
    source = LlavaJson(album)
    measured = measure_lengths(source, encode, progress=False)
    sizes = {"rows": 4, "length": 80, "groups": 2, "vision_rows": 5}
    plan = PackingPlan(measured.lengths, measured.pictures, seed=0, **sizes)
    more = {"visual_tokens": Q, "pad_id": 0, "workers": workers, "instruction": LENGTH}
    return Loader(source, encode, spec, plan=plan, **more)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_picture_has_its_own(album, encoder, spec, workers):
    loader = make(album, encoder, spec, workers)
    with contextlib.closing(loader.iterate()) as batches:
        _, batch = next(batches)
    assert batch.instruction.shape == (2, 5, LENGTH)
    seen = np.zeros((2, 5), bool)
    for row, examples in enumerate(loader.plan.batch(0)):
        at, group = 0, row // 2
        for encoded in (loader.encode(loader.source[index]) for index in examples):
            here = batch.image_index[row, at : at + len(encoded.tokens)]
            assert len(encoded.instructions) == len(encoded.images)
            for number, ids in enumerate(encoded.instructions):
                slot = here[encoded.visual // Q == number][0] // Q
                padded = np.pad(ids, (0, LENGTH - len(ids)), constant_values=-1)
                assert batch.instruction[group, slot].tolist() == padded.tolist()
                seen[group, slot] = True
            at += len(encoded.tokens)
    assert seen.any()
    assert (batch.instruction[~seen] == -1).all()
