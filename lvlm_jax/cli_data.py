"""The command ``lvlm data``: look at data before a run, and what any command that reads data takes."""

import argparse
import ast
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import Any


def data_arguments(command: argparse.ArgumentParser, needed: bool) -> None:
    """Which data: one file of the two common kinds, easy-VQA, or any source by name."""
    which = command.add_mutually_exclusive_group(required=needed)
    which.add_argument("--llava", metavar="FILE", help="LLaVA conversations, .json or .jsonl")
    which.add_argument("--messages", metavar="FILE", help="OpenAI-style messages, .jsonl")
    which.add_argument("--easy-vqa", metavar="SPLIT", nargs="?", const="test", help="train, validation or test")
    which.add_argument("--source", metavar="KIND", help="any source of a recipe: parquet, webdataset, obelics, ...")
    command.add_argument("--path", default="", help="what --source reads: a file, a folder, *, {00000..00010}")
    command.add_argument("--images", default="", metavar="DIR", help="where picture paths start; default beside FILE")
    command.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a field of --source, such as min_score=0.3"
    )


def data_of(args: argparse.Namespace) -> Any:
    """The chosen data as a recipe's `Data`, or None where nothing was chosen."""
    from lvlm_jax.config import ConfigError, build, near
    from lvlm_jax.data.easy_vqa import SPLITS
    from lvlm_jax.data.registry import SOURCES
    from lvlm_jax.recipe import Data

    if (args.option or args.path) and not args.source:
        raise ValueError("--path and --option belong to --source KIND")
    for flag, value, choices in (("--source", args.source, SOURCES), ("--easy-vqa", args.easy_vqa, SPLITS)):
        if value is not None and value not in choices:
            raise ValueError(f"{flag} {value}{near(value, choices)}: choose one of {', '.join(choices)}")
    if args.llava:
        return Data(source="llava_json", path=args.llava, images=args.images)
    if args.messages:
        return Data(source="messages", path=args.messages, images=args.images)
    if args.source:
        lists = {field.name for field in dataclasses.fields(Data) if field.type == tuple[str, ...]}
        values = {"source": args.source, "path": args.path, "images": args.images, **_options(args.option, lists)}
        try:
            return build(Data, values, "--option")
        except ConfigError as error:  # two fields have a flag of their own
            raise ConfigError(re.sub(r"^--option: (?=(path|images)\b)", "--", str(error))) from error
    return Data(source="easy_vqa", split=args.easy_vqa) if args.easy_vqa else None


def _name(args: argparse.Namespace) -> str:
    """What a user calls the data."""
    return args.llava or args.messages or args.path or args.source or "easy_vqa"


def _options(words: Sequence[str], lists: set[str]) -> dict[str, Any]:
    """The words as fields; those that are `lists` may be written ``a,b``."""
    out = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"--option {word}: write NAME=VALUE")
        value = _value(text)
        if name in lists:
            value = value.split(",") if isinstance(value, str) else value
            value = [*out.get(name, ()), *value]
        out[name] = value
    return out


def _value(text: str) -> Any:
    """JSON, a Python tuple as overrides of a recipe have it, or the text itself."""
    for read, refused in ((json.loads, ValueError), (ast.literal_eval, (ValueError, SyntaxError))):
        try:
            return read(text)
        except refused:
            pass
    return text


def add(add: Any) -> None:
    """Adds ``lvlm data`` and its subcommands by the parser's own `add`."""
    data = add("data", _nothing, "check a data set before a run, or look at what the model will see")
    into = data.add_subparsers(dest="action", metavar="check|show|packing|prepare|convert-tfrecord")
    checked = add("check", _check, "list every bad record with file, line and reason", into)
    shown = add("show", _show, "print conversations, each token coloured by its loss weight, and the pictures", into)
    shown.add_argument("--index", type=int, default=0, help="the first record to show")
    shown.add_argument("--count", type=int, default=1)
    checked.add_argument("--limit", type=int, help="only the first N records")
    checked.add_argument("--no-images", action="store_true", help="do not open the pictures")
    packed = add("packing", _packing, "how full packed rows are: the committed histograms, or your data", into)
    packed.add_argument("--rows", type=int, default=64, help="text rows of a batch")
    packed.add_argument(
        "--groups", type=int, nargs="+", default=[8, 64], help="groups of a batch, at least one a shard"
    )
    for command in (checked, shown, packed):
        data_arguments(command, needed=command is not packed)
        command.add_argument("--config", default="quickstart", help="recipe whose template, tokenizer and sizes to use")
        command.add_argument("--template", help="chat template, instead of the recipe's")
        command.add_argument("--tokenizer", help="a folder or hub name, instead of the recipe's")
        command.add_argument("--length", type=int, help="positions of a row; default the model's context")

    prepared = add("prepare", _prepare, "check the public LLaVA-1.5 sets on disk: folders, counts, missing files", into)
    prepared.add_argument("root", help="the folder that holds the set's .json")
    prepared.add_argument("--set", choices=("558k", "665k"), help="default the one whose .json is there")
    prepared.add_argument("--config", help="recipe whose template and tokenizer give lengths in tokens, not words")
    prepared.add_argument("--tokenizer", help="a folder or hub name, instead of the recipe's")
    prepared.add_argument("--svg", metavar="FILE", help="write the lengths' histogram there")

    converted = add("convert-tfrecord", _convert_tfrecord, "a TFDS set of TFRecord files as array_record, once", into)
    converted.add_argument("path", help="the folder that holds its dataset_info.json")
    converted.add_argument("out", help="folder to write; a recipe's data.path reads it with source tfds")


def _nothing(args: argparse.Namespace, _: Sequence[str]) -> int:
    raise ValueError("say what to do; see lvlm data --help")


def _inspection(args: argparse.Namespace) -> Any:
    from lvlm_jax import assemble

    data = data_of(args)
    data = dataclasses.replace(data, template=args.template or data.template)
    return assemble.inspection(data, args.config, args.tokenizer, args.length)


def _check(args: argparse.Namespace, _: Sequence[str]) -> int:
    from lvlm_jax.data.check import check

    source, encoder, model, tokenizer = _inspection(args)
    options = {"images": not args.no_images, "limit": args.limit, "spec": model.image}
    report = check(source, encoder, unknown_id=tokenizer.unknown_id, **options)
    template = encoder.keywords["template"].name
    print(f"as {args.config} reads it (template {template}, tokenizer {model.tokenizer})\n{report}")
    return 0 if report.ok else 1


def _show(args: argparse.Namespace, _: Sequence[str]) -> int:
    from lvlm_jax.data.show import show

    source, encoder, _, tokenizer = _inspection(args)
    if not 0 <= args.index < len(source):
        holds = f"{len(source):,} records, --index 0 to {len(source) - 1}" if len(source) > 1 else "1 record, --index 0"
        raise ValueError(f"--index {args.index}: {_name(args)} has {holds}")
    for index in range(args.index, min(args.index + args.count, len(source))):
        example = source[index]
        print(show(example, encoder(example), tokenizer, colour=sys.stdout.isatty()), end="\n\n")
    return 0


def _packing(args: argparse.Namespace, _: Sequence[str]) -> int:
    from lvlm_jax.data import packing_table

    histograms, lengths = None, packing_table.LENGTHS
    if data_of(args) is not None:
        from lvlm_jax.data.lengths import measure_lengths

        source, encoder, _, _ = _inspection(args)
        measured = measure_lengths(source, encoder, on_bad="skip", images=False)
        histograms = {_name(args): packing_table.Histogram(repr(source), measured.lengths, measured.pictures)}
        lengths = (encoder.keywords["max_length"],)
        if measured.bad:
            print(f"{len(measured.bad):,} bad records left out; lvlm data check lists them", file=sys.stderr)
    print(packing_table.HEAD)
    for line in packing_table.lines(histograms, lengths, rows=args.rows, groups=args.groups):
        print(packing_table.row(line), flush=True)
    return 0


def _prepare(args: argparse.Namespace, _: Sequence[str]) -> int:
    from pathlib import Path

    from lvlm_jax.data.prepare import prepare, svg

    encoder = None
    if args.config:
        from lvlm_jax import assemble

        encoder = assemble.inspected_encoder(args.config, args.tokenizer)
    elif args.tokenizer:
        raise ValueError("--tokenizer needs --config: the recipe whose template writes the conversations down")
    found = prepare(args.root, args.set, encode=encoder)
    print(found)
    if args.svg and len(found.lengths):
        Path(args.svg).write_text(svg(found.lengths, found.unit, found.file), encoding="utf-8")
    return 0 if found.ok else 1


def _convert_tfrecord(args: argparse.Namespace, _: Sequence[str]) -> int:
    from lvlm_jax.data.tfds import convert_tfrecord

    print(f"{convert_tfrecord(args.path, args.out):,} records written to {args.out}")
    return 0
