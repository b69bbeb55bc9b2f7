import numpy as np
import pytest

from lvlm_jax import assemble, recipe
from lvlm_jax.config import ConfigError
from lvlm_jax.data.lengths import Measured
from lvlm_jax.processing.encode import DataError
from lvlm_jax.run import Run


@pytest.fixture
def quick():
    return recipe.load("quickstart:tiny")


def test_a_restart_throws_away_all_that_the_run_before_left(quick, tmp_path):
    Run(quick, tmp_path).claim(resume=True)
    kept = [tmp_path / "notes.txt", tmp_path / "cache" / "lengths.npz"]
    stale = [tmp_path / "evaluation" / "after_align" / "summary.json", tmp_path / "export" / "config.json"]
    stale += [tmp_path / "align" / "params" / "manifest.json", tmp_path / "instruct" / "checkpoints" / "4" / "x"]
    for file in kept + stale:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    Run(quick, tmp_path).claim(resume=True)
    assert all(file.exists() for file in kept + stale)
    Run(quick, tmp_path).claim(resume=False)
    assert all(file.exists() for file in kept)
    assert not any(file.exists() for file in stale)


def test_a_folder_that_no_run_wrote_is_left_alone(quick, tmp_path):
    (tmp_path / "align").mkdir()
    Run(quick, tmp_path).claim(resume=False)
    assert (tmp_path / "align").is_dir()


def test_a_bucket_is_refused_by_name(quick):
    with pytest.raises(ConfigError, match="gs://bucket/run: give a folder"):
        Run(quick, "gs://bucket/run")


def test_a_contrastive_stage_takes_one_picture_a_caption(quick, monkeypatch):
    stage = quick.stages["vision"]
    tokenizer = assemble.tokenizer_of(quick.model)

    def measured(source, *_, **__):
        pictures = np.ones(len(source), np.int64)
        pictures[3] = 2
        return Measured(np.full(len(source), 5), pictures)

    monkeypatch.setattr(assemble, "measure_lengths", measured)
    with pytest.raises(DataError, match=r"3\.png .*2 pictures, but a contrastive stage"):
        assemble.loader_of(quick, stage, tokenizer)


def test_a_contrastive_stage_checks_ids_against_its_text_tower(quick):
    tokenizer = assemble.tokenizer_of(quick.model)
    data, text = quick.stages["vision"].data, quick.contrastive.text
    assert assemble.encoder_of(quick.model, tokenizer, data, text).keywords["embedding_size"] == text.vocab
