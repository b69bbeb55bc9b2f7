"""Where each stage of each recipe fits, at full size: the smallest of some slices of TPUs, and what a step takes there.

    python -m tests.plan.recipes [--write] [NAME ...]

Plans the stages of these recipes (NAME or NAME:ARG; default all) and prints a line each. ``--write`` keeps them in
tests/golden/recipe_plans.json, stage by stage, and writes the table of docs/recipes.md out of that file; without a NAME
it goes on where it was stopped: only stages that are not in the file are planned.

On the newest lane, with the compiler that pyproject.toml pins (the extra [plan]).
"""

import argparse
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from lvlm_jax import config, recipe
from lvlm_jax import mesh as meshes
from lvlm_jax.chips import GIB, TF
from lvlm_jax.config import ConfigError
from lvlm_jax.plan import report, stage, topology
from lvlm_jax.plan.stage import Plan
from lvlm_jax.plan.topology import Topology
from lvlm_jax.recipe import Recipe

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "golden" / "recipe_plans.json"
PAGE = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- plans: python -m tests.plan.recipes --write -->\n", "<!-- end of plans -->\n"
LADDER = ("v5e:2x2", "v5e:4x4", "v5p:4x4x4", "v5p:8x8x8")
MOST = 64
"""Rows a shard beyond which nothing is compiled: with hundreds the compiler takes a quarter of an hour to find no room.
"""


def stages(words: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """(recipe, stage) of all that these recipes run, default all recipes."""
    for word in words or config.names():
        for name in recipe.load(word).run:
            yield word, name


def placed(found: Recipe, name: str, where: Topology) -> tuple[Recipe, int, int | None]:
    """(recipe, shards, rows a shard) of a stage there: its whole batch, in fewer microbatches as more shards hold it.

    Rows are None where its rows and groups stay as they are. A batch that does not divide over the shards is cut, or
    grown to a row a shard.
    """
    mesh, its = found.make_mesh(topology.absent(where)), found.stages[name]
    shards = meshes.data_shards(mesh)
    accumulate = max(1, its.accumulate // shards)
    if its.data.rows % shards == its.data.groups % (shards * accumulate) == 0:
        rows = None
    else:
        rows, accumulate = max(1, its.data.rows // shards), 1
    its = dataclasses.replace(its, accumulate=accumulate)
    return dataclasses.replace(found, stages=found.stages | {name: its}), shards, rows


def plan(word: str, name: str, where: str) -> dict | None:
    """What is kept of a stage there; None where it does not fit: the rows, what it is given alone, or the program.

    Raises:
      ConfigError: the model or the batch does not divide over these devices.
    """
    there = topology.parse(where)
    found, shards, rows = placed(recipe.load(word), name, there)
    if (rows or found.stages[name].data.rows // shards) > MOST:
        return None
    if not stage.plan_stage(found, name, there, rows, compiles=False).memory.fits:
        return None
    made = stage.plan_stage(found, name, there, rows)
    return figures(made, shards) if made.memory.fits else None


def smallest(word: str, name: str) -> dict:
    """What is kept of a stage, on the first of `LADDER` on which it fits; without a topology where that is none."""
    for where in LADDER:
        try:
            found = plan(word, name, where)
        except ConfigError as error:
            print(f"{word} {name} on {where}: {error}", file=sys.stderr, flush=True)
            continue
        if found is not None:
            return found
    return {"topology": None}


def figures(found: Plan, shards: int) -> dict:
    """What is kept of a plan: bytes, and FLOPs of a device and step."""
    roof = report.roofline(found)
    times = dataclasses.asdict(roof) if roof else {}
    return {
        "topology": str(found.topology),
        "mesh": found.mesh,
        "rows": found.rows // shards,
        "peak": found.memory.peak,
        "capacity": found.memory.capacity,
        "flops": found.flops if found.work else None,
        "bound": max(times, key=times.get) if times else None,
    }


def kept() -> dict[str, dict]:
    """Recipe and stage -> what is kept; nothing before the file is there."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def line(name: str, its: dict) -> str:
    """A row of the table."""
    if its["topology"] is None:
        return f"| {name} | none of these | | | | |"
    peak = f"{its['peak'] / GIB:.2f} of {its['capacity'] / GIB:.0f}"
    flops = "not known" if its["flops"] is None else f"{its['flops'] / TF:.2f}"
    return f"| {name} | {its['topology']} | {its['rows']} | {peak} | {flops} | {its['bound'] or 'not known'} |"


def table(plans: dict[str, dict]) -> str:
    """The table of docs/recipes.md, markers and all."""
    head = "| recipe and stage | topology | rows a shard | peak of a chip, GiB | FLOPs of a chip, TF | bound by |\n"
    rows = "".join(f"{line(*item)}\n" for item in sorted(plans.items()))
    return f"{BEGIN}\n{head}| --- | --- | --- | --- | --- | --- |\n{rows}\n{END}"


def page(text: str, plans: dict[str, dict]) -> str:
    """A page with the table of these plans in its place."""
    before, rest = text.split(BEGIN)
    return before + table(plans) + rest.split(END)[1]


def write(plans: dict[str, dict]) -> None:
    """Keeps the plans, and the table out of them."""
    FILE.write_text(json.dumps(dict(sorted(plans.items())), indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), plans), encoding="utf-8")


def main() -> int:
    """1 where a stage could not be planned; the others are."""
    import jax

    parser = argparse.ArgumentParser(prog="python -m tests.plan.recipes", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"keep them in {FILE.name} and {PAGE.name}")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="recipes; default all, with --write those not kept yet"
    )
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    topology.devices(topology.parse(LADDER[0]))  # without a compiler there is nothing to keep
    failed, plans = [], kept()
    for word, name in stages(args.names):
        label = f"{word} {name}"
        if args.write and not args.names and label in plans:
            continue
        began = time.perf_counter()
        try:
            found = smallest(word, name)
        except Exception:  # one that cannot be planned keeps the others from nothing
            traceback.print_exc()
            failed.append(label)
            continue
        print(f"{line(label, found)} {time.perf_counter() - began:.0f} s", flush=True)
        if args.write:
            plans[label] = found
            write(plans)
        jax.clear_caches()
    print(f"not planned: {', '.join(failed)}" if failed else "all planned", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
