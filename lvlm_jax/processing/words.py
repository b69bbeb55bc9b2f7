"""A tokenizer of whole words, built from a data set's own texts: for models that are trained from nothing."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def tokenizer(texts: Iterable[str], specials: Sequence[str], first: Sequence[str] = ()) -> "PreTrainedTokenizerFast":
    """The words of some texts, the same ids every time: the specials, then `first`, then all words by alphabet.

    "?" is a word of its own; "<" and ">" are cut off, so that a typed ``<image>`` cannot become the special token. A
    sequence starts with ``<s>``.

    Args:
      specials: ``<pad>``, ``<s>``, ``</s>`` and ``<unk>``, then names of special tokens of its own.
      first: words with the lowest ids, roles of a chat for example.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in text.replace("?", " ? ").split()})
    vocabulary = {token: number for number, token in enumerate([*specials, *first, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    cut = [pre_tokenizers.Split(mark, "isolated") for mark in "?<>"]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, pre_tokenizers.WhitespaceSplit()])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(specials[4:]),
        clean_up_tokenization_spaces=False,
    )
