"""Tiny tokenizers with the exact structure of the public ones, built in code.

``llama_tiny(legacy=True)``: Llama 1/2 and Vicuna as released (BPE with byte fallback, a Prepend and a Replace
normalizer, so that a dummy space precedes the text after every special token). ``legacy=False``: the later form
(Metaspace, a dummy space only at the start). ``qwen_tiny()``: byte-level BPE with Qwen2's split and no BOS.
"""

import functools
import json
import string

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "You are a helpful assistant. system user assistant",
    "What is the color of the shape in the image? The shape is a red circle. Is there a blue triangle? yes no",
    "Describe this picture in one sentence. a black cat sits on a green mat and looks at two yellow birds",
    "How many dogs are there? There are three dogs near the river, and one of them is small.",
    "the quick brown fox jumps over the lazy dog while it rains; 0 1 2 3 4 5 6 7 8 9",
    string.ascii_letters + string.punctuation,
]
LLAMA_SPECIAL = ("<unk>", "<s>", "</s>")
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def tiny_bpe(kind: str, vocab_size: int = 480) -> tuple[dict, list]:
    """(vocab, merges) of a small BPE."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if kind == "llama":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
        reserved = [*LLAMA_SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=reserved, show_progress=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def llama_tiny(legacy: bool = True, extra: tuple[str, ...] = ("<image>",), vocab_size: int = 480):
    """A Llama/Vicuna-shaped PreTrainedTokenizerFast: <unk> 0, <s> 1, </s> 2, 256 bytes, pieces, then `extra`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab, merges = tiny_bpe("llama", vocab_size)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*LLAMA_SPECIAL, *extra)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def qwen_tiny(extra: tuple[str, ...] = ("<image>",), vocab_size: int = 480):
    """A Qwen2-shaped PreTrainedTokenizerFast: byte-level pieces, then the three ChatML tokens and `extra`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab, merges = tiny_bpe("qwen", vocab_size)
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*QWEN_SPECIAL, *extra)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


LLAMA_3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")


def llama3_tiny(extra: tuple[str, ...] = ("<image>",), vocab_size: int = 480):
    """A Llama-3-shaped PreTrainedTokenizerFast: byte-level pieces, the header tokens, and a BOS that it adds."""
    from tokenizers import AddedToken, processors

    hf = qwen_tiny(extra=(), vocab_size=vocab_size)
    names = (*LLAMA_3_SPECIAL, *extra)
    hf.add_tokens([AddedToken(t, special=True, normalized=False) for t in names], special_tokens=True)
    hf.bos_token, hf.eos_token, hf.pad_token = "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"
    bos = hf.convert_tokens_to_ids("<|begin_of_text|>")
    hf.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]),
        ]
    )
    return hf


def gemma_tiny(extra: tuple[str, ...] = ("<image>",), vocab_size: int = 480):
    """A Gemma-shaped PreTrainedTokenizerFast: BPE with byte fallback, no dummy space, runs of line breaks as words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab, merges = tiny_bpe("llama", vocab_size)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*GEMMA_SPECIAL, *extra)])
    backend.add_tokens([AddedToken("\n" * i, special=False, normalized=False) for i in (1, 2, 3)])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def bert_tiny():
    """A BERT-shaped PreTrainedTokenizerFast: WordPiece in small letters, whole words of `CORPUS` and single letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for line in CORPUS[:6] for word in line.lower().split() if word.isalpha()})
    letters = [*string.ascii_lowercase, *string.digits]
    names = [*BERT_SPECIAL, *dict.fromkeys([*letters, *(f"##{letter}" for letter in letters), *words])]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **special, mask_token="[MASK]", clean_up_tokenization_spaces=False
    )
