"""How a recipe's text is written down: tokenizer, chat template, and what a connector reads beside a picture."""

from collections.abc import Callable
from typing import Any

from lvlm_jax.config import ConfigError
from lvlm_jax.data import easy_vqa, emoji
from lvlm_jax.hub import beside, download
from lvlm_jax.hub.export import IMAGE_TOKEN
from lvlm_jax.processing.chat_templates import TEMPLATES, Template
from lvlm_jax.processing.instruction import Instruction
from lvlm_jax.processing.tokenizer import Tokenizer


def _easy_vqa_words(folder: str) -> Any:
    if folder:
        raise ConfigError(f"model.tokenizer='easy_vqa:{folder}': its words are in a pip package; leave the folder out")
    return easy_vqa.word_tokenizer()


BUILT: dict[str, Callable[[str], Any]] = {"easy_vqa": _easy_vqa_words, "emoji": emoji.word_tokenizer}
"""Tokenizers that are built from a data set's words: "easy_vqa", "emoji:FOLDER" with the folder of its packages."""


def tokenizer_of(model: Any, field: str = "--config.model.tokenizer") -> Tokenizer:
    """The tokenizer of a recipe's model; an error names `field`."""
    built, _, folder = model.tokenizer.partition(":")
    if built in BUILT:
        return Tokenizer(BUILT[built](folder))
    with download.named(field):
        words = beside.tokenizer(model.tokenizer)
    # A language model's own tokenizer has no word for a picture, nor those of the template: it gets them as next ids.
    own = TEMPLATES[model.template].words if hasattr(model, "template") else ()
    new = [word for word in (*own, IMAGE_TOKEN) if not words.has_special(word)]
    expected = getattr(model, "image_token_id", None)
    if IMAGE_TOKEN in new and words.vocab_size + new.index(IMAGE_TOKEN) == expected:
        words.add_special(new)
    return words


def template_of(model: Any, name: str | None = None) -> Template:
    """The chat template with the recipe's system text."""
    template = TEMPLATES[name or model.template]
    return template if model.system is None else template.with_system(model.system)


def instruction_of(model: Any) -> Instruction | None:
    """What writes down what the connector reads beside a picture, where it reads anything."""
    said = model.instruction
    if said is None:
        return None
    with download.named("--config.model.instruction.tokenizer"):
        words = tokenizer_of(model) if said.tokenizer == model.tokenizer else beside.tokenizer(said.tokenizer)
    return Instruction(words, said.length, model.lvlm.connector.vocab)
