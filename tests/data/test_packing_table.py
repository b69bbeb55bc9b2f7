from pathlib import Path

import numpy as np
import pytest

from lvlm_jax.data import packing_table
from lvlm_jax.data.packing_table import HEAD, Histogram, committed, measure, row

from .test_packing import naive_best_fit_decreasing

README = Path(packing_table.__file__).with_name("README.md")


@pytest.mark.parametrize("length", [2048, 4096, 8192])
@pytest.mark.parametrize("name", committed())
def test_a_plan_reaches_what_offline_packing_reaches(name, length):
    line = measure(name, committed()[name], length)
    assert line.share >= 0.99
    assert line.left_out == 0
    assert row(line) in README.read_text()


def test_the_readme_has_the_whole_table():
    text = README.read_text()
    assert HEAD in text
    rows = [line for line in text.splitlines() if line.startswith(tuple(f"| {name} |" for name in committed()))]
    assert len(rows) == len(committed()) * 3 * 2
    assert all(float(line.split("|")[7]) >= 0.99 for line in rows)


def test_the_offline_packing_is_best_fit_decreasing():
    lengths = np.random.default_rng(0).integers(5, 90, 400)
    line = measure("x", Histogram("", lengths, np.zeros(400, int)), 100, rows=8, groups=2)
    assert line.offline == naive_best_fit_decreasing(lengths.tolist(), 100)
    assert line.stats.vision_fill == 0


def test_examples_longer_than_a_row_are_counted():
    lengths, pictures = np.asarray([50] * 200 + [300] * 3), np.ones(203, int)
    line = measure("x", Histogram("", lengths, pictures), 100, rows=4, groups=2)
    assert line.left_out == 3
    assert line.stats.examples == 200
    assert line.vision_rows == 4
