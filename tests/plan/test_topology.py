"""Names of topologies, and what is wrong with a wrong one."""

import pytest

from lvlm_jax.config import ConfigError
from lvlm_jax.plan import topology


@pytest.mark.parametrize(
    ("name", "chips", "wraps"),
    [
        ("v5p:4x4x4", 64, (True,) * 3),
        ("v5p:2x2x2", 8, (False,) * 3),
        ("v5p:16x20x28", 8960, (True,) * 3),
        ("v5e:16x16", 256, (True, True, False)),
        ("V6E:8x8", 64, (False,) * 3),
    ],
)
def test_names(name, chips, wraps):
    found = topology.parse(name)
    assert (found.chips, found.wraps) == (chips, wraps)
    assert str(found) == name.lower()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p", "a chip and its shape, such as v5p:4x4x4"),
        ("v9:4x4", "no plans for 'v9'; choose one of v4, v5e, v5p, v6e, tpu7x, a100, h100, h200"),
        ("h100:16", "plans for GPUs are of one host, h100:1 to h100:8"),
        ("h100:2x4", "plans for GPUs are of one host"),
        ("v5p:4x4", r"a shape of v5p has 3 side\(s\), as in v5p:4x4x4"),
        ("v5e:4x4x4", r"a shape of v5e has 2 side\(s\), as in v5e:4x4"),
        ("v5e:0x4", "a shape of v5e"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(ConfigError, match=message):
        topology.parse(name)


def test_several_slices():
    found = topology.parse("v5e:16x16", 2)
    assert (found.chips, str(found), found.name) == (512, "v5e:16x16 x 2", "v5e:16x16")
    with pytest.raises(ConfigError, match="--slices=0: at least one"):
        topology.parse("v5e:16x16", 0)
    with pytest.raises(ConfigError, match="of one host"):
        topology.parse("h100:8", 2)
