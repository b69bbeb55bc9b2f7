import numpy as np
import pytest

from lvlm_jax.processing.schema import Encoded
from lvlm_jax.processing.weighting import weighted


def encoded(weights):
    zeros = np.zeros(len(weights), np.int32)
    return Encoded(tokens=zeros, weights=np.asarray(weights, np.float32), visual=zeros - 1)


@pytest.mark.parametrize(("by", "counts"), [("token", (4, 9)), ("sqrt", (2, 3)), ("example", (1, 1))])
def test_what_an_example_counts(by, counts):
    for size, count in zip((4, 9), counts, strict=True):
        got = weighted(encoded([0, 0, *[1] * size, 0]), by).weights
        assert got.dtype == np.float32
        assert got.sum() == pytest.approx(count)
        assert not got[[0, 1, -1]].any()
        assert len(set(got[2:-1].tolist())) == 1


def test_a_templates_own_weights_keep_their_proportion():
    got = weighted(encoded([0, 1, 3]), "example").weights
    assert got.tolist() == [0, 0.25, 0.75]


def test_nothing_to_learn_stays_nothing_and_an_unknown_name_is_refused():
    assert not weighted(encoded([0, 0]), "sqrt").weights.any()
    with pytest.raises(ValueError, match=r"weigh_by='length': choose one of \['token', 'sqrt', 'example'\]"):
        weighted(encoded([1]), "length")
