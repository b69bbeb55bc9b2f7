import json
import sys

import jax.numpy as jnp
import pytest

from lvlm_jax import chips
from lvlm_jax.train.log import Log, read_rows
from tests.train import tiny

STATE = None


def _metrics(step, **more):
    numbers = {"loss": 1.0 / step, "lr": 0.1, "grad_norm": 2.0, "weight": 4.0, "skipped": 0}
    numbers |= {"tokens": 8, "targets": 4, "images": 2}
    return {name: jnp.asarray(value) for name, value in (numbers | more).items()} | {"data_wait": 0.0}


def _run(folder, start, stop, **options):
    log = Log(folder, stage=tiny.stage(log_every=2, steps=10), start=start, **options)
    for step in range(start + 1, stop + 1):
        log(step, STATE, _metrics(step))
    log.close()


def test_rows_and_columns(tmp_path, capsys):
    _run(tmp_path, 0, 10, trained=0.25)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    names = {"stage", "step", "loss", "lr", "grad_norm", "tokens_per_s", "images_per_s", "steps_per_s", "data_wait"}
    assert rows[1].keys() == names | {"labelled", "trained", "skipped", "goodput"}  # no MFU on a CPU
    assert 0 < rows[1]["goodput"] <= 1
    assert (rows[1]["labelled"], rows[1]["trained"], rows[1]["loss"]) == (0.5, 0.25, 0.25)
    text = capsys.readouterr().err  # plain lines where there is no terminal
    assert "align 4/10  loss 0.25" in text
    assert "trained 25%" in text


def test_resume_drops_rows_that_will_run_again(tmp_path):
    _run(tmp_path, 0, 8)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # cut off by a kill
    again = Log(tmp_path, stage=tiny.stage(), start=6)
    again.close()
    assert again.again == 8
    _run(tmp_path, 4, 10)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2, 4, 6, 8, 10]


def test_not_a_number_is_valid_json(tmp_path):
    log = Log(tmp_path, stage=tiny.stage())
    log.row(1, {"loss": float("nan"), "eval/exact": jnp.float32(0.5)})
    log.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "stage": "align",
        "step": 1,
        "loss": None,
        "eval/exact": 0.5,
    }


def test_tensorboard_by_name(tmp_path):
    _run(tmp_path, 0, 4, writers=("tensorboard",))
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_unknown_and_missing_writers(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'tensorbord'.*\['tensorboard', 'wandb'\]"):
        _run(tmp_path, 0, 1, writers=("tensorbord",))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"'wandb' needs a package: pip install 'lvlm-jax\[log\]'"):
        _run(tmp_path, 0, 1, writers=("wandb",))


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    chip = chips.of_kind(kind)
    assert (chip and chip.flops) == peak


def test_mfu_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(chips, "of_kind", lambda kind: chips.CHIPS["v5e"])
    _run(tmp_path, 0, 4, flops=1e6)
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["mfu"] > 0
