"""Feed-forward blocks and the activations they use."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.nn.linear import linear
from lvlm_jax.nn.norms import LayerNorm
from lvlm_jax.shapes import Array, DTypeLike, Float

ACTIVATIONS: dict[str, Callable] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}


class Mlp(nn.Module):
    """Two dense layers with an activation between; `out_std` is the deviation of the last one's fresh weights."""

    hidden: int
    activation: str = "gelu"
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    out_std: float | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        hidden = linear(self.hidden, ("embed", "mlp"), use_bias=self.use_bias, dtype=self.dtype, name="up")(x)
        hidden = ACTIVATIONS[self.activation](hidden)
        last = linear(
            x.shape[-1], ("mlp", "embed"), use_bias=self.use_bias, dtype=self.dtype, std=self.out_std, name="down"
        )
        return last(hidden)


class GatedMlp(nn.Module):
    """Gated feed-forward: SwiGLU with "silu", GeGLU with "gelu_tanh".

    `inner_norm` is the epsilon of a layer norm before the last product (EVA-02, arXiv 2303.11331).
    """

    hidden: int
    activation: str = "silu"
    dtype: DTypeLike = jnp.float32
    use_bias: bool = False
    inner_norm: float | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = functools.partial(linear, self.hidden, ("embed", "mlp"), use_bias=self.use_bias, dtype=self.dtype)
        hidden = ACTIVATIONS[self.activation](wide(name="gate")(x)) * wide(name="up")(x)
        if self.inner_norm is not None:
            hidden = LayerNorm(self.inner_norm, self.dtype, axes=("mlp",), name="norm")(hidden)
        return linear(x.shape[-1], ("mlp", "embed"), use_bias=self.use_bias, dtype=self.dtype, name="down")(hidden)
