"""GGUF files (llama.cpp): their metadata as a public config.json, their tensors under the torch library's keys.

The package ``gguf`` knows the file format, the names and the arithmetic of every quantisation. Tensors are read and
dequantised one at a time, when they are asked for. What llama.cpp's converter changes is undone: the order of the rows
of q and k (it rotates neighbouring pairs), and the one that it adds to Gemma's norms.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lvlm_jax import llm
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.safetensors_io import ByKey, read_bytes

SPLIT_ADVICE = "join its parts first: llama-gguf-split --merge FIRST_PART OUT"


class Tensor(NamedTuple):
    """Where a tensor lies: its kind of numbers by the format's name, its shape (rows first), its bytes in the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file's header says."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def contents(path: str | Path) -> Contents:
    """The header of a GGUF file.

    Raises:
      ModuleNotFoundError: the package ``gguf`` is not installed.
      CheckpointError: no whole GGUF file, or numbers that nobody can read here.
    """
    path = Path(path)
    status = path.stat()
    return _contents(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(
    maxsize=2
)  # config, weights, tokenizer and template ask one after the other; parsing takes seconds
def _contents(path: Path, changed: int, size: int) -> Contents:
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: not a GGUF file that the package gguf can read ({error}). Is it whole ({size} bytes)? Of a newer "
            "quantisation, update the package: pip install -U gguf"
        ) from error
    if reader.byte_order == "S":
        raise CheckpointError(f"{path}: a big-endian GGUF file, which is not read here; fetch the little-endian one")
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(f"{path}: one of {metadata['split.count']} parts of a GGUF model; {SPLIT_ADVICE}")
    tensors = {
        t.name: Tensor(t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    }
    for name, tensor in tensors.items():
        if tensor.offset + tensor.size > size:
            raise CheckpointError(f"{path}: ends inside tensor {name!r} ({size} bytes): fetch or copy it again")
    unread = {tensor.kind: name for name, tensor in tensors.items() if not _readable(tensor.kind)}
    if unread:
        kind, name = next(iter(unread.items()))
        raise CheckpointError(
            f"{path}: tensor {name!r} is quantised as {kind}, which is not read here. Make a file of another kind with "
            "llama.cpp's llama-quantize (Q8_0, Q4_K_M and F16 are read), or update the package: pip install -U gguf"
        )
    return Contents(metadata, tensors)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ModuleNotFoundError("to read a GGUF file: pip install 'lvlm-jax[gguf]'") from error
    return gguf


_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@functools.cache
def _readable(kind: str) -> bool:
    """Whether the package has the arithmetic of a quantisation: it is tried on one block."""
    gguf = _package()
    if kind in _PLAIN:
        return True
    qtype = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[qtype][1]), np.uint8), qtype)
    except (NotImplementedError, KeyError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Architectures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How a model of ours is written down in GGUF.

    model_type: the torch library's name. permuted: q and k have their rows in another order. norm_offset: what was
    added to the scales of the norms. fields: further entries of the public config, by what reads the metadata and the
    entries so far.
    """

    model_type: str
    permuted: bool = False
    norm_offset: float = 0.0
    fields: Callable[[Callable[..., Any], Mapping[str, Any]], Mapping[str, Any]] = lambda of, config: {}


_TANH = {"hidden_activation": "gelu_pytorch_tanh"}


def _query_scalar(config: Mapping[str, Any], layers_of_27b: int) -> int:
    """What Gemma 2 and 3 divide scores by, squared: the width of a head, but of 27B its share of the model's width."""
    share = config["hidden_size"] // config["num_attention_heads"]
    return share if config["num_hidden_layers"] == layers_of_27b else config["head_dim"]


def _gemma2(of: Callable[..., Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_TANH,
        "attn_logit_softcapping": of("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": of("final_logit_softcapping", 30.0),
        "sliding_window": of("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _query_scalar(config, 46),
    }


def _gemma3(of: Callable[..., Any], config: Mapping[str, Any]) -> dict[str, Any]:
    window = of("attention.sliding_window", 1024)
    return {**_TANH, "sliding_window": window, "query_pre_attn_scalar": _query_scalar(config, 62)}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(model_type="llama", permuted=True),
    "qwen2": Architecture(model_type="qwen2"),
    "qwen3": Architecture(model_type="qwen3"),
    "gemma": Architecture(model_type="gemma", norm_offset=1.0, fields=lambda of, config: _TANH),
    "gemma2": Architecture(model_type="gemma2", norm_offset=1.0, fields=_gemma2),
    "gemma3": Architecture(model_type="gemma3_text", norm_offset=1.0, fields=_gemma3),
}
"""``general.architecture`` -> what it is here."""


def _architecture(metadata: Mapping[str, Any], path: Path) -> Architecture:
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: general.architecture is {name!r}, which is not supported in a GGUF file; supported: "
            f"{', '.join(ARCHITECTURES)}. Many models load from their folder of safetensors files instead"
        )
    if metadata.get(f"{name}.expert_count"):
        raise CheckpointError(f"{path}: {name}.expert_count: a mixture of experts, which is not supported")
    return ARCHITECTURES[name]


def public_config(path: str | Path) -> dict[str, Any]:
    """The config.json that the torch library would have for the model of a GGUF file.

    Raises:
      CheckpointError: an architecture or a value that cannot be run.
    """
    path = Path(path)
    found = contents(path)
    meta, tensors = found.metadata, found.tensors
    architecture, name = _architecture(meta, path), meta["general.architecture"]

    def of(field: str, default: Any = None) -> Any:
        value = meta.get(f"{name}.{field}", default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise CheckpointError(f"{path}: {name}.{field} differs from layer to layer, which is not supported")
            value = value[0]
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05, not 9.99999974e-06

    needed = ["embedding_length", "block_count", "feed_forward_length", "attention.head_count", "context_length"]
    if missing := [f"{name}.{field}" for field in needed if of(field) is None]:
        raise CheckpointError(f"{path}: its metadata lacks {', '.join(missing)}; is it a whole model?")
    heads, width = of("attention.head_count"), of("embedding_length")
    head_dim = of("attention.key_length", width // heads)
    out = {
        "model_type": architecture.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else of("vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": of("block_count"),
        "intermediate_size": of("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon", 1e-5),
        "max_position_embeddings": of("context_length"),
        "rope_theta": of("rope.freq_base", 10000.0),
        "rope_scaling": _scaling(path, of),
        "partial_rotary_factor": of("rope.dimension_count", head_dim) / head_dim,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return {**out, **architecture.fields(of, out)}


def _scaling(path: Path, of: Callable[..., Any]) -> dict[str, Any] | None:
    """``rope_scaling`` of the public config; Llama 3's is a tensor of factors in these files."""
    kind = of("rope.scaling.type", "none")
    if kind != "none":
        scaling = {"rope_type": kind, "factor": of("rope.scaling.factor")}
        context = of("rope.scaling.original_context_length")
        return scaling | ({} if context is None else {"original_max_position_embeddings": context})
    if "rope_freqs.weight" not in contents(path).tensors:
        return None
    factors = read(path, "rope_freqs.weight")
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(factors, _llama3_factors(len(factors), of("rope.freq_base", 10000.0), scaling), rtol=1e-4):
        raise CheckpointError(f"{path}: rope_freqs.weight is not Llama 3's scaling of the rotation, no other is known")
    return scaling


def _llama3_factors(pairs: int, theta: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """What each rotary frequency is divided by: 1 for short waves, `factor` for long ones, a ramp between."""
    waves = 2 * math.pi * theta ** (np.arange(pairs) / pairs)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / waves - low) / (high - low), 0.0, 1.0)
    return 1 / (smooth + (1 - smooth) / scaling["factor"])


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def read(path: str | Path, name: str) -> np.ndarray:
    """One tensor under its own name; quantised ones as float32, others as they are."""
    kind, shape, offset, size = contents(path).tensors[name]
    raw = read_bytes(Path(path), offset, size, name)
    if kind in _PLAIN:
        return raw.view(_PLAIN[kind]).reshape(shape)
    gguf = _package()
    qtype = gguf.GGMLQuantizationType[kind]
    rows = raw.reshape(gguf.quant_shape_to_byte_shape(shape, qtype))
    return gguf.quants.dequantize(rows, qtype).reshape(shape)


class GgufFile(ByKey):
    """The tensors of a GGUF file under the torch library's keys; one that has no such key keeps its own name.

    Raises:
      CheckpointError: as `contents` and `public_config`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._contents = contents(self.path)
        config = public_config(self.path)
        self._architecture = _architecture(self._contents.metadata, self.path)
        self._heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        family = llm.FAMILIES[self._architecture.model_type]
        table = _names(self._contents.metadata["general.architecture"], config["num_hidden_layers"])
        try:
            rows = family.rows(family.from_hf(config), "", "model.")
        except ValueError as error:
            raise CheckpointError(f"{self.path}: its metadata, as a {error}") from error
        named = {row.theirs: table(row.theirs) for row in rows}
        self._entries = {key: name for key, name in named.items() if name in self._contents.tensors}
        taken = {*self._entries.values(), "rope_freqs.weight"}
        self._entries |= {name: name for name in self._contents.tensors if name not in taken}

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._contents.tensors[self._entries[key]].shape

    def dtype(self, key: str) -> np.dtype:
        """Number type of one tensor as `read` gives it."""
        return _PLAIN.get(self._contents.tensors[self._entries[key]].kind, np.dtype(np.float32))

    def file(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self.path

    def read(self, key: str) -> np.ndarray:
        """One tensor as the torch library has it."""
        name = self._entries[key]
        tensor = read(self.path, name)
        part = name.split(".")[-2]
        if self._architecture.permuted and part in self._heads:
            pairs = tensor.reshape(self._heads[part], -1, 2, *tensor.shape[1:])
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
        if self._architecture.norm_offset and part.endswith("norm"):
            return tensor - np.asarray(self._architecture.norm_offset, tensor.dtype)
        return tensor


def _names(architecture: str, layers: int) -> Callable[[str], str | None]:
    """The torch library's key -> the name of the tensor in a GGUF file, by the package's own table."""
    gguf = _package()
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, layers)
    return lambda key: table.get_name(key, try_suffixes=(".weight", ".bias"))
