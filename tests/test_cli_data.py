"""`lvlm data`, as a user types it."""

import json

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvlm_jax.cli import main
from lvlm_jax.data.prepare import LAYOUTS

TALK = [{"from": "human", "value": "what is the color of the shape?"}, {"from": "gpt", "value": "red"}]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"talk": [TALK] * 200}), path)
    return path


def lvlm(capsys, *words):
    status = main(["data", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("rename", ['["conversations=talk"]', "('conversations=talk',)", "conversations=talk"])
def test_any_source_of_a_recipe_is_checked_and_shown(rename, table, capsys):
    words = ["--source", "parquet", "--path", table, "--option", f"rename={rename}"]
    status, out, _ = lvlm(capsys, "check", *words)
    assert status == 0
    assert "200 records: 200 good, 0 bad" in out
    assert out.startswith("as quickstart reads it (template vicuna_v1, tokenizer easy_vqa)")
    status, out, _ = lvlm(capsys, "show", *words, "--index", 3)
    assert status == 0
    assert f"{table}: row 3" in out
    assert "»" in out
    status, _, err = lvlm(capsys, "show", *words, "--index", 200)
    assert status == 2
    assert err == f"lvlm data: --index 200: {table} has 200 records, --index 0 to 199\n"


def test_how_full_rows_of_ones_own_data_are(table, capsys):
    words = ["--source", "parquet", "--path", table, "--option", 'rename=["conversations=talk"]']
    status, out, _ = lvlm(capsys, "packing", *words, "--length", 40, "--rows", 4, "--groups", 2)
    assert status == 0
    assert out.splitlines()[2].startswith(f"| {table} | 40 | 2 | 0 |")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["check", "--source", "parket", "--path", "x"],
            "--source parket (did you mean 'parquet'?): choose one of easy_vqa,",
        ),
        (["check", "--source", "parquet"], "lvlm data: --path: parquet needs it; give its path"),
        (
            ["check", "--source", "easy_vqa", "--images", "x"],
            "lvlm data: --images='x' is not read by source='easy_vqa'",
        ),
        (
            ["check", "--source", "parquet", "--path", "x", "--option", "min_score=1"],
            "min_score=1.0 is not read by sourc",
        ),
        (["check", "--source", "parquet", "--path", "x", "--option", "renam=1"], "no such field"),
        (["check", "--source", "parquet", "--path", "x", "--option", "rename"], "--option rename: write NAME=VALUE"),
        (["check", "--llava", "x", "--path", "y"], "--path and --option belong to --source KIND"),
        (["check", "--source", "webdataset", "--path", "gone/*.tar"], "gone/*.tar: no file matches"),
        (["prepare", "."], "holds none of blip_laion_cc_sbu_558k.json, llava_v1_5_mix665k.json"),
        (["prepare", ".", "--tokenizer", "x"], "--tokenizer needs --config"),
        ([], "say what to do; see lvlm data --help"),
    ],
)
def test_a_mistake_is_one_message(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = lvlm(capsys, *words)
    assert status == 2
    assert message in err
    assert err.startswith("lvlm data: ")


def test_a_public_set_is_prepared_with_lengths_in_tokens(tmp_path, capsys):
    (tmp_path / LAYOUTS["558k"].file).write_text(json.dumps([{"id": "1", "conversations": TALK}]))
    (tmp_path / "images").mkdir()
    status, out, _ = lvlm(capsys, "prepare", tmp_path, "--config", "quickstart", "--svg", tmp_path / "lengths.svg")
    assert status == 0
    assert "1 records (published: 558,128)" in out
    assert "tokens a record:" in out
    assert (tmp_path / "lengths.svg").read_text().startswith("<svg ")
    status, out, _ = lvlm(capsys, "prepare", tmp_path, "--set", "558k")
    assert status == 0
    assert "words a record:" in out


def test_a_tokenizer_that_cannot_be_fetched_is_named_by_its_flag(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    words = ["check", "--source", "parquet", "--path", table, "--option", "rename=conversations=talk"]
    status, _, err = lvlm(capsys, *words, "--tokenizer", "lvlm/absent")
    assert status == 2
    assert err.startswith("lvlm data: --tokenizer: lvlm/absent: no such folder here")
    status, _, err = lvlm(capsys, *words, "--config", "llava15_instruct")
    assert status == 2
    assert err.startswith(
        "lvlm data: the tokenizer of --config=llava15_instruct (--tokenizer gives another): llava-hf/llava-1.5-7b-hf: "
    )
