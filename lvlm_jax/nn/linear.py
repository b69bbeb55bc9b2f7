"""The one place where weights are born and their axes are named."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax import mesh
from lvlm_jax.shapes import DTypeLike, Params

Axes = tuple[str | None, ...]


def named(init: Callable, axes: Axes) -> Callable:
    """An initializer whose result carries its logical axis names.

    Raises:
      ValueError: a name that is not in `mesh.AXES`.
    """
    mesh.check_names(axes)
    return nn.with_logical_partitioning(init, axes)


def linear(
    features: int,
    axes: Axes,
    *,
    use_bias: bool = False,
    dtype: DTypeLike = jnp.float32,
    std: float | None = None,
    name: str | None = None,
) -> nn.Dense:
    """A dense layer with a kernel [in, out] named by `axes`, e.g. ``("embed", "mlp")``.

    Args:
      std: standard deviation of the initial kernel; default 1/sqrt(in).
    """
    init = nn.initializers.lecun_normal() if std is None else nn.initializers.normal(std)
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=named(init, axes),
        bias_init=named(nn.initializers.zeros, axes[-1:]),
        name=name,
    )


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
