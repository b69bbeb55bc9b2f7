"""The part of the command line that times this library against the torch library."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

PARTS = ("train", "prefill", "decode", "data", "import")


def add(add: Any) -> None:
    """``lvlm bench``."""
    bench = add(
        "bench",
        _bench,
        "time this library against the torch library on the same weights and batches",
        long="Both sides run in turns in one call, so the ratio of a round holds on a machine whose speed drifts. The "
        "torch side is a process of its own, in this interpreter or another one.",
        allow_abbrev=False,
    )
    bench.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    bench.add_argument("--model", default="80m", help="80m (default), 1b or 7b, a LLaVA of so many weights, or tiny")
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each side; default 5")
    bench.add_argument("--rows", type=int, default=8, metavar="N", help="rows of a training batch; default 8")
    bench.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the products; default by device")
    bench.add_argument("--reference-python", metavar="PATH", help="interpreter with torch; default this one")
    bench.add_argument("--no-reference", action="store_true", help="absolute figures alone")
    bench.add_argument("--compile", action="store_true", help="measure torch.compile's training step, too")
    bench.add_argument("--json", metavar="FILE", help="write every measurement to a file")


def _bench(args: argparse.Namespace, _: Sequence[str]) -> int:
    import json
    from pathlib import Path

    from lvlm_jax import process
    from lvlm_jax.bench import reference, setting
    from lvlm_jax.bench import run as bench

    for name in ("rounds", "rows"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)}: at least 1")
    if args.no_reference and (args.reference_python or args.compile):
        raise ValueError("--no-reference measures this library alone: leave out --reference-python and --compile")
    process.keep_freed_memory()
    process.share_the_accelerator()
    python = None if args.no_reference else args.reference_python or reference.default_python()
    try:
        result = bench.run(
            args.parts,
            model=args.model,
            rounds=args.rounds,
            rows=args.rows,
            dtype=args.dtype,
            python=python,
            compiled=args.compile,
            command=f"lvlm {shlex.join(sys.argv[1:])}",
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    except (setting.SidesDiffer, reference.ReferenceFailed) as error:
        print(f"lvlm bench: {error}", file=sys.stderr)
        return 1
    print(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
    return 0
