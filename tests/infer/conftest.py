import dataclasses

import numpy as np
import pytest

from tests.infer.tiny import tiny_system


@pytest.fixture(scope="session")
def system():
    return tiny_system()


@pytest.fixture
def fresh(system):
    """The same system, to be changed."""
    return dataclasses.replace(system)


@pytest.fixture(scope="session")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8) for i in range(6)]
