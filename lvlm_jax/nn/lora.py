"""LoRA: low-rank adapters beside frozen dense kernels (Hu et al., arXiv 2106.09685; rsLoRA: arXiv 2312.03732).

An adapter is three leaves beside a ``kernel`` [in, out]: ``lora_a`` [in, rank], ``lora_b`` [rank, out] and
``lora_scale``, a number that is never trained. A dense layer (`nn.linear.Linear`) that finds them adds
``(x @ a) @ b * scale``; one that does not is as before. So no model knows of adapters, scanned stacks, remat, sharding
and masks work as for any leaf, and the gradient of a kernel is not even part of the program. Adding ``a @ b`` to the
kernel in the forward pass instead computes each kernel's gradient to project it. By the compiler's count, for 4 layers
of width 2,048 at rank 16: 0.67 of a full step's FLOPs and 0.52 of its memory this way, 1.02 and 0.80 the other way.

There is no dropout on the way into an adapter (a layer would need a random key as an input).
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import params as trees
from lvlm_jax.nn import quant
from lvlm_jax.shapes import Array, Float, Params

A, B, SCALE = "lora_a", "lora_b", "lora_scale"
NAMES = (A, B, SCALE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of a stage.

    targets: path patterns of dense layers: ``("llm/**/attn/{q,k,v,o}",)``, or ``("llm/**",)`` for all of the decoder's.
    alpha: the adapter's product is multiplied by alpha / rank, with `rslora` by alpha / sqrt(rank). base: "int8" or
    "nf4" holds the kernels under the adapters in so many bits while the stage runs (QLoRA); "" as they are.
    """

    targets: tuple[str, ...]
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    base: Literal["", "int8", "nf4"] = ""

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError(f"lora.targets={self.targets!r}: a tuple of path patterns, ('llm/**/attn/{{q,k,v,o}}',)")
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank}: must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha={self.alpha}: must be positive")

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return scale_of(self.rank, self.alpha, self.rslora)


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def delta(
    x: Float[Array, "*B D"], a: Float[Array, "D R"], b: Float[Array, "R F"], scale: Float[Array, ""]
) -> Float[Array, "*B F"]:
    """What an adapter adds to a dense layer's output, in the dtype of `x`."""
    return (x @ a.astype(x.dtype)) @ b.astype(x.dtype) * scale.astype(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters in a tree


def targets(shapes: Mapping, axes: Mapping, patterns: tuple[str, ...]) -> list[str]:
    """Paths of the kernels that the patterns take, in the layout of `shapes`.

    A kernel of a dense layer has two axes, neither of them the vocabulary: an output head is multiplied row by row
    inside the loss, and an embedding is looked up.

    Raises:
      ValueError: a pattern that takes no dense layer, with near names, or only some layers of a scanned stack.
    """
    names, dense = trees.flatten(axes), {}
    for path, leaf in trees.flatten(shapes).items():
        cut = [name for name in names[path] if name != "layers"]
        if path.endswith("/kernel") and len(cut) == 2 and "vocab" not in cut:
            dense[path.removesuffix("/kernel")] = leaf
    try:
        chosen = trees.mask(trees.unflatten(dense), [pattern.removesuffix("/kernel") for pattern in patterns])
    except ValueError as error:
        raise ValueError(f"lora.targets, which name dense layers: {error}") from None
    return [f"{path}/kernel" for path, hit in trees.flatten(chosen).items() if hit]


def add(params: Params, axes: Params, config: Lora, key: jax.Array, shardings: Params | None = None) -> Params:
    """The parameters with fresh adapters, under which the model is what it was: `b` is zero.

    `a` is uniform within 1 / sqrt(in), as in the peft package, drawn by the path of each layer: a scanned stack and
    separate layers get the same numbers. Works under `jax.eval_shape`.

    Args:
      axes: logical axis names of each leaf of `params`.
      shardings: of each leaf after the addition (`mesh.shardings` of `add_axes`); None for the first device.
    """
    flat = trees.flatten(params)
    chosen = {path: flat[path].shape for path in targets(params, axes, config.targets)}

    def draw(key: jax.Array) -> dict:
        out = {}
        for path, shape in chosen.items():
            *lead, wide, narrow = shape
            rows = [zlib.crc32(row.encode()) for row in trees.layer_paths(path, shape) or [path]]
            bound = 1 / math.sqrt(wide)
            draws = [
                jax.random.uniform(jax.random.fold_in(key, row), (wide, config.rank), jnp.float32, -bound, bound)
                for row in rows
            ]
            out[beside(path, A)] = jnp.stack(draws) if lead else draws[0]
            out[beside(path, B)] = jnp.zeros((*lead, config.rank, narrow), jnp.float32)
            out[beside(path, SCALE)] = jnp.full(lead, config.scale, jnp.float32)
        return out

    where = None
    if shardings is not None:
        where = {path: at for path, at in trees.flatten(shardings).items() if is_adapter(path)}
    return trees.merge(params, trees.unflatten(jax.jit(draw, out_shardings=where)(key)))


def add_shapes(shapes: Params, axes: Params, config: Lora) -> tuple[Params, Params]:
    """(shapes, axes) of what `add` makes; an adapter is cut along the axes of its kernel, never along its rank."""
    grown = jax.eval_shape(lambda p: add(p, axes, config, jax.random.key(0)), shapes)
    names = trees.flatten(axes)
    for path in targets(shapes, axes, config.targets):
        *lead, wide, narrow = names[path]
        names[beside(path, A)], names[beside(path, B)] = (*lead, wide, None), (*lead, None, narrow)
        names[beside(path, SCALE)] = tuple(lead)
    return grown, trees.unflatten(names)


def beside(kernel: str, name: str) -> str:
    """The path of an adapter's leaf beside its kernel."""
    return f"{kernel.removesuffix('kernel')}{name}"


def is_adapter(path: str) -> bool:
    """Whether a path is one of an adapter's leaves."""
    return path.rpartition("/")[2] in NAMES


def split(params: Mapping) -> tuple[Params, Params]:
    """(the model without adapters, the adapters alone)."""
    flat = trees.flatten(params)
    parts = ({path: leaf for path, leaf in flat.items() if is_adapter(path) is wanted} for wanted in (False, True))
    return tuple(map(trees.unflatten, parts))


# ---------------------------------------------------------------------------------------------------------------------
# Merging


def merge(params: Mapping, adapters: Mapping | None = None) -> Params:
    """Plain parameters: kernel + scale * a @ b, computed in float32, in the kernel's dtype (float32 if quantised).

    Args:
      adapters: those of another tree (from disk); their layers may be apart while the model's stack is scanned.
        Default those inside `params`.
    """
    base, own = split(params)
    flat, low = trees.flatten(base), trees.flatten(own if adapters is None else adapters)
    for path in (p.removesuffix(A) + "kernel" for p in low if p.endswith(f"/{A}")):
        parts = [low[beside(path, name)] for name in NAMES]
        place, index = (path, None) if path in flat else trees.stack_path(path)
        if place not in flat:
            raise ValueError(f"an adapter for {path}, which this model does not have; is it for another model?")
        flat[place] = _merged(flat[place], index, *parts)
    return trees.unflatten(flat)


def _merged(kernel: Any, index: int | None, a: Any, b: Any, scale: Any) -> jax.Array:
    """One kernel with its adapter, where the kernel lies."""
    kernel = jnp.asarray(quant.dequantize(kernel)) if quant.is_quantized(kernel) else jnp.asarray(kernel)
    if a.shape[:-1] != kernel.shape[index is not None : -1] or b.shape[-1] != kernel.shape[-1]:
        raise ValueError(f"an adapter {list(a.shape)} x {list(b.shape)} does not fit a kernel {list(kernel.shape)}")
    whole = kernel.sharding
    if isinstance(whole, jax.sharding.NamedSharding):
        whole = jax.sharding.NamedSharding(whole.mesh, jax.sharding.PartitionSpec())
    return _merger(kernel.sharding)(kernel, index, *jax.device_put([a, b, scale], whole))


@functools.cache
def _merger(sharding: Any) -> Callable:
    def run(kernel: Any, index: Any, a: Any, b: Any, scale: Any) -> Any:
        a, b, scale = (x.astype(jnp.float32) for x in (a, b, scale))
        change = scale[..., None, None] * jnp.matmul(a, b, precision="highest")
        old = kernel if index is None else kernel[index]
        new = (old.astype(jnp.float32) + change).astype(kernel.dtype)
        return new if index is None else kernel.at[index].set(new)

    return jax.jit(run, out_shardings=sharding)


def quantized(frozen: Params, adapters: Mapping, kind: str) -> Params:
    """The frozen tree with the kernels that have adapters held in few bits (`quant.KINDS`).

    Raises:
      ValueError: a scanned stack, whose layers would have to be cut out of packed numbers.
    """
    flat = trees.flatten(frozen)
    for path in trees.flatten(adapters):
        if path.endswith(f"/{A}"):
            kernel = path.removesuffix(A) + "kernel"
            if len(np.shape(flat[kernel])) != 2:
                raise ValueError(f"lora.base={kind!r}: {kernel} is a scanned stack, which stays whole; set scan='no'")
            flat[kernel] = quant.quantize(flat[kernel], kind)
    return trees.unflatten(flat)
