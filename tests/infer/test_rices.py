"""RICES: nearest demonstrations by cosine, the most similar last; the prompt that they make."""

import numpy as np
import pytest

from lvlm_jax.infer import rices
from lvlm_jax.processing.schema import Image, Text

# Angles 0, 10, 40, 90 and 180 degrees, of very different lengths.
ANGLES = np.deg2rad([0.0, 10.0, 40.0, 90.0, 180.0])
INDEX = (np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1) * [[1.0], [100.0], [0.01], [3.0], [7.0]]).astype(np.float32)


def at(degrees):
    return np.float32([[np.cos(np.deg2rad(degrees)) * 5, np.sin(np.deg2rad(degrees)) * 5]])


@pytest.mark.parametrize(
    ("degrees", "shots", "expected"),
    [(1.0, 2, [1, 0]), (8.0, 3, [2, 0, 1]), (95.0, 1, [3]), (170.0, 2, [3, 4]), (30.0, 0, [])],
)
def test_the_most_similar_is_last(degrees, shots, expected):
    assert rices.nearest(at(degrees), rices.index(INDEX), shots)[0].tolist() == expected


def test_the_same_as_a_loop_over_random_vectors():
    rng = np.random.default_rng(0)
    features, queries = rng.normal(size=(50, 16)).astype(np.float32), rng.normal(size=(7, 16)).astype(np.float32)
    got = rices.nearest(queries, rices.index(features), 4, leave_out=[3, -1, 5, -1, -1, 0, 49])
    for row, (query, own) in enumerate(zip(queries, [3, -1, 5, -1, -1, 0, 49])):
        cosine = lambda n, q=query: features[n] @ q / np.linalg.norm(features[n]) / np.linalg.norm(q)  # noqa: E731
        order = sorted((n for n in range(50) if n != own), key=cosine)
        assert got[row].tolist() == order[-4:]


def test_of_equals_the_first_is_nearer():
    same = np.ones((3, 2), np.float32)
    assert rices.nearest(same[:1], rices.index(same), 3)[0].tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": 6}, r"shots=6, but there are 5 demonstrations"),
        ({"shots": 5, "leave_out": [2]}, r"shots=5, but there are 4 demonstrations"),
        ({"query": np.ones((1, 3), np.float32)}, r"queries are 3 wide and the index 2"),
        ({"leave_out": [1, 2]}, r"leave_out names 2 demonstrations for 1 queries"),
        ({"query": np.zeros((1, 2), np.float32)}, r"features \[0\] are zero or not finite"),
    ],
)
def test_what_has_no_answer(change, message):
    given = {"query": at(0.0), "indexed": rices.index(INDEX), "shots": 2} | change
    with pytest.raises(ValueError, match=message):
        rices.nearest(**given)
    with pytest.raises(ValueError, match=r"features \[1, 3\] are zero"):
        rices.index(INDEX * np.float32([[1], [0], [1], [np.nan], [1]]))


def test_prompt():
    a, b, c = (Image(name) for name in ("a.png", "b.png", "c.png"))
    made = rices.prompt([([a, Text("Output:")], "a dog."), ([b, Text("Output:")], "a cat.")], [c, Text("Output:")])
    assert [turn.role for turn in made.turns] == ["user"] * 3
    first, second, question = (turn.segments for turn in made.turns)
    assert first == (a, Text("Output:"), Text("a dog."))
    assert second == (b, Text("Output:"), Text("a cat."))
    assert question == (c, Text("Output:"))
