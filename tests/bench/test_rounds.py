"""Turns and spreads."""

import pytest

from lvlm_jax.bench import rounds
from lvlm_jax.bench.rounds import OURS, Row, Spread


@pytest.mark.slow
def test_sides_take_turns_and_the_first_call_is_not_counted(monkeypatch):
    monkeypatch.setattr(rounds, "SETTLE", 0.0)
    called, said = [], []

    def side(name):
        def measure():
            called.append(name)
            return float(len(called))

        return measure

    taken = rounds.interleaved({OURS: side("a"), "torch": side("b")}, 2, said.append)
    assert called == ["a", "b", "b", "a", "a", "b"]
    assert taken == {OURS: [4.0, 5.0], "torch": [3.0, 6.0]}
    assert said == [
        "  round 0 of 2: warm",
        "  round 1 of 2: ours 4.000 s, torch 3.000 s",
        "  round 2 of 2: ours 5.000 s, torch 6.000 s",
    ]


def test_a_ratio_is_of_a_round_and_not_of_the_medians():
    row = Row(name="x", work=10, unit="tokens", seconds={OURS: [1.0, 4.0, 2.0], "torch": [2.0, 4.0, 8.0]})
    assert row.ratio("torch") == Spread(1.0, 2.0, 4.0)
    assert row.rate(OURS) == Spread(2.5, 5.0, 10.0)
    assert row.others == ["torch"]


def test_rounds_of_unequal_number_are_a_mistake():
    row = Row(name="x", work=10, unit="tokens", seconds={OURS: [1.0], "torch": [2.0, 4.0]})
    with pytest.raises(ValueError, match="zip"):
        row.ratio("torch")
