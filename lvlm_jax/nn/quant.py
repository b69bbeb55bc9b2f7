"""Dense layers in few bits, by qwix: frozen kernels, and the products of training.

Frozen kernels in few bits are what QLoRA (Dettmers et al., arXiv 2305.14314) trains adapters over.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lvlm_jax.shapes import Array, DTypeLike, Float

BLOCK = 64
"""Inputs that share a scale in NF4, as QLoRA has it (of a kernel whose inputs do not divide: the largest power of 2
that they have in common). The second quantisation, of the scales, is left out: scales stay float32."""

KINDS: dict[str, Callable[[int], dict]] = {
    "int8": lambda inputs: {"qtype": "int8", "channelwise_axes": (1,)},
    "nf4": lambda inputs: {"qtype": "nf4", "channelwise_axes": (1,), "tiled_axes": {0: math.gcd(inputs, BLOCK)}},
}
"""How a kernel [in, out] is held, by name: the settings that qwix takes. int8 has a scale for each output, NF4's 16
levels (the quantiles of a normal distribution) one for each block of inputs of an output. NF4's numbers have jax's
uint4: XLA keeps two of them in a byte on accelerators that pack them, and one in a byte on a CPU."""


def quantize(kernel: Float[Array, "D F"], kind: str) -> Any:
    """A kernel as qwix's `QArray`, a pytree of few-bit numbers and float32 scales, made where the kernel lies.

    Raises:
      ImportError: qwix is not installed.
    """
    return _quantizer(kind, kernel.shape[0])(kernel)


@functools.cache
def _quantizer(kind: str, inputs: int) -> Callable:
    """The compiled quantiser; one for all kernels of a shape."""
    try:
        import qwix
    except ImportError as error:
        raise ImportError(f"lora.base={kind!r} needs qwix: pip install 'lvlm-jax[quant]'") from error
    how = KINDS[kind](inputs)
    return jax.jit(lambda x: qwix.quantize(x.astype(jnp.float32), **how))


_DENSE = r".*/(q|k|v|o|up|gate|down)"  # of attention and feed-forward; the head is outside, and so are norms and scores


def trained_in(model: Any, kind: str) -> Any:
    """The module with the dense products of its `__call__` in int8, forward and backward, weights as they are.

    Activations, kernels and gradients are rounded at each product, with a scale a channel or row (AQT: Abdolrashidi et
    al., arXiv 2105.03536): what TPUs from v5e and GPUs from the A100 on compute faster than bfloat16.

    Args:
      kind: "int8", or "float", which returns the module itself.

    Raises:
      ImportError: qwix is not installed.
    """
    if kind == "float":
        return model
    try:
        import qwix
    except ImportError as error:
        raise ImportError(f"matmul={kind!r} needs qwix: pip install 'lvlm-jax[quant]'") from error
    numbers = dict.fromkeys(("weight_qtype", "act_qtype", "bwd_qtype"), kind)
    rule = qwix.QtRule(module_path=_DENSE, op_names=("dot_general",), **numbers)
    return qwix.quantize_model(model, qwix.QtProvider([rule]))


def is_quantized(kernel: Any) -> bool:
    """Whether it is what `quantize` returns."""
    return hasattr(kernel, "qvalue")


def dequantize(kernel: Any, dtype: DTypeLike = jnp.float32) -> Float[Array, "D F"]:
    """The kernel that a quantised one stands for."""
    import qwix

    return qwix.dequantize(kernel).astype(dtype)
