"""The command ``lvlm``: each subcommand parses, then calls one library function.

Nothing heavy is imported before a subcommand runs, so that ``lvlm --help`` answers at once.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvlm_jax import cli_bench, cli_convert, cli_data, cli_list, cli_plan, errors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status.

    0 good, 1 failed check or a run that cannot go on, 2 mistake in the request, 75 the other processes are missing.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("train", "plan"):
        parser.error(f"not understood: {' '.join(rest)}; see lvlm {args.command} --help")
    if args.command:
        # transformers says at each import, in each worker, that torch is not there; it is not needed.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if args.debug:
        return args.run(args, rest) or 0
    try:
        return args.run(args, rest) or 0
    except BrokenPipeError:  # the reader, as in `lvlm list | head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (errors.Ended, *errors.MISTAKES) as error:
        print(f"lvlm {args.command}: {error}", file=sys.stderr)
        return getattr(error, "status", 2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lvlm", description="Train, evaluate and run vision-language models in JAX.")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.set_defaults(run=_version_or_help, command="")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Any, text: str, into: Any = commands, **options: Any) -> argparse.ArgumentParser:
        command = into.add_parser(name, help=text, description=options.pop("long", text), parents=[common], **options)
        command.set_defaults(run=run)
        return command

    here = (_add_train, _add_eval, _add_generate, _add_chat)
    for build in (*here, cli_convert.add, cli_plan.add, cli_data.add, cli_bench.add, cli_list.add):
        build(add)
    return parser


def _version_or_help(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from lvlm_jax import __version__

    if args.version:
        print(__version__)
        return 0
    _parser().print_help()
    return 0 if not rest else 2


# ---------------------------------------------------------------------------------------------------------------------
# train


def _add_train(add: Any) -> None:
    train = add(
        "train",
        _train,
        "run a recipe: its stages, evaluations, export and report",
        long="Runs a recipe in a workdir; the same command resumes. Override a field: --config.stages.align.steps=100",
        allow_abbrev=False,
    )
    train.add_argument("--config", required=True, metavar="NAME", help="a recipe's name or file, NAME:ARG for its arg")
    train.add_argument("--workdir", metavar="DIR", help="where everything goes (needed unless --dry-run)")
    train.add_argument("--dry-run", action="store_true", help="resolve, print the share each stage trains, stop")
    train.add_argument("--restart", action="store_true", help="throw away what the workdir holds and begin anew")
    several = train.add_argument_group("several processes", "the same command on every host, in one shared workdir")
    several.add_argument("--distributed", action="store_true", help="let JAX find them: TPU pod, GKE, SLURM, Open MPI")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens; needs the next two")
    several.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    several.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    several.add_argument("--join-seconds", type=float, metavar="S", help="how long to wait for them; default 300")


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from lvlm_jax import assemble, hosts, process, recipe, run

    resolved = recipe.load(args.config, list(overrides))
    if not (args.workdir or args.dry_run):
        raise ValueError("--workdir is missing: where should checkpoints, logs and the report go?")
    group = hosts.group(args.coordinator, args.processes, args.process, args.distributed)
    if group is None or args.dry_run:
        process.spread_over_cores([resolved.stages[name].data.groups for name in resolved.run])
    else:
        hosts.join(group, hosts.JOIN_SECONDS if args.join_seconds is None else args.join_seconds)
    if args.dry_run:
        print(run.describe(resolved))
        for line in assemble.absent(resolved, resolved.run):
            print(f"not there yet: {line}")
        return 0
    process.keep_freed_memory()
    process.take_short_turns()
    if not args.debug:
        process.without_tracebacks_of_threads()
    with hosts.together(args.debug):
        run.train(resolved, args.workdir, resume=not args.restart, keep_compiled=True)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# eval


def _add_eval(add: Any) -> None:
    command = add(
        "eval",
        _eval,
        "score a model on a data set, generating freely",
        long="Free greedy generation (--beams: by beam search), scored; per-sample JSONL beside each score. For a "
        "workdir of `lvlm train` the recipe's own evaluation is the default.",
    )
    _model_arguments(command)
    cli_data.data_arguments(command, needed=False)
    command.add_argument(
        "--scores", default="", metavar="A,B", help="exact, vqa, caption, refcoco, detection; default exact"
    )
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="default 16")
    _beam_arguments(command)
    command.add_argument("--rows", type=int, metavar="N", help="questions a batch; default the recipe's, or 64")
    command.add_argument("--limit", type=int, default=0, help="only the first N samples")
    command.add_argument(
        "--out", metavar="DIR", help="where samples.jsonl and summary.json go; default MODEL/evaluation/lvlm_eval"
    )


def _eval(args: argparse.Namespace, _: Sequence[str]) -> int:
    from lvlm_jax import run
    from lvlm_jax.infer import beam
    from lvlm_jax.infer.sampling import Sampling

    # A mistake in these is found before the model is read.
    data, sampling = cli_data.data_of(args), beam.settings(Sampling(), args.beams, args.length_penalty)
    result = run.evaluate_folder(
        args.model,
        _load(args),
        data=data,
        scores=tuple(filter(None, args.scores.split(","))),
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        rows=args.rows,
        limit=args.limit,
        out=args.out,
    )
    print(result)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# generate, chat


def _model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a folder, the workdir of `lvlm train`, or a hub name")
    command.add_argument("--revision", help="branch, tag or commit of a hub name")
    command.add_argument("--template", help="chat template, instead of the folder's")
    command.add_argument("--vision", help="the tower's folder or hub name, for the LLaVA authors' files")
    command.add_argument("--adapter", help="a LoRA adapter of the peft package for this model: folder or hub name")
    command.add_argument("--model-base", help="the language model under the LLaVA authors' projector or adapters")
    command.add_argument("--sense", action="append", default=[], help="a pair that was exported alone (repeatable)")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default by device")


def _sampling_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-new-tokens", type=int, metavar="N")
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 against repeating")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--stop", action="append", default=[], help="end the answer at this text (repeatable)")
    command.add_argument("--system", help="system text, instead of the template's")


def _beam_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--beams", type=int, default=1, metavar="N", help="hypotheses of a beam search; default 1: none"
    )
    command.add_argument(
        "--length-penalty", type=float, default=1.0, metavar="X", help="of a beam search; above 0 favours long answers"
    )


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop")
    return {name: getattr(args, name) for name in names}


def _load(args: argparse.Namespace) -> Any:
    from lvlm_jax import api

    names = ("dtype", "revision", "template", "vision", "adapter", "model_base", "sense")
    model = api.load(args.model, **{name: getattr(args, name) for name in names})
    if (frames := getattr(args, "frames", None)) is None:
        return model
    if _writes_pictures(model):
        raise ValueError("--frames: a model of text and picture tokens reads no videos; leave it out")
    return dataclasses.replace(model, video=dataclasses.replace(model.video, frames=frames))


def _shown_arguments(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--image", action="append", default=[], help=f"a picture{what} (repeatable)")
    command.add_argument("--video", action="append", default=[], help=f"a video{what} (repeatable)")
    command.add_argument(
        "--features",
        action="append",
        default=[],
        metavar="SENSE=FILE",
        help=f"a .npy or .npz file (or a picture) for a named sense{what} (repeatable)",
    )
    command.add_argument("--frames", type=int, metavar="N", help="the most frames of a video; default the model's")


def _add_generate(add: Any) -> None:
    command = add("generate", _generate, "answer one prompt about pictures and videos")
    _model_arguments(command)
    command.add_argument("--prompt", required=True)
    _shown_arguments(command, "")
    command.add_argument("--no-stream", action="store_true", help="print the answer when it is whole")
    command.add_argument(
        "--draw",
        metavar="FILE",
        help="write the picture there with the boxes that the answer says; or the pictures that the model writes",
    )
    command.add_argument(
        "--picture", action="store_true", help="the answer begins with a picture that the model writes"
    )
    command.add_argument(
        "--mask-codec", metavar="NPZ", help="with --draw: PaliGemma's vae-oid.npz, to draw masks of <seg...> too"
    )
    _sampling_arguments(command)
    _beam_arguments(command)


def _generate(args: argparse.Namespace, _: Sequence[str]) -> int:
    from lvlm_jax.processing.container import VideoError
    from lvlm_jax.processing.picture import ImageError

    if args.mask_codec and not args.draw:
        raise ValueError("--mask-codec decodes the masks that --draw FILE draws; give that too")
    shown = {"images": args.image, "videos": args.video, "features": _features(args.features)}
    model = _load(args)
    if _writes_pictures(model):
        return _write(args, model)
    if args.picture:
        raise ValueError(f"--picture: {args.model} writes text alone; leave it out")
    if args.draw and len(args.image) != 1:
        raise ValueError(f"--draw draws on one picture, and --image names {len(args.image)}; give it once")
    settings = _sampling(args) | {name: getattr(args, name) for name in ("beams", "length_penalty", "system")} | shown
    try:
        pieces = model.generate(args.prompt, stream=not args.no_stream, **settings)
        said = [pieces] if args.no_stream else []
        for piece in () if args.no_stream else pieces:
            said.append(piece)
            print(piece, end="", flush=True)
    except ValueError as error:
        found = error if isinstance(error, ImageError) else error.__cause__
        if not isinstance(found, ImageError):
            raise
        raise ValueError(f"--{'video' if isinstance(found, VideoError) else 'image'} {found}") from error
    print(pieces if args.no_stream else "")
    if args.draw:
        from lvlm_jax.infer.drawn import draw_answer

        print(draw_answer("".join(said), args.image[0], args.draw, args.mask_codec), file=sys.stderr)
    return 0


def _features(words: Sequence[str]) -> dict[str, list[str]]:
    """The files for each named sense."""
    out: dict[str, list[str]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--features {word}: write SENSE=FILE, such as audio=clip.npy")
        out.setdefault(name, []).append(path)
    return out


def _writes_pictures(model: Any) -> bool:
    from lvlm_jax.infer.interleaved import InterleavedSystem

    return isinstance(model, InterleavedSystem)


def _write(args: argparse.Namespace, model: Any) -> int:
    """One answer of texts and pictures."""
    from lvlm_jax.infer.drawn import write_pictures

    given = {"video": args.video, "mask-codec": args.mask_codec, "stop": args.stop, "system": args.system}
    given |= {"beams": args.beams > 1, "features": args.features, "repetition-penalty": args.repetition_penalty != 1}
    if useless := [f"--{name}" for name, value in given.items() if value]:
        raise ValueError(f"{', '.join(useless)}: not of a model that reads and writes text and pictures; leave it out")
    names = ("picture", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    written = model.generate([*map(Path, args.image), args.prompt], **{name: getattr(args, name) for name in names})
    print(write_pictures(written, args.draw))
    return 0


def _add_chat(add: Any) -> None:
    command = add("chat", _chat, "talk with a model: many turns, many pictures")
    _model_arguments(command)
    _shown_arguments(command, " to begin with")
    _sampling_arguments(command)


def _chat(args: argparse.Namespace, _: Sequence[str]) -> int:
    from lvlm_jax.infer.terminal import repl

    _features(args.features)  # a mistake in these is found before the model is read
    shown, model = {"images": args.image, "videos": args.video, "features": args.features}, _load(args)
    if _writes_pictures(model):
        raise ValueError(f"{args.model}: a model of text and picture tokens has no chat format; ask by lvlm generate")
    repl(model, **shown, instruction=args.system, **_sampling(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
