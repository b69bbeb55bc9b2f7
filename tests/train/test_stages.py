import pytest

from lvlm_jax.train.stages import SpikePolicy, Stage, in_stage_dtype, share_text, trained_share
from tests.train import tiny


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "a/b"}, "stage.name='a/b'"),
        ({"trains": "connector/**"}, r"stages.align.trains='connector/\*\*'.*tuple"),
        ({"trains": ()}, r"stages.align.trains=\(\)"),
        ({"steps": 0}, "stages.align.steps=0"),
        ({"keep": 0}, "stages.align.keep=0"),
    ],
)
def test_bad_values_name_the_field(change, says):
    with pytest.raises(ValueError, match=says):
        tiny.stage(**change)


def test_spike_policy_is_checked():
    with pytest.raises(ValueError, match=r"spike.factor=0.5"):
        SpikePolicy(factor=0.5)
    with pytest.raises(ValueError, match=r"spike.patience=0"):
        SpikePolicy(patience=0)


def test_mask_follows_the_patterns_in_either_layout():
    scanned = tiny.params(depth=3)
    mask = tiny.stage(trains=("llm/layers/*/**", "connector/bias")).mask(scanned)
    assert mask["llm"] == {"head": {"kernel": False}, "layers": {"mlp": {"kernel": True}}}
    assert mask["connector"] == {"kernel": False, "bias": True}
    with pytest.raises(ValueError, match="'projector/\\*\\*' matches nothing"):
        tiny.stage(trains=("projector/**",)).mask(scanned)


def test_share_table():
    params = tiny.params()
    rows = trained_share(params, tiny.stage(trains=("connector/**",)).mask(params))
    assert [(r.part, r.total, r.trained) for r in rows] == [
        ("tower", 72, 0),
        ("connector", 72, 72),
        ("llm", 32, 0),
        ("all", 176, 72),
    ]
    assert share_text(rows).splitlines()[2].split() == ["connector", "72", "72", "100.00%"]


def test_dtype_of_parts():
    params = tiny.params()
    cast = in_stage_dtype(params, Stage.mask(tiny.stage(), params), "bfloat16")
    assert cast["tower"]["kernel"].dtype == "bfloat16"
    assert cast["connector"]["kernel"].dtype == "float32"
