"""The part of the command line that takes public checkpoints in and out."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add(add: Any) -> None:
    """``lvlm convert import | export | verify``."""
    convert = add("convert", _need_subcommand, "public checkpoints in and out, and proof that nothing was lost")
    into = convert.add_subparsers(dest="action", metavar="import|export|verify")

    imported = add("import", _import, "read a public checkpoint and keep it as a run's starting weights", into)
    imported.add_argument("source", help="a folder, a GGUF or npz file, or a hub name")
    imported.add_argument("out", help="folder to write; a recipe's stages.X.start.all.workdir reads it")
    imported.add_argument("--revision")
    imported.add_argument("--vision", help="the tower's folder or hub name, for the LLaVA authors' files")
    imported.add_argument("--adapter", help="an adapter of the peft package for this checkpoint, to be merged")
    imported.add_argument("--model-base", help="the language model under the LLaVA authors' projector or adapters")
    imported.add_argument("--overwrite", action="store_true")

    exported = add("export", _export, "write a folder that the torch library loads", into)
    exported.add_argument(
        "source", help="a workdir of `lvlm train`, a folder of any kind of model, or a GGUF or npz file"
    )
    exported.add_argument("out", help="folder to write")
    exported.add_argument("--layout", default="hf", help="hf (default), hf-4, hf-4.52, hf-5, llava-original")
    exported.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; default as they are")
    exported.add_argument("--part", metavar="PART", help="that part alone: senses/NAME, an encoder with its connector")
    exported.add_argument("--adapter", action="store_true", help="a workdir's adapters alone, as the peft package's")
    exported.add_argument("--overwrite", action="store_true")

    verified = add("verify", _verify, "compare logits with the torch library on a picture, part by part", into)
    verified.add_argument("folder", help="what we read")
    verified.add_argument("theirs", nargs="?", help="what the torch library reads; default the same folder")
    verified.add_argument("--picture", help="default a made one")
    verified.add_argument("--vision", help="the tower's folder or hub name, for the LLaVA authors' files")


def _need_subcommand(args: argparse.Namespace, _: Sequence[str]) -> int:
    raise ValueError(f"say what to do; see lvlm {args.command} --help")


def _import(args: argparse.Namespace, _: Sequence[str]) -> int:
    from lvlm_jax.hub import convert

    options = {name: getattr(args, name) for name in ("revision", "vision", "adapter", "model_base", "overwrite")}
    print(convert.import_weights(args.source, args.out, **options))
    return 0


def _export(args: argparse.Namespace, _: Sequence[str]) -> int:
    from lvlm_jax import api, assemble, finished, workdir
    from lvlm_jax.hub import peft, rewrite, senses
    from lvlm_jax.hub.export import export_folder

    if args.adapter:
        config, params, base = finished.adapter(args.source)
        print(peft.save(args.out, config, params, base=base, overwrite=args.overwrite))
        return 0
    if not args.part and rewrite.is_alone(args.source):
        print(rewrite.as_folder(args.source, args.out, args.layout, args.dtype, args.overwrite))
        return 0
    if (Path(args.source) / workdir.RECIPE).exists():  # whether it has exported or not: some runs cannot
        found, params = finished.weights(args.source)
        what = {"params": params, "tokenizer": assemble.tokenizer_of(found.model), **assemble.exported(found)}
    else:
        model = api.load(args.source, dtype="stored")
        what = {"config": model.config, "params": model.params, "tokenizer": model.tokenizer}
        names = {"image_spec": "spec"} | {name: name for name in ("template", "video", "instruction")}
        what |= {name: getattr(model, own) for name, own in names.items() if hasattr(model, own)}
    if args.part:
        what = dict(zip(("config", "params"), senses.part_of(what["config"], what["params"], args.part)))
    out = export_folder(args.out, **what, layout=args.layout, dtype=args.dtype, overwrite=args.overwrite)
    print(out)
    return 0


def _verify(args: argparse.Namespace, _: Sequence[str]) -> int:
    from lvlm_jax.hub.verify import verify

    found = verify(args.folder, args.theirs, picture=args.picture, vision=args.vision)
    print(found)
    return 0 if found.passed else 1
