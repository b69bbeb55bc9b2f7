"""Tiny GGUF files, written as llama.cpp's converter writes them."""

from pathlib import Path

import gguf
import numpy as np

from tests.tokenizers_tiny import LLAMA_SPECIAL, QWEN_SPECIAL, tiny_bpe

SIZES = {"width": 64, "mlp": 96, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 483, "context": 128}
_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SANDWICH = _PARTS | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QK = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
ARCHITECTURES = {
    "llama": _PARTS,
    "qwen2": _PARTS,
    "qwen3": _PARTS | _QK,
    "gemma": _PARTS,
    "gemma2": _SANDWICH,
    "gemma3": _SANDWICH | _QK,
}
"""Parts of a layer: GGUF name -> the torch library's."""
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def their_key(name, arch):
    """The torch library's key of a tensor of a GGUF file."""
    stem, end = name.rsplit(".", 1)
    if stem in _TOP:
        return f"{_TOP[stem]}.{end}"
    _, layer, part = stem.split(".")
    parts = ARCHITECTURES.get(arch, _PARTS)  # one that nobody reads is written too, to be refused
    return f"model.layers.{layer}.{parts[part]}.{end}"


def weights(arch="llama", tied=False, head=16, seed=0):
    """The tensors of a tiny decoder with heads of width `head` by GGUF names, as the torch library holds them."""
    s, rng = SIZES, np.random.default_rng(seed)
    rows = {"attn_q": s["heads"] * head, "attn_k": s["kv_heads"] * head, "attn_v": s["kv_heads"] * head}
    outs = {**rows, "ffn_gate": s["mlp"], "ffn_up": s["mlp"]}
    ins = {"ffn_down": s["mlp"], "attn_output": s["heads"] * head}
    shapes = {"token_embd.weight": (s["vocab"], s["width"]), "output_norm.weight": (s["width"],)}
    if not tied:
        shapes["output.weight"] = (s["vocab"], s["width"])
    for i in range(s["layers"]):
        for part in ARCHITECTURES[arch]:
            shape = (outs.get(part, s["width"]), ins.get(part, s["width"]))
            if part.endswith("norm"):
                shape = (head if part in _QK else s["width"],)
            shapes[f"blk.{i}.{part}.weight"] = shape
            if arch == "qwen2" and part in rows:
                shapes[f"blk.{i}.{part}.bias"] = shape[:1]
    return {name: (rng.normal(size=shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}


def _converted(name, tensor, arch):
    """What llama.cpp's converter makes of a tensor: pairs that rotate together become neighbours, norms gain one."""
    part = name.split(".")[-2]
    if arch == "llama" and part in ("attn_q", "attn_k"):
        heads = SIZES["heads"] if part == "attn_q" else SIZES["kv_heads"]
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(tensor.shape)
    return tensor + 1 if arch.startswith("gemma") and part.endswith("norm") else tensor


def write(path, tensors, arch="llama", kind="F32", tokenizer="gpt2", fields=None, drop=(), extra=None):
    """Writes a file; returns the tensors that a reader should find, by the torch library's keys.

    kind: of the matrices; norms and biases stay float32. fields: further metadata of the architecture.
    """
    s, writer = SIZES, gguf.GGUFWriter(Path(path), arch)
    numbers = {
        "context_length": s["context"],
        "embedding_length": s["width"],
        "block_count": s["layers"],
        "feed_forward_length": s["mlp"],
        "attention.head_count": s["heads"],
        "attention.head_count_kv": s["kv_heads"],
        **(fields or {}),
    }
    for name, value in numbers.items():
        if name in drop or value is None:
            continue
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[
            type(value)
        ](f"{arch}.{name}", value)
    if "attention.layer_norm_rms_epsilon" not in drop:
        writer.add_layer_norm_rms_eps(1e-5)
    if tokenizer:
        _add_tokenizer(writer, tokenizer)
    found = {}
    for name, tensor in tensors.items():
        converted, matrix = _converted(name, tensor, arch), tensor.ndim == 2
        qtype = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(converted), qtype)
        writer.add_tensor(name, data, raw_dtype=qtype)
        back = gguf.quants.dequantize(data, qtype).reshape(tensor.shape)
        found[their_key(name, arch)] = (tensor, back)
    for name, (data, qtype) in (extra or {}).items():
        writer.add_tensor(name, data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _add_tokenizer(writer, kind):
    """The tiny vocabularies of `tokenizers_tiny`: special tokens are control tokens, bytes are bytes."""
    vocab, merges = tiny_bpe("qwen" if kind == "gpt2" else "llama")
    words = [*vocab, *QWEN_SPECIAL] if kind == "gpt2" else list(vocab)
    special = QWEN_SPECIAL if kind == "gpt2" else LLAMA_SPECIAL
    types = [3 if word in special else 6 if kind == "llama" and word.startswith("<0x") else 1 for word in words]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("qwen2" if kind == "gpt2" else "default")
    writer.add_token_list(words)
    if kind == "gpt2":
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_eos_token_id(words.index("<|im_end|>"))
        writer.add_pad_token_id(words.index("<|endoftext|>"))
        writer.add_chat_template("{{ messages }}")
    else:
        types[words.index("<unk>")] = 2
        writer.add_token_scores([float(-i) for i in range(len(words))])
        writer.add_bos_token_id(words.index("<s>"))
        writer.add_eos_token_id(words.index("</s>"))
        writer.add_unk_token_id(words.index("<unk>"))
    writer.add_token_types(types)
