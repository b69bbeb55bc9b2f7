"""Everything that a reader of README.md copies: Python that runs, commands that parse, records that load."""

import json
import re
import shlex
from pathlib import Path

import pytest

from lvlm_jax import cli, recipe
from lvlm_jax.data.sources import LlavaJson, Messages
from lvlm_jax.processing.schema import Image
from lvlm_jax.zoo import SYSTEMS, status

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every `lvlm ...` line, as words."""
    lines = [part.strip() for block in blocks("bash") for line in block.splitlines() for part in line.split("&&")]
    lines += re.findall(r"`(lvlm [^`]+ [^`]+)`", README)
    return [shlex.split(line, comments=True) for line in lines if line.startswith("lvlm ")]


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs(number, home):
    exec(compile(blocks("python")[number], f"README.md, Python block {number}", "exec"), {"__name__": "readme"})


def test_there_is_an_example_for_each_door_and_module():
    text = "\n".join(blocks("python"))
    for what in (
        "lvlm_jax.load(",
        "model.generate(",
        "model.chat(",
        "ViT(",
        "PerceiverResampler(",
        "Decoder(",
        "masked(",
    ):
        assert what in text, what


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_lines_are_understood(words):
    args, rest = cli._parser().parse_known_args(words[1:])
    assert args.run is not cli._version_or_help
    if args.command == "train":
        assert recipe.load(args.config, rest).run
    else:
        assert not rest
        assert not getattr(args, "config", None) or recipe.load(args.config)


@pytest.mark.parametrize(("source", "number"), [(LlavaJson, 0), (Messages, 1)])
def test_records_load(source, number, home):
    line = blocks("json")[number]
    json.loads(line)
    (home / "train.jsonl").write_text(line)
    (example,) = source(home / "train.jsonl")
    assert [turn.role for turn in example.turns] == ["user", "assistant"]
    assert [segment.source for turn in example.turns for segment in turn.segments if isinstance(segment, Image)] == [
        str(home / "cat.png")
    ]


def test_the_table_of_models_is_the_one_that_lvlm_list_prints():
    assert status.markdown() in README
    assert [path for row in status.STATUS for path in row.tested if not (ROOT / path).exists()] == []


def test_the_command_lists_the_systems_as_the_table_does(capsys):
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    for row in status.STATUS:
        assert (f"  {row.what}\n      {row.status}\n" in said) == (row.part == "system"), row
    for name, spec in SYSTEMS.items():
        assert re.search(rf"^  {name} +.*{re.escape(spec.source or 'nothing is public')}", said, re.MULTILINE), name


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_paths_that_are_named_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(([^)#:]+)\)", text)) | set(re.findall(r"`(tests/[\w/.]+)`", text))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_ci_runs_the_test_command_that_the_readme_gives():
    command = "pip install -e '.[test]' && pytest"
    assert command in blocks("bash")[1]
    assert f'TEST_COMMAND="{command}"' in (ROOT / ".ci" / "run").read_text()
