"""``lvlm list``: what there is by name, how it was checked, and what share each recipe's stages train."""

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add(add: Any) -> None:
    """Adds the subcommand."""
    command = add("list", _list, "recipes, systems, data sources, templates and mesh presets by name")
    command.add_argument(
        "--trained",
        nargs="*",
        metavar="RECIPE",
        help="the weights that each stage trains, of every recipe or of these (NAME or NAME:ARG)",
    )
    command.add_argument("--status", action="store_true", help="the parts and systems, and how each was checked")


def _list(args: argparse.Namespace, _: Sequence[str]) -> int:
    from lvlm_jax import config

    if args.status:
        from lvlm_jax.zoo import status

        for row in status.STATUS:
            print(f"{row.part:<10} {row.what}\n{'':<10} {row.status}; {', '.join(row.tested)}")
    if args.trained is not None:
        _print_trained(args.trained or config.names())
    if not args.status and args.trained is None:
        _print_names()
    return 0


def _print_names() -> None:
    from lvlm_jax import config, mesh, zoo
    from lvlm_jax.data.registry import SOURCES
    from lvlm_jax.parts import NAMED
    from lvlm_jax.processing.chat_templates import TEMPLATES
    from lvlm_jax.zoo.status import STATUS

    print("recipes (lvlm train --config NAME)")
    for name in config.names():
        print(f"  {name:<24} {_first_line(config.find(name))}")
    print("systems (lvlm_jax.load(NAME); weights come from the hub name beside it)")
    for name, spec in zoo.SYSTEMS.items():
        alone = "(the language model alone: train the rest)" if spec.source else "(nothing is public: train it)"
        print(f"  {name:<24} {' '.join(filter(None, (spec.source, '' if spec.released else alone)))}")
    print("how systems were checked (lvlm list --status has their parts, too, and the tests)")
    for row in STATUS:
        if row.part == "system":
            print(f"  {row.what}\n      {row.status}")
    for path, named in NAMED.items():
        print(f"parts of a model (--config.{path}=NAME)\n  {', '.join(named)}")
    print(f"data sources\n  {', '.join(SOURCES)}")
    print(f"chat templates\n  {', '.join(TEMPLATES)}\nmesh presets\n  {', '.join(mesh.PRESETS)}")


def _first_line(path: Path) -> str:
    """The first line of a recipe's docstring, without running it."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def _print_trained(words: Sequence[str]) -> None:
    from lvlm_jax import recipe, run

    found = {word: recipe.load(word) for word in words}  # all are read before the first line is printed
    width = max(len(f"{word} {name}") for word, one in found.items() for name in one.run)
    print(f"{'recipe and stage':<{width}}  {'weights':>15}  {'trained':>15}  {'share':>8}", flush=True)
    for word, one in found.items():
        for name in one.run:
            whole = run.share_of(one, name)[-1]
            label = f"{word} {name}"
            print(f"{label:<{width}}  {whole.total:>15,}  {whole.trained:>15,}  {whole.percent:>7.2f}%", flush=True)
