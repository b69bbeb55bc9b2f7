"""The one place where weights are born and their axes are named."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax import mesh
from lvlm_jax.nn import lora, quant
from lvlm_jax.shapes import Array, DTypeLike, Float, Params

Axes = tuple[str | None, ...]


def named(init: Callable, axes: Axes) -> Callable:
    """An initializer whose result carries its logical axis names.

    Raises:
      ValueError: a name that is not in `mesh.AXES`.
    """
    mesh.check_names(axes)
    return nn.with_logical_partitioning(init, axes)


class Linear(nn.Module):
    """A dense layer with a kernel [in, out]; low-rank adapters that stand beside the kernel are added (`nn.lora`)."""

    features: int
    axes: Axes
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    std: float | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        draw = nn.initializers.lecun_normal() if self.std is None else nn.initializers.normal(self.std)
        kernel = self.param("kernel", named(draw, self.axes), (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        if quant.is_quantized(kernel):
            kernel = quant.dequantize(kernel, self.dtype)
        # Not `x @ kernel`: qwix (`quant.trained_in`) puts its own in the place of this function alone.
        out = jax.lax.dot_general(x, kernel.astype(self.dtype), (((x.ndim - 1,), (0,)), ((), ())))
        if self.has_variable("params", lora.A):
            out = out + lora.delta(x, *(self.get_variable("params", name) for name in lora.NAMES))
        if self.use_bias:
            bias = self.param("bias", named(nn.initializers.zeros, self.axes[-1:]), (self.features,))
            out = out + bias.astype(self.dtype)
        return out


def linear(
    features: int,
    axes: Axes,
    *,
    use_bias: bool = False,
    dtype: DTypeLike = jnp.float32,
    std: float | None = None,
    name: str | None = None,
) -> Linear:
    """A dense layer with a kernel [in, out] named by `axes`, e.g. ``("embed", "mlp")``.

    Args:
      std: standard deviation of the initial kernel; default 1/sqrt(in).
    """
    mesh.check_names(axes)
    return Linear(features, axes, use_bias, dtype, std, name=name)


def init(module: nn.Module, key: jax.Array, *args: Any, **kwargs: Any) -> Params:
    """Random parameters of a module as a plain nested dict.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lvlm_jax.nn.linear import init
      >>> from lvlm_jax.nn.mlp import Mlp
      >>> params = init(Mlp(hidden=8), jax.random.key(0), jnp.zeros((1, 3, 4)))
      >>> {name: sorted(part) for name, part in params.items()}
      {'down': ['bias', 'kernel'], 'up': ['bias', 'kernel']}
    """
    return nn.unbox(module.init(key, *args, **kwargs)["params"])


def abstract(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Params, Params]:
    """(shapes, axes) of a module without computing anything: trees of `ShapeDtypeStruct` and of axis-name tuples."""
    boxed = jax.eval_shape(lambda key: module.init(key, *args, **kwargs)["params"], jax.random.key(0))
    shapes = nn.unbox(boxed)
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
    axes = jax.tree.map(lambda leaf: tuple(leaf.names) if is_box(leaf) else (None,) * leaf.ndim, boxed, is_leaf=is_box)
    return shapes, axes
