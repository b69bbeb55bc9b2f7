"""How much an example counts in the loss: by its tokens, by the square root of their number, or all examples alike.

A batch's loss is ``sum_i sum_t w_it l_it / sum_i sum_t w_it`` over its examples i and tokens t. With n_i the sum of
the weights that the template gave example i, its tokens get ``w_it / n_i ** p``, so that it counts ``n_i ** (1 - p)``:

| name    | p   | an example counts |
| ------- | --- | ----------------- |
| token   | 0   | n_i               |
| sqrt    | 1/2 | sqrt(n_i)         |
| example | 1   | 1                 |

Weights are set before examples are packed, and the loss is divided by the weights of the whole batch (all rows, hosts
and microbatches), so which examples share a row changes nothing. "sqrt" is InternVL's square averaging (2412.05271),
between long answers that drown short ones and short ones that drown long.
"""

import dataclasses

import numpy as np

from lvlm_jax.processing.schema import Encoded

WEIGHTINGS: dict[str, float] = {"token": 0.0, "sqrt": 0.5, "example": 1.0}
"""Name -> p."""


def weighted(encoded: Encoded, by: str) -> Encoded:
    """The example with its weights divided by a power of their sum; ValueError lists the names."""
    if by not in WEIGHTINGS:
        raise ValueError(f"weigh_by={by!r}: choose one of {list(WEIGHTINGS)}")
    total = float(encoded.weights.sum(dtype=np.float64))
    if not WEIGHTINGS[by] or not total:
        return encoded
    return dataclasses.replace(encoded, weights=np.float32(encoded.weights / total ** WEIGHTINGS[by]))
