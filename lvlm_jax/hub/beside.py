"""What stands beside the weights in a folder: the picture processor and the chat template."""

import json
import re
from pathlib import Path

from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.configs import read_json
from lvlm_jax.processing.chat_templates import TEMPLATES, Template
from lvlm_jax.processing.image import ImageSpec


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
                return ImageSpec.from_hf(content, patch)
            except ValueError as error:
                raise CheckpointError(f"{folder / name}: {error}") from error
    return None


def chat_template(folder: str | Path) -> Template | None:
    """The template that a folder's chat template stands for; None where it has none or one that we do not know.

    One that `export_folder` wrote comes back with its own system text; others are known by their markers.
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
            return template.with_system(unquoted)
    if "<|im_start|>" in text:
        return TEMPLATES["qwen_chatml"]
    if "USER:" in text or "upper()" in text:  # the released folders write the role in capitals
        return TEMPLATES["vicuna_v1"]
    return None


def _jinja(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, str):
                return found
    return None
