"""What stands beside the weights in a folder: tokenizer, picture processor, chat template."""

import ast
import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.connectors import QFormerConfig
from lvlm_jax.hub import download, gguf_tokenizer
from lvlm_jax.hub.configs import from_original, read_json
from lvlm_jax.hub.gguf import contents
from lvlm_jax.processing import native
from lvlm_jax.processing.chat_templates import TEMPLATES, Template
from lvlm_jax.processing.frames import DEFAULT, VideoSpec
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.instruction import Instruction
from lvlm_jax.processing.tiles import Tiles, limit_of
from lvlm_jax.processing.tokenizer import Tokenizer, load_tokenizer

VIDEO_FILE = "video_preprocessor_config.json"


def image_spec(folder: str | Path, patch: int) -> ImageSpec | None:
    """How pictures are prepared: preprocessor_config.json, or its newer place inside processor_config.json.

    None where the folder has neither.

    Raises:
      CheckpointError: a processor that is not read here.
    """
    folder = Path(folder)
    for name, inside in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if not (folder / name).exists():
            continue
        content = read_json(folder / name)
        content = content if inside is None else content.get(inside)
        if content:
            try:
                return ImageSpec.from_hf({**_of_the_model(folder), **content}, patch)
            except ValueError as error:
                raise CheckpointError(f"{folder / name}: {error}") from error
    return None


def _of_the_model(folder: Path) -> dict[str, Any]:
    """What config.json says of how pictures are prepared, for models whose files share it out so (Qwen-VL)."""
    file = folder / "config.json"
    tower = read_json(file).get("vision_config") if file.is_file() else None
    tower = tower if isinstance(tower, dict) else {}
    return {name: tower[name] for name in native.MODELS if tower.get(name) is not None}


def video_spec(folder: str | Path, default: VideoSpec = DEFAULT) -> VideoSpec:
    """Which frames of a video are shown, and how they are read: what `export_folder` wrote of it, else the default.

    Raises:
      CheckpointError: a value that is not known.
    """
    file = Path(folder) / VIDEO_FILE
    if not file.is_file():
        return default
    try:
        return VideoSpec.from_hf(read_json(file)) or default
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files one of which every tokenizer has: of a folder without any the library would make an empty tokenizer."""


def tokenizer(folder_or_name: str | Path, revision: str | None = None) -> Tokenizer:
    """A tokenizer from a folder, a GGUF file (also ``pip:package/file``) or a hub name; see `load_tokenizer`."""
    path = download.resolve(folder_or_name, revision, files=download.TOKENIZER, ownerless=True)
    if path.is_dir() and not any((path / name).exists() for name in VOCABULARIES):
        raise FileNotFoundError(f"{path}: no tokenizer there ({', '.join(VOCABULARIES)}); give a folder that has one")
    return gguf_tokenizer.tokenizer(path) if path.suffix == ".gguf" and path.is_file() else load_tokenizer(path)


CONNECTOR = "qformer_tokenizer"
"""Folder, beside a model's own files, of the tokenizer of what its connector reads."""


def instruction(folder: str | Path, connector: QFormerConfig) -> Instruction:
    """What writes down what the connector reads, from the folder of its tokenizer inside a model's.

    It reads as many tokens as that says, but no more than the `connector` has positions.

    Raises:
      FileNotFoundError: there is none.
    """
    if not (Path(folder) / CONNECTOR).is_dir():
        raise FileNotFoundError(
            f"{Path(folder) / CONNECTOR}: not there; the connector of this model reads an instruction by a tokenizer "
            "of its own (BERT's), which its release has in this folder"
        )
    words = tokenizer(Path(folder) / CONNECTOR)
    return Instruction(words, min(connector.context, words.hf.model_max_length), connector.vocab)


def save_instruction(instruction: Instruction, folder: str | Path) -> None:
    """Writes what `instruction` reads back."""
    instruction.tokenizer.hf.model_max_length = instruction.length
    instruction.tokenizer.save(Path(folder) / CONNECTOR)


def original_tiles(folder: str | Path) -> Tiles | None:
    """The tiles that a config.json of the LLaVA authors names; None where it names none."""
    if Path(folder).is_file():
        return None
    raw = read_json(Path(folder) / "config.json")
    pinpoints, ratio = raw.get("image_grid_pinpoints"), str(raw.get("image_aspect_ratio", "anyres"))
    if "mm_vision_tower" not in raw or pinpoints is None:
        return None
    try:
        most = limit_of(ratio) if ratio.startswith("anyres") else None
        if ends := re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", str(pinpoints).replace(" ", "")):
            first, low, last, high = map(int, ends.groups())
            side = from_original(raw).vision.image_size
            pairs = [(w * side, h * side) for w in range(first, last + 1) for h in range(low, high + 1)]
        else:
            pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        return Tiles(
            pinpoints=tuple((int(height), int(width)) for width, height in pairs),
            unpad="truncate",
            most=most,
            several="tiles" if most is None else "whole",
        )
    except (TypeError, ValueError, SyntaxError) as error:
        raise CheckpointError(
            f"{Path(folder) / 'config.json'}: image_grid_pinpoints is {pinpoints!r} with image_aspect_ratio {ratio!r}, "
            "which is not supported; supported: a list of [width, height], or '(1x1),...,(6x6)', tiles"
        ) from error


def chat_template(folder: str | Path) -> Template | None:
    """The template that a folder's chat template (or a GGUF file's) stands for; None: there is none that we know.

    One that `export_folder` wrote is known by its text and comes back with its own system text; any other by what it
    makes of a few prompts (`recognise`).
    """
    text = _jinja(Path(folder))
    if text is None:
        return None
    for template in TEMPLATES.values():
        head, _, tail = template.source.partition("%SYSTEM%")
        if text == template.source:
            return template
        if tail and text.startswith(head) and text.endswith(tail):
            quoted = text[len(head) + 1 : -len(tail) - 1]
            unquoted = re.sub(r"\\(.)", lambda mark: "\n" if mark[1] == "n" else mark[1], quoted)
            named = [t for t in TEMPLATES.values() if t.source == template.source and t.system == unquoted]
            return named[0] if named else template.with_system(unquoted)
    return recognise(text, **_marks(Path(folder)))


def _jinja(folder: Path) -> str | None:
    if folder.suffix == ".gguf":
        return contents(folder).metadata.get("tokenizer.chat_template")
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, list):  # several by name
                found = next((one.get("template") for one in found if one.get("name") == "default"), None)
            if isinstance(found, str):
                return found
    return None


def _marks(folder: Path) -> dict[str, str]:
    """The start and end tokens of a folder's tokenizer, which its chat template writes by these variables."""
    if folder.suffix == ".gguf":
        return gguf_tokenizer.marks(folder)
    path = folder / "tokenizer_config.json"
    raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    named = {name: raw.get(name) for name in ("bos_token", "eos_token")}
    named = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return {name: token for name, token in named.items() if isinstance(token, str)}


# ---------------------------------------------------------------------------------------------------------------------
# Other people's chat templates, known by what they write

_SYSTEM = "Say\x01little."
_PICTURE = object()
_PROMPTS: tuple[tuple[tuple[str, tuple[object, ...]], ...], ...] = (
    (("user", (_PICTURE, "What is this?")),),
    (("user", ("What is this?",)), ("assistant", ("A cat.",)), ("user", ("And that?",))),
    (("system", (_SYSTEM,)), ("user", ("What is this?",))),
)
"""A picture and a question; a second question; a system text."""


def recognise(text: str, bos_token: str = "<s>", eos_token: str = "</s>") -> Template | None:
    """The template, with its system text, that writes what the chat template `text` (Jinja) writes; None: none does.

    The prompt of a first question must be equal. That of a second question may differ in how the first answer ends,
    which some released folders leave out or misspell; of several candidates the closest is taken.
    """
    marks = {"bos_token": bos_token, "eos_token": eos_token}
    theirs = [_written(text, prompt, marks) for prompt in _PROMPTS]
    if theirs[0] is None or theirs[1] is None:
        return None
    best, closest = None, -1.0
    for template in TEMPLATES.values():
        system = _system_text(template, theirs[0], marks)
        if system is None:
            continue
        candidate = template.with_system(system)
        ours = [_written(candidate.jinja(), prompt, marks) for prompt in _PROMPTS]
        if ours[1] is None or _loose(ours[1]) != _loose(theirs[1]):
            continue
        pairs = [(a, b) for a, b in zip(ours, theirs) if a is not None and b is not None]
        close = sum(difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in pairs)
        close += 0.001 * (system == template.system)  # of two that differ in their own system text only
        if close > closest:
            best, closest = candidate, close
    return best


def _system_text(template: Template, prompt: str, marks: Mapping[str, str]) -> str | None:
    """The system text with which a template writes this prompt; "" for none, None when it cannot."""
    if _written(template.with_system("").jinja(), _PROMPTS[0], marks) == prompt:
        return ""
    shape = _written(template.with_system(_SYSTEM).jinja(), _PROMPTS[0], marks)
    if shape is None or _SYSTEM not in shape:
        return None
    head, tail = shape.split(_SYSTEM)
    fits = prompt.startswith(head) and prompt.endswith(tail) and len(prompt) > len(head) + len(tail)
    return prompt[len(head) : len(prompt) - len(tail)] if fits else None


def _written(text: str, prompt: tuple, marks: Mapping[str, str]) -> str | None:
    """What a chat template makes of a prompt, less a start token in front; None where it refuses."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    for content in (_as_parts, _as_string):  # templates of text models take strings only
        messages = [{"role": role, "content": content(said)} for role, said in prompt]
        try:
            rendered, _ = render_jinja_template([messages], chat_template=text, add_generation_prompt=True, **marks)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            continue
        if "'type':" not in rendered[0]:  # a list, printed as it is
            return rendered[0].removeprefix(marks["bos_token"])
    return None


def _as_parts(said: tuple) -> list[dict[str, str]]:
    return [{"type": "image"} if part is _PICTURE else {"type": "text", "text": part} for part in said]


def _as_string(said: tuple) -> str:
    return "".join("<image>\n" if part is _PICTURE else part for part in said)


def _loose(text: str) -> str:
    """A text less what ends an answer and the space around it."""
    ends = "|".join(re.escape(end.strip()) for template in TEMPLATES.values() for end in template.stop if end.strip())
    return re.sub(rf"\s+|{ends}|<\\s>", "", text)
