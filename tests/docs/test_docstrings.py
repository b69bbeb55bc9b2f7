"""Every example in a docstring of the package runs."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

import lvlm_jax
from lvlm_jax.mesh import make_mesh
from tests.infer.tiny import tiny_system

REQUIRED = (
    "lvlm_jax.vision.vit.ViT",
    "lvlm_jax.connectors.perceiver.PerceiverResampler",
    "lvlm_jax.llm.decoder.Decoder",
    "lvlm_jax.llm.encoder_decoder.EncoderDecoder",
    "lvlm_jax.models.unified.Unified",
    "lvlm_jax.train.optim.masked",
)
"""Examples that stand on their own: what somebody with a project of their own copies."""

ELSEWHERE = {"lvlm_jax.api.load"}
"""Run where its surroundings are: tests/test_api.py."""


def examples() -> dict[str, doctest.DocTest]:
    """Name -> example, of every module."""
    finder, found = doctest.DocTestFinder(), {}
    for info in pkgutil.walk_packages(lvlm_jax.__path__, "lvlm_jax."):
        if ">>>" in Path(importlib.util.find_spec(info.name).origin).read_text(encoding="utf-8"):
            module = importlib.import_module(info.name)
            found.update({test.name: test for test in finder.find(module, info.name, globs={}) if test.examples})
    return found


EXAMPLES = examples()


class Checker(doctest.OutputChecker):
    """What a model says depends on its weights: an example without a result may print anything."""

    def check_output(self, want, got, optionflags):
        """Equal, or nothing expected."""
        return not want or super().check_output(want, got, optionflags)


def surroundings(home) -> dict:
    """Names that an example inside a larger story may use: a model that is loaded, pictures, an encoded prompt."""
    system = tiny_system(context=640)  # room for two answers of the default length
    from lvlm_jax.hub.convert import import_folder
    from lvlm_jax.infer.generate import Generator
    from lvlm_jax.infer.prompt import as_example

    return {
        "Generator": Generator,
        "Path": Path,
        "a": "a.png",
        "b": "b.png",
        "encoded": [system.encode(as_example("What is this?", "cat.jpg", None))],
        "import_folder": import_folder,
        "jnp": jnp,
        "make_mesh": make_mesh,
        "model": system.model,
        "params": system.params,
        "picture": Path("photo.png").read_bytes(),
        "spec": system.spec,
        "system": system,
        "tokenizer": system.tokenizer,
    }


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - ELSEWHERE))
def test_example_runs(name, home):
    test = EXAMPLES[name]
    test.globs = {} if name in REQUIRED else surroundings(home)
    told: list[str] = []
    result = doctest.DocTestRunner(Checker()).run(test, out=told.append)
    assert result.failed == 0, "".join(told)
    assert result.attempted == len(test.examples)


def test_none_is_overlooked():
    assert {*REQUIRED, *ELSEWHERE} <= set(EXAMPLES)
    written = 0
    for path in Path(inspect.getfile(lvlm_jax)).parent.rglob("*.py"):
        written += len(re.findall(r"^ *>>> ", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert written == sum(len(test.examples) for test in EXAMPLES.values())
