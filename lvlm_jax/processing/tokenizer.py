"""Text to ids and back, by a Hugging Face fast tokenizer that never reads markup out of a user's words.

A tokenizer file lists *added tokens* (``<s>``, ``<image>``, ``<|im_end|>``) that the library finds inside any string.
Here they exist only by name (`Tokenizer.special_id`): text goes through a copy of the backend that does not know them.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_jax.shapes import Int

# Some released tokenizers forget to mark these as special. Other unmarked added tokens (runs of spaces, "<h1>") are
# ordinary vocabulary and stay.
_MARKUP = re.compile(r"^<\||^[<\[].*(image|img|vision|video|audio|pad)", re.IGNORECASE)


class Tokenizer:
    """A Hugging Face fast tokenizer behind an interface that keeps text and special tokens apart.

    Raises ValueError for a slow (pure Python) tokenizer and for one whose prefix rule cannot be reproduced.
    """

    def __init__(self, hf: Any):
        if not getattr(hf, "is_fast", False):
            raise ValueError(
                f"{type(hf).__name__} is not a fast tokenizer: without character offsets loss weights have no place. "
                "Load it with AutoTokenizer (it needs a tokenizer.json beside the weights) and save it again."
            )
        self.hf = hf
        self._prepare()

    def _prepare(self) -> None:
        """(Re)build the two backends that read plain text: at the start of a string, and after another token."""
        self._start, self._middle = _plain_backends(self.hf)
        # A "!" that serves as padding is still a character; "<s>" is never one.
        reserved = _reserved_ids(self.hf)
        self._markup = frozenset(i for i in reserved if re.match(r"[<\[].", self.hf.convert_ids_to_tokens(i)))
        bos = self.hf.bos_token_id
        self._adds_bos = bos is not None and self.hf("a")["input_ids"][:1] == [bos]

    def __reduce__(self):
        """Rebuilt in a worker process: a backend forgets on the way what it must not read."""
        return type(self), (self.hf,)

    @property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included."""
        return len(self.hf)

    @property
    def bos_id(self) -> int | None:
        """The id that starts a sequence, or None."""
        return self.hf.bos_token_id

    @property
    def eos_id(self) -> int | None:
        """The id that ends a sequence, or None."""
        return self.hf.eos_token_id

    @property
    def unknown_id(self) -> int | None:
        """The id of a word that is not in the vocabulary; None where there is none of its own (GPT-2's ends texts)."""
        return None if self.hf.unk_token_id in (self.bos_id, self.eos_id) else self.hf.unk_token_id

    @property
    def pad_id(self) -> int:
        """The id that fills a row; without one the end token, else 0 (`Batch.segments` is what marks padding)."""
        for candidate in (self.hf.pad_token_id, self.hf.eos_token_id):
            if candidate is not None:
                return candidate
        return 0

    @property
    def adds_bos(self) -> bool:
        """Whether this tokenizer, called on a string, puts its start token in front; `encode` then does the same."""
        return self._adds_bos

    def special_id(self, token: str) -> int:
        """The id of one special (added) token by its exact name; ValueError with close names when there is none."""
        known = self.hf.get_added_vocab()
        if token in known:
            return known[token]
        if token in self.hf.all_special_tokens:
            return self.hf.convert_tokens_to_ids(token)
        names = sorted({*known, *self.hf.all_special_tokens})
        close = difflib.get_close_matches(token, names, n=3, cutoff=0.4) or names[:8]
        raise ValueError(
            f"the tokenizer has no special token {token!r} (close: {', '.join(map(repr, close)) or 'it has none'}). "
            "Choose the template that belongs to this tokenizer, or add the token with Tokenizer.add_special."
        )

    def has_special(self, token: str) -> bool:
        """Whether `special_id` would find this name."""
        return token in self.hf.get_added_vocab() or token in self.hf.all_special_tokens

    def word_ids(self, texts: Iterable[str]) -> list[int]:
        """Of texts that end an answer the id of each that is one token: special ones by name, a line break, ..."""
        out = []
        for text in texts:
            ids = [self.special_id(text)] if self.has_special(text) else self.encode_text(text, first=False)[0].tolist()
            out += ids if len(ids) == 1 and ids[0] != self.unknown_id else []
        return out

    def add_special(self, tokens: Iterable[str]) -> list[int]:
        """Add special tokens that are not there yet; returns the id of each (the embedding must have room for them)."""
        from tokenizers import AddedToken

        tokens = list(tokens)
        self.hf.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], special_tokens=True)
        self._prepare()
        return [self.special_id(token) for token in tokens]

    def encode_text(self, text: str, first: bool = True) -> tuple[Int[np.ndarray, "T"], list[tuple[int, int]]]:
        """Ids of plain text and the (start, stop) characters that each stands for; no BOS or EOS is added.

        `first` says that nothing but the tokenizer's own BOS comes before the text; after a special token or a picture
        it is False (some sentencepiece tokenizers put a dummy space only at the start). Characters that spell a special
        token stay characters. Raises ValueError for a tokenizer whose very model spells one.
        """
        encoding = (self._start if first else self._middle).encode(text, add_special_tokens=False)
        ids = encoding.ids
        if leaked := sorted(self._markup.intersection(ids)):
            names = [self.hf.convert_ids_to_tokens(i) for i in leaked]
            raise ValueError(
                f"plain text became the special token {', '.join(map(repr, names))}: this tokenizer's model itself "
                "spells it, so text cannot be told from markup; use one whose special tokens are added tokens only"
            )
        return np.asarray(ids, np.int32), encoding.offsets

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "T"], skip_special: bool = True) -> str:
        """Ids back to text."""
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def save(self, folder: str | Path) -> None:
        """Write the files that AutoTokenizer loads, and prove that it loads this same tokenizer from them.

        transformers 5 forgets the `legacy` of a LlamaTokenizer on the way: what it loads again then has other ids after
        every special token. So `legacy` is written here, and where that is not enough the plain class is named, which
        takes tokenizer.json as it is. Raises ValueError when neither helps.
        """
        from transformers import AutoTokenizer

        self.hf.save_pretrained(str(folder))
        path = Path(folder) / "tokenizer_config.json"
        saved = json.loads(path.read_text())
        legacy = getattr(self.hf, "legacy", None)
        kept = saved if legacy is None else {**saved, "legacy": legacy}
        for config in (kept, {**saved, "tokenizer_class": "PreTrainedTokenizerFast"}):
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            if _pipeline(AutoTokenizer.from_pretrained(str(folder))) == _pipeline(self.hf):
                return
        raise ValueError(
            f"{folder}: AutoTokenizer loads another tokenizer than the {type(self.hf).__name__} saved there"
        )


def load_tokenizer(folder_or_name: str | Path, revision: str | None = None) -> Tokenizer:
    """A tokenizer from a folder or a hub name; code from the hub is never run. FileNotFoundError says what it takes."""
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(folder_or_name), revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{folder_or_name}: no tokenizer there. Give a folder with tokenizer.json and tokenizer_config.json, or "
            f"the name of a repository that can be reached or is in the cache ({str(error).splitlines()[0]})"
        ) from error
    return Tokenizer(hf)


def _pipeline(hf: Any) -> tuple[Any, ...]:
    """What decides the ids of a string besides the vocabulary."""
    spec = json.loads(hf.backend_tokenizer.to_str())
    return len(hf), spec["normalizer"], spec["pre_tokenizer"], spec["post_processor"], hf.bos_token_id, hf.eos_token_id


def _reserved_ids(hf: Any) -> set[int]:
    """Ids that no user text may become: everything marked special, and unmarked tokens that read like markup."""
    added = {i for i, token in hf.added_tokens_decoder.items() if token.special or _MARKUP.search(token.content)}
    # <unk> is what an unknown character becomes; it is no markup.
    return (added | set(hf.all_special_ids)) - {hf.unk_token_id}


def _plain_backends(hf: Any) -> tuple[Any, Any]:
    """Backends blind to markup tokens: for text at the start of a string, and for text after a special token."""
    spec = json.loads(hf.backend_tokenizer.to_str())
    reserved = _reserved_ids(hf) | {hf.unk_token_id}
    for token in spec["added_tokens"]:  # taking them out instead would renumber those that stay
        token["special"] = token["special"] or token["id"] in reserved
    spec.update(post_processor=None, truncation=None, padding=None)
    start = _blind(spec)

    special = next((t for t in hf.all_special_tokens if t != hf.unk_token), None)
    if special is None:
        return start, start
    # The library's own answer, asked once: does a text after a special token start as a text at the start does?
    probe = hf.encode(special + "a", add_special_tokens=False)[1:]
    if probe == start.encode("a", add_special_tokens=False).ids:
        return start, start
    middle = _blind(_without_prefix(spec))
    if probe != middle.encode("a", add_special_tokens=False).ids:
        raise ValueError(
            f"{type(hf).__name__}: the prefix it puts on text after {special!r} is neither the one at the start nor "
            "none, so ids would not equal the library's; save it again with a Metaspace pre-tokenizer"
        )
    return start, middle


def _blind(spec: dict[str, Any]) -> Any:
    """A backend that reads the names of its special tokens as characters."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(spec))
    backend.encode_special_tokens = True
    return backend


def _without_prefix(node: Any) -> Any:
    """The tokenizer description with every dummy-prefix rule switched off."""
    if isinstance(node, list):
        return [_without_prefix(n) for n in node if not (isinstance(n, dict) and n.get("type") == "Prepend")]
    if not isinstance(node, dict):
        return node
    node = {k: v if k in ("vocab", "merges", "added_tokens") else _without_prefix(v) for k, v in node.items()}
    if isinstance(node.get("normalizer"), dict) and node["normalizer"].get("type") == "Prepend":
        node["normalizer"] = None
    if node.get("type") == "Metaspace":
        node["prepend_scheme"] = "never"
    if "add_prefix_space" in node:
        node["add_prefix_space"] = False
    return node
