"""The part of the command line that plans a run for devices nobody holds."""

import argparse
import functools
from collections.abc import Sequence
from typing import Any


def add(add: Any) -> None:
    """``lvlm plan``."""
    plan = add(
        "plan",
        _plan,
        "compile a recipe's programs for TPUs or GPUs nobody holds, on this CPU, and say what they take there",
        long="Compiles the very step that lvlm train runs, or those that give answers: memory, FLOPs, exchanges, and "
        "an estimate of time. Needs the extra [plan] for TPUs, [plan-cuda] for GPUs, and no such device.",
        allow_abbrev=False,
    )
    plan.add_argument("--config", required=True, metavar="NAME", help="a recipe's name or file, NAME:ARG for its arg")
    plan.add_argument("--topology", required=True, help="v5p:4x4x4, v5e:16x16, tpu7x:4x4x4, h100:8, ...")
    plan.add_argument("--slices", type=int, default=1, metavar="N", help="so many slices of it; default 1")
    plan.add_argument("--stage", help="one stage; default all that the recipe runs")
    plan.add_argument("--program", default="train", choices=("train", "prefill", "decode"), help="default train")
    plan.add_argument(
        "--rows-per-shard", type=int, metavar="N", help="text rows a data shard; default the recipe's, of answers 1"
    )
    plan.add_argument("--length", type=int, metavar="N", help="positions of a prompt, for prefill and decode")
    plan.add_argument("--json", action="store_true", help="the figures as JSON, one line a stage")


def _plan(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    import json

    import jax

    from lvlm_jax import recipe
    from lvlm_jax.config import ConfigError
    from lvlm_jax.plan import answer, report, stage, topology
    from lvlm_jax.progress import waiting

    jax.config.update("jax_platforms", "cpu")  # a TPU or GPU of this machine is not asked for
    resolved = recipe.load(args.config, list(overrides))
    where = topology.parse(args.topology, args.slices)
    if args.rows_per_shard is not None and args.rows_per_shard < 1:
        raise ConfigError(f"--rows-per-shard={args.rows_per_shard}: at least one")
    if args.program == "train":
        if args.length is not None:
            raise ConfigError("--length is of a prompt, for --program prefill or decode; a stage has its data.length")
        make = functools.partial(stage.plan_stage, resolved, topology=where, rows=args.rows_per_shard)
    else:
        if args.stage:
            raise ConfigError(f"--stage={args.stage}: stages are trained; --program {args.program} has none")
        rows = args.rows_per_shard or 1
        make = functools.partial(answer.plan_answers, resolved, topology=where, rows=rows, length=args.length)
    fits = True
    for name in _stages(args, resolved) if args.program == "train" else [args.program]:
        found = make(name, wait=waiting)
        print(json.dumps(report.as_dict(found)) if args.json else report.text(found) + "\n", flush=True)
        fits = fits and found.memory.fits
    return 0 if fits else 1


def _stages(args: argparse.Namespace, resolved: Any) -> list[str]:
    from lvlm_jax.config import ConfigError

    if args.stage and args.stage not in resolved.stages:
        raise ConfigError(f"--stage={args.stage}: the stages of {resolved.name} are {list(resolved.stages)}")
    return [args.stage] if args.stage else list(resolved.run)
