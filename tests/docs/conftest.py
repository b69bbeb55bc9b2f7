"""A folder like the one a reader of the documentation stands in: a trained run, and a few pictures."""

import shutil

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.hub.convert import export_folder
from tests.infer.tiny import tiny_system

PICTURES = ("photo.png", "cat.jpg", "dog.jpg", "a.png", "b.png")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """`runs/quickstart` as training leaves it, and pictures, in a folder."""
    home, system = tmp_path_factory.mktemp("home"), tiny_system()
    (home / "runs" / "quickstart").mkdir(parents=True)
    out = home / "runs" / "quickstart" / "export"
    export_folder(out, system.config, system.params, system.tokenizer, system.spec, system.template)
    for seed, name in enumerate(PICTURES):
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 20, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(home / name)
    return home


@pytest.fixture
def home(finished_run, tmp_path, monkeypatch):
    """The current folder, a copy of `finished_run`."""
    shutil.copytree(finished_run, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"
