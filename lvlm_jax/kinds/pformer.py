"""Stages that train a P-Former on sentences alone, before a frozen language model (BLIText's stage 0)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.config import ConfigError
from lvlm_jax.connectors import pformer
from lvlm_jax.connectors.pformer import PFormerConfig
from lvlm_jax.hub import beside, download
from lvlm_jax.kinds.initial import absent, initial
from lvlm_jax.kinds.kind import Kind
from lvlm_jax.kinds.language import sweep
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.models.prompted import PromptedDecoder
from lvlm_jax.processing.captions import bert_ids, caption_of
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import TEXT, Encoded, Example
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.train import losses, pformer_losses

BERT_PARTS = ("embed", "position_embed", "type_embed", "norm", "layers")
"""What of a P-Former is BERT's; the rest begins at random."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the three losses, and where BERT's weights come from.

    mask: share of the words that the P-Former does not see, behind `mask_id` ([MASK]). smoothing, gathered: see
    `pformer_losses.sentence_loss`. bert: folder or hub name of the BERT that it begins as, "" for none.
    """

    mask: float = 0.25
    mask_id: int = 103
    smoothing: float = 0.1
    gathered: bool = True
    bert: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PFormerModel:
    """``config.model`` of a P-Former's pre-training, and what it eats.

    tokenizer: the language model's. reader: BERT's, a folder or a hub name. reads: positions of a row in BERT's words,
    padded with `pad_id` ([PAD]); the others are in the language model's. ends: what ends a sentence there.
    """

    pformer: PFormerConfig
    llm: DecoderConfig
    tokenizer: str
    reader: str
    reads: int = 32
    pad_id: int = 0
    ends: str = "\n"

    def __post_init__(self) -> None:
        if not 2 < self.reads <= self.pformer.context:
            raise ConfigError(f"reads={self.reads}: from 3 to pformer.context={self.pformer.context} positions")

    @property
    def width(self) -> tuple[str, int]:
        """What a mesh cuts: its field, and how wide it is."""
        return "llm.width", self.llm.width


def _check(recipe: Any, name: str, stage: Any) -> None:
    m, data = recipe.model, stage.data
    if data.pack or data.pictures:
        raise ConfigError(
            f"stages.{name}.data: sentences are compared row by row, and have no pictures: it needs pack=False and "
            f"pictures=0; here pack={data.pack}, pictures={data.pictures}"
        )
    least, most = m.reads + 1, m.reads + m.llm.context - m.pformer.prompt
    if not least <= data.length <= most:
        raise ConfigError(
            f"stages.{name}.data.length={data.length}: from {least} to {most}, model.reads={m.reads} positions in "
            f"BERT's words and the rest in the language model's, whose context also holds the prompt"
        )
    settings = KIND.settings_of(name, stage)
    if not 0 <= settings.mask_id < m.pformer.vocab or not 0 <= settings.mask < 1:
        raise ConfigError(
            f"stages.{name}.settings: mask_id={settings.mask_id} of pformer.vocab={m.pformer.vocab}, mask="
            f"{settings.mask}: an id of the vocabulary, and a share from 0 to below 1"
        )


def written(
    example: Example,
    reader: Tokenizer,
    writer: Tokenizer,
    reads: int,
    max_length: int,
    ends: str,
    sizes: tuple[int, int],
) -> Encoded:
    """A sentence twice: in BERT's words, filled up to `reads` positions, then in the language model's.

    Args:
      sizes: words that both sides have a row for.

    Raises:
      DataError: no sentence, or words that a side has no row for.
    """
    where = example.origin or f"example {example.id!r}"
    try:
        text = caption_of(example)
        read = bert_ids(text, reader, reads)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    begin = [] if writer.bos_id is None else [writer.bos_id]
    wrote = np.asarray([*begin, *writer.encode_text(text + ends)[0].tolist()], np.int32)[: max_length - reads]
    for name, ids, size in (("BERT", read, sizes[0]), ("the language model", wrote, sizes[1])):
        if ids.max() >= size:
            raise DataError(
                f"{where}: token id {ids.max()} is outside the {size} words of {name}; is it its tokenizer?"
            )
    tokens = np.concatenate([np.pad(read, (0, reads - len(read)), constant_values=reader.pad_id), wrote])
    return Encoded(tokens.astype(np.int32), np.ones(len(tokens), np.float32), np.full(len(tokens), TEXT, np.int32))


def _encoder(recipe: Any, stage: Any, tokenizer: Tokenizer) -> Callable[[Example], Encoded]:
    m = recipe.model
    with download.named("--config.model.reader"):
        reader = beside.tokenizer(m.reader)
    if reader.pad_id != m.pad_id:
        raise ConfigError(f"model.pad_id={m.pad_id}, but {m.reader} fills up with {reader.pad_id}: set pad_id to that")
    sizes = m.pformer.vocab, m.llm.vocab
    options = {"reads": m.reads, "max_length": stage.data.length, "ends": m.ends, "sizes": sizes}
    return functools.partial(written, reader=reader, writer=tokenizer, **options)


def _loss(model: Any, settings: Settings, head_trained: bool, shards: int) -> Callable:
    """The sum of the means of the three losses, and each of them."""

    def sentences(params: dict, batch: Any, key: jax.Array) -> tuple:
        run = functools.partial(model.apply, {"params": params})
        shown, real = run(batch, method="shown"), batch.segments.max(1) > 0
        hidden_words = pformer_losses.mask_words(
            key, jnp.asarray(batch.tokens)[:, : model.reads], shown, settings.mask_id, settings.mask
        )
        prompt, sentence = run(hidden_words, shown, method="read")
        tokens, segments = batch.tokens[:, model.reads :], batch.segments[:, model.reads :]
        states = run(prompt, tokens, segments, method="write")
        front = ((0, 0), (prompt.shape[1], 0))
        written = losses.language_loss(
            states,
            run(method="head_kernel"),
            jnp.pad(tokens, front),
            jnp.pad((segments > 0).astype(jnp.float32), front),
            head_trained=head_trained,
            shards=shards,
            softcap=model.config.final_softcap,
            **sweep(model),
        )
        found = {
            "language": written,
            "vocabulary": pformer_losses.vocabulary_loss(prompt, params["llm"]["embed"]["table"], real),
            "sentence": pformer_losses.sentence_loss(
                sentence,
                params["pformer"]["temperature"],
                real,
                smoothing=settings.smoothing,
                gathered=settings.gathered,
            ),
        }
        means = {name: losses.total(part) for name, part in found.items()}
        return sum(means.values()), 1.0, means

    return sentences


def bert_rows(config: PFormerConfig) -> list:
    """The rows of a P-Former's key table that are BERT's, in the torch library's names of a whole BERT."""
    kept = lambda path: path.removeprefix("pformer/").split("/")[0] in BERT_PARTS  # noqa: E731
    return [row for row in pformer.rows(config, "pformer", "bert.") if all(map(kept, row.leaves))]


def _begin(recipe: Any, stage: Any, model: Any, params: dict, batch: Callable, key: jax.Array) -> dict:
    return initial(params, bert_rows(recipe.model.pformer), KIND.settings_of("", stage).bert, "settings.bert")


def _model(recipe: Any, options: dict[str, Any]) -> PromptedDecoder:
    m = recipe.model
    return PromptedDecoder(m.pformer, m.llm, reads=m.reads, pad_id=m.pad_id, **options)


KIND = Kind(
    section=PFormerModel,
    settings=Settings,
    model=_model,
    loss=_loss,
    length=lambda recipe: recipe.model.reads + 2,
    draws=True,
    couples=True,
    check=_check,
    encoder=_encoder,
    begin=_begin,
    absent=lambda recipe, stage: absent(KIND.settings_of("", stage).bert, "settings.bert"),
)
"""The sentence from its prompt, the prompt near words, and sentences told apart."""
