"""Optimizers: AdamW or Adafactor, a schedule, rates and decay by part, and a clip that reads trained leaves only.

The trap this file avoids (measured on the real alignment step): masking the updates *after* a global-norm clip over all
gradients makes the compiler compute every gradient, 1.44 times the FLOPs and 12 times the memory. So either hand the
optimizer the trained tree alone (`make_optimizer`, what the train step does), or wrap it with `masked`, which puts the
whole optimizer, clip included, behind the mask.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lvlm_jax import params as trees
from lvlm_jax.nn import lora

SCHEDULES = ("cosine", "linear", "constant")
KINDS = ("adamw", "adafactor")
DECAYED = ("kernel", "table", lora.A, lora.B)
Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer and its learning-rate schedule.

    kind: "adamw", or "adafactor" (Shazeer and Stern, arXiv 1804.04235), whose second moments of a matrix with both axes
    of at least `factor_from` are one row and one column, and which has no first moments: b1, b2 and eps are Adam's
    alone. Its updates are clipped leaf by leaf to a root mean square of 1 (a scanned stack is one leaf), and the
    learning rate is absolute, as in big_vision.
    learning_rate: the peak. warmup: steps (an int) or a share of the stage's steps (a float below 1), linear from 0.
    end_factor: the last learning rate as a share of the peak. decay: patterns of the leaves that weight decay touches;
    None means kernels, tables and adapters, never biases, norms or gates. clip: global norm over the trained leaves,
    None for no clipping. adaptive_clip: what each output of a leaf may have of gradient, as a share of the norm of its
    weights (NFNet, arXiv 2102.06171, section 4: 0.01), None for no such bound; it comes before `clip`. lr_of: (pattern,
    peak learning rate) pairs for parts of the model; the first that matches a leaf decides.
    """

    learning_rate: float
    kind: str = "adamw"
    schedule: str = "cosine"
    warmup: int | float = 0
    end_factor: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    factor_from: int = 128
    weight_decay: float = 0.0
    decay: tuple[str, ...] | None = None
    clip: float | None = 1.0
    adaptive_clip: float | None = None
    lr_of: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"optimizer.kind={self.kind!r}: choose one of {list(KINDS)}")
        if self.factor_from < 1:
            raise ValueError(f"optimizer.factor_from={self.factor_from}: must be at least 1")
        if self.kind == "adafactor":
            for field in dataclasses.fields(self):
                if field.name in ("b1", "b2", "eps") and getattr(self, field.name) != field.default:
                    raise ValueError(
                        f"optimizer.{field.name}={getattr(self, field.name)} is not read by kind='adafactor', which "
                        "has factored second moments and no first ones; leave it out"
                    )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule={self.schedule!r}: choose one of {list(SCHEDULES)}")
        if isinstance(self.warmup, float) and not 0 <= self.warmup < 1:
            raise ValueError(
                f"optimizer.warmup={self.warmup}: a float is a share of the steps in [0, 1), an int a number of steps"
            )
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)}: must be in [0, 1)")
        if not 0 <= self.end_factor <= 1:
            raise ValueError(f"optimizer.end_factor={self.end_factor}: must be in [0, 1], a share of the peak rate")
        for name in ("learning_rate", "warmup", "eps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)}: must not be negative")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"optimizer.clip={self.clip}: a positive global norm, or None for no clipping")
        if self.adaptive_clip is not None and self.adaptive_clip <= 0:
            raise ValueError(
                f"optimizer.adaptive_clip={self.adaptive_clip}: a positive share of the weights' norm, or None"
            )


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Learning rate of update n (0-based) in a stage of `steps` steps.

    Linear warm-up from 0 at n = 0 to the peak at n = warm-up, then down to `end_factor` of the peak at n = `steps`: the
    curves of `get_cosine_schedule_with_warmup` and `get_linear_schedule_with_warmup`, which LLaVA was trained with.
    """
    share = isinstance(config.warmup, float)
    warmup = math.ceil(config.warmup * steps) if share else int(config.warmup)
    if warmup > steps:
        raise ValueError(f"optimizer.warmup={warmup} steps is longer than the stage's {steps} steps")

    def schedule(count: Any) -> Any:
        n = jnp.asarray(count, jnp.float32)
        done = jnp.clip((n - warmup) / max(1, steps - warmup), 0.0, 1.0)
        fall = {"cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)), "linear": 1 - done, "constant": jnp.ones_like(done)}
        after = config.end_factor + (1 - config.end_factor) * fall[config.schedule]
        return config.learning_rate * jnp.where(n < warmup, n / max(1, warmup), after)

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int, params: Mapping) -> optax.GradientTransformation:
    """The optimizer for exactly the leaves of `params` (the trained tree, arrays or shapes).

    One tree of moments whatever `lr_of` says: only the learning rate is partitioned, so the checkpoint keeps its shape
    when a part gets a rate of its own.

    Raises:
      ValueError: a pattern of `decay` or `lr_of` that matches none of the trained leaves.
    """
    chain = [] if config.adaptive_clip is None else [_adaptive_clip(config.adaptive_clip)]
    chain += [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    chain += _moments(config)
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, decay_mask(config, params)))
    base = make_schedule(config, steps)
    if not config.lr_of:
        return optax.chain(*chain, optax.scale_by_learning_rate(base))
    labels = dict.fromkeys(trees.flatten(params), "base")
    rates = {"base": base}
    for number, (pattern, rate) in reversed(list(enumerate(config.lr_of))):
        chosen = trees.flatten(trees.mask(params, (pattern,)))
        labels.update({path: f"part{number}" for path, hit in chosen.items() if hit})
        rates[f"part{number}"] = make_schedule(dataclasses.replace(config, learning_rate=rate, lr_of=()), steps)
    scales = {name: optax.scale_by_learning_rate(rate) for name, rate in rates.items()}
    return optax.chain(*chain, optax.partition(scales, trees.unflatten(labels)))


def _adaptive_clip(share: float) -> optax.GradientTransformation:
    """`optax.adaptive_grad_clip`, which reads a leaf's shape, on each layer of a scanned stack by itself."""
    inner = optax.adaptive_grad_clip(share)

    def clipped(path: tuple, update: Any, weights: Any) -> Any:
        one = lambda *leaves: inner.update(leaves[0], optax.EmptyState(), leaves[1])[0]  # noqa: E731
        name = "/".join(str(key.key) for key in path)
        return (jax.vmap(one) if trees.layer_paths(name, update.shape) else one)(update, weights)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree_util.tree_map_with_path(clipped, updates, params), state

    return optax.GradientTransformation(inner.init, update)


def _moments(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    """What divides a gradient by its size."""
    if config.kind == "adafactor":
        factored = optax.scale_by_factored_rms(min_dim_size_to_factor=config.factor_from)
        return [factored, optax.clip_by_block_rms(1.0)]
    return [optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)]


def masked(tx: optax.GradientTransformation, mask: Mapping) -> optax.GradientTransformation:
    """An optimizer for a full parameter tree that trains only the leaves whose mask is True.

    Frozen leaves get zero updates and hold no moment. `tx` sits whole behind the mask, so a clip inside it sees trained
    gradients only and the compiler drops the frozen ones. For anyone with a training loop of their own:

    >>> import jax.numpy as jnp, optax
    >>> from lvlm_jax import params
    >>> from lvlm_jax.train.optim import masked
    >>> weights = {"vision": {"kernel": jnp.ones((4, 4))}, "connector": {"kernel": jnp.ones((4, 2))}}
    >>> adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    >>> tx = masked(adamw, params.mask(weights, ["connector/**"]))
    >>> state = tx.init(weights)
    >>> updates, state = tx.update(weights, state, weights)
    >>> float(abs(updates["vision"]["kernel"]).max())
    0.0
    """
    labels = jax.tree.map(lambda on: "trained" if on else "frozen", dict(mask))
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def decay_mask(config: OptimizerConfig, params: Mapping) -> dict:
    """Boolean tree of the leaves that weight decay touches."""
    if config.decay is not None:
        return trees.mask(params, config.decay)
    return trees.unflatten({path: path.split("/")[-1] in DECAYED for path in trees.flatten(params)})
