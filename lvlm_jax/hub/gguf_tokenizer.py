"""The tokenizer of a GGUF file, built from its metadata: vocabulary, merges or scores, special tokens, template."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.gguf import contents
from lvlm_jax.processing.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""What a token is: the format's ``token_type``."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _words() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's own rule


def _single_digits() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _words()])


def _split(digits: str) -> Callable[[], Any]:
    def make() -> Any:
        from tokenizers import Regex, pre_tokenizers

        rule = Regex(f"{_CONTRACTIONS}|{digits}|{_REST}")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(rule, behavior="isolated"), bytes_])

    return make


SPLITS: dict[str, Callable[[], Any]] = {
    "gpt-2": _words,
    "smollm": _single_digits,
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}
"""``tokenizer.ggml.pre`` -> how a text is cut before its pieces are merged."""


def tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that a GGUF file carries.

    Raises:
      CheckpointError: it carries none, or one of a kind that is not read here.
    """
    from transformers import PreTrainedTokenizerFast

    path = Path(path)
    meta = contents(path).metadata
    kind, words = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.tokens")
    if not words:
        raise CheckpointError(f"{path}: carries no tokenizer (tokenizer.ggml.tokens); give one in a folder")
    if kind not in _BACKENDS:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model is {kind!r}, which is not supported; supported: {', '.join(_BACKENDS)}. "
            "Give the tokenizer of the model's own folder instead"
        )
    backend, adds_bos = _BACKENDS[kind](meta, path)
    kinds = meta.get("tokenizer.ggml.token_type", [NORMAL] * len(words))
    _add(backend, words, kinds)
    named = {
        f"{name}_token": words[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := meta.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    if meta.get("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in named:
        from tokenizers import processors

        start = named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A",
            pair=f"{start} $A {start} $B",
            special_tokens=[(start, meta["tokenizer.ggml.bos_token_id"])],
        )
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            chat_template=meta.get("tokenizer.chat_template"),
            **named,
        )
    )


def marks(path: str | Path) -> dict[str, str]:
    """The start and end tokens that a chat template of this file may write."""
    meta = contents(path).metadata
    ids = {name: meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    words = meta.get("tokenizer.ggml.tokens", [])
    return {f"{name}_token": words[index] for name, index in ids.items() if index is not None}


def _add(backend: Any, words: list[str], kinds: list[int]) -> None:
    """Marks the tokens that are found whole in a text: control tokens, and words that a user defined."""
    from tokenizers import AddedToken

    whole = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    found = [(word, whole[kind]) for word, kind in zip(words, kinds, strict=True) if kind in whole]
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word, special in found if special])
    backend.add_tokens([AddedToken(word, special=False, normalized=False) for word, special in found if not special])


def _byte_pairs(meta: Mapping[str, Any], path: Path) -> tuple[Any, bool]:
    """(backend, whether it adds a BOS by default) of a byte-level BPE with its merges in order."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, processors

    rule = meta.get("tokenizer.ggml.pre")
    if rule not in SPLITS:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre is {rule!r}: how its text is cut is not known here; known: "
            f"{', '.join(SPLITS)}. Give the tokenizer of the model's own folder instead"
        )
    vocab = {word: index for index, word in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    # Llama 3 keeps whole words that no merge leads to.
    backend = Backend(models.BPE(vocab, merges, ignore_merges=rule == "llama-bpe"))
    backend.pre_tokenizer = SPLITS[rule]()
    backend.normalizer = normalizers.NFC() if rule == "qwen2" else None
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend, rule == "llama-bpe"


def _sentence_pieces(meta: Mapping[str, Any], path: Path) -> tuple[Any, bool]:
    """(backend, whether it adds a BOS by default) of a sentencepiece BPE: the pair of the best score merges first."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    words, scores = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.scores"]
    kinds = meta["tokenizer.ggml.token_type"]
    vocab = {word: index for index, word in enumerate(words)}
    pieces = {word for word, kind in zip(words, kinds, strict=True) if kind in (NORMAL, USER_DEFINED, UNUSED)}
    pairs = [
        (-score, vocab[word[:cut]], vocab[word[cut:]], word[:cut], word[cut:])
        for word, score, kind in zip(words, scores, kinds, strict=True)
        if kind == NORMAL
        for cut in range(1, len(word))
        if word[:cut] in pieces and word[cut:] in pieces
    ]
    unknown = next((word for word, kind in zip(words, kinds) if kind == UNKNOWN), None)
    merges = [pair[3:] for pair in sorted(pairs)]
    backend = Backend(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds))
    spaces, cut = normalizers.Replace(" ", "▁"), [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if meta.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        cut.append(decoders.Strip(content=" ", left=1))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(cut)
    return backend, True


_BACKENDS = {"gpt2": _byte_pairs, "llama": _sentence_pieces}
"""``tokenizer.ggml.model`` -> what builds it."""
