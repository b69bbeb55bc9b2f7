"""docs/: some pages run whole, block by block in one folder; the others' commands are parsed and their Python runs."""

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
from lvlm_jax import cli, llm, recipe, run, vision
from lvlm_jax.connectors import PerceiverConfig, QFormerConfig

DOCS = Path(__file__).parents[2] / "docs"
WHOLE = ("your_data.md", "your_checkpoint.md", "your_mixture.md")
"""Pages whose every block runs."""
LONG = ("your_checkpoint.md", "your_mixture.md")
"""Of them those that train for minutes."""


def blocks(page: str) -> list[tuple[str, str]]:
    """(language and flags, text) of each fenced block; a flag that ends in .py is the file that the block is."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+(?: [\w.]+)*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("lvlm ")]


@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.nightly) if p in LONG else p for p in WHOLE])
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = str(DOCS.parent)
    environment = os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    names = {"__name__": "page"}
    for kind, text in blocks(page):
        if kind.endswith(".py"):
            Path(kind.split()[-1]).write_text(text, encoding="utf-8")
            continue
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


def test_a_mixture_of_ones_own(tmp_path):
    """The file of docs/your_mixture.md, at both sizes: its parts, and what its two stages train."""
    ((kind, text),) = [block for block in blocks("your_mixture.md") if block[0].endswith(".py")]
    file = tmp_path / kind.split()[-1]
    file.write_text(text, encoding="utf-8")
    shares = {}
    for size in ("", "tiny"):
        found = recipe.load(f"{file}:{size}")
        model = found.model.lvlm
        assert vision.family_of(model.vision) == "siglip_vision_model"
        assert llm.family_of(model.llm) == "qwen2"
        assert isinstance(model.connector, PerceiverConfig)
        assert model.fusion is not None
        shares[size] = {name: run.share_of(found, name)[-1] for name in found.run}
    full = shares[""]
    assert list(full) == ["align", "instruct"]
    assert full["align"].total == full["instruct"].total
    assert full["instruct"].trained - full["align"].trained == 494_032_768  # Qwen2.5-0.5B's, its one table tied
    swapped = recipe.load(f"{file}:tiny", ["--config.model.connector=qformer", "--config.model.connector.depth=2"])
    assert swapped.model.lvlm.connector == QFormerConfig(depth=2)


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
