"""docs/: two pages run whole, block by block in one folder; the others' commands are parsed and their Python runs."""

import contextlib
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lvlm_jax
from lvlm_jax import cli, recipe

DOCS = Path(__file__).parents[2] / "docs"
WHOLE = ("your_data.md", "your_checkpoint.md")
"""Pages whose every block runs."""


def blocks(page: str) -> list[tuple[str, str]]:
    """(language and flags, text) of each fenced block."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+(?: \w+)*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("lvlm ")]


@pytest.mark.slow
@pytest.mark.parametrize("page", WHOLE)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = str(DOCS.parent)
    environment = os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    names = {"__name__": "page"}
    for kind, text in blocks(page):
        if kind == "python":
            with contextlib.redirect_stdout(sys.stderr):
                exec(compile(text, page, "exec"), names)
            continue
        if "torch" in kind.split() and importlib.util.find_spec("torch") is None:
            continue  # Python 3.13 has no torch build; the other lane runs it
        for words in commands(text):
            done = subprocess.run(
                [sys.executable, "-m", "lvlm_jax.cli", *words[1:]],
                env=environment,
                capture_output=True,
                text=True,
                timeout=900,
            )
            wanted = 1 if "fails" in kind.split() else 0
            assert done.returncode == wanted, (words, done.stdout[-2000:], done.stderr[-2000:])


PARSED = sorted(page.name for page in DOCS.glob("*.md") if page.name not in WHOLE)


@pytest.mark.parametrize("page", PARSED)
def test_commands_are_understood(page):
    for kind, text in blocks(page):
        for words in commands(text) if kind == "bash" else []:
            args, rest = cli._parser().parse_known_args(words[1:])
            assert args.run is not cli._version_or_help
            if args.command == "train":
                assert recipe.load(args.config, rest).run
            else:
                assert not rest


@pytest.mark.parametrize("page", PARSED)
def test_python_runs(page, home):
    for kind, text in blocks(page):
        if kind == "python":
            exec(compile(text, page, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", sorted(page.name for page in DOCS.glob("*.md")))
def test_links_lead_somewhere(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)}
    assert [link for link in sorted(links) if not (DOCS / link).exists()] == []


@pytest.mark.slow
def test_the_reference_is_built_from_the_docstrings(tmp_path):
    command = [sys.executable, str(DOCS / "reference.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Error importing" not in done.stderr, done.stderr[-3000:]
    names = {module.name for module in pkgutil.walk_packages(lvlm_jax.__path__, "lvlm_jax.")}
    names = {name for name in names if not name.startswith("lvlm_jax.configs")}
    pages = {".".join(page.relative_to(tmp_path).with_suffix("").parts) for page in tmp_path.rglob("*.html")}
    assert pages == names | {"lvlm_jax", "index"}
    assert "soft tokens" in (tmp_path / "lvlm_jax" / "models" / "lvlm.html").read_text()
