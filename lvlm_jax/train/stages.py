"""Stages of a training run as values: what trains, for how long, with which optimizer.

The boolean mask that `Stage.mask` gives is the only truth about what is trained: it splits the parameters, decides
dtype, moments and checkpoints, and what the log prints.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from lvlm_jax import params as trees
from lvlm_jax.nn import lora
from lvlm_jax.nn.lora import Lora
from lvlm_jax.shapes import DTypeLike
from lvlm_jax.train.optim import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikePolicy:
    """When to throw an update away.

    A loss or gradient norm that is not finite is always skipped. factor: also skip a loss above `factor` times its
    moving average (0: off; 3 is a common choice). patience: stop the run after this many skips in a row. memory: weight
    of the past in the moving average.
    """

    factor: float = 0.0
    patience: int = 10
    memory: float = 0.98

    def __post_init__(self) -> None:
        if self.factor and self.factor <= 1:
            raise ValueError(f"spike.factor={self.factor}: 0 (off) or more than 1 (times the average loss)")
        if self.patience < 1:
            raise ValueError(f"spike.patience={self.patience}: at least 1 skipped step before the run stops")
        if not 0 <= self.memory < 1:
            raise ValueError(f"spike.memory={self.memory}: must be in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Average:
    """An exponential moving average of the trained leaves (EMA), kept in the checkpoints beside them.

    decay: weight of the past; 0.999 looks back over about the last 1,000 updates. use: whether evaluations, what the
    stage hands on and the export take the average; else the last weights, and the average lies in ``average/``.
    """

    decay: float = 0.999
    use: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"average.decay={self.decay}: must lie between 0 and 1, such as 0.999")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    trains: path patterns (``("connector/**",)``) of the leaves that move. lora: adapters, which move besides.
    accumulate: microbatches a step. average: whether and how a moving average of the trained leaves is kept.
    log_every, save_every, eval_every: in steps; 0 means never (the last step is always saved). keep: checkpoints kept.
    profile: first and last step of a profiler's trace.
    """

    name: str
    trains: Sequence[str]
    steps: int
    optimizer: OptimizerConfig
    lora: Lora | None = None
    average: Average | None = None
    accumulate: int = 1
    log_every: int = 10
    save_every: int = 0
    keep: int = 2
    eval_every: int = 0
    spike: SpikePolicy = SpikePolicy()
    profile: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"stage.name={self.name!r}: a folder name, such as 'align' or 'instruct'")
        at = f"stages.{self.name}"
        if isinstance(self.trains, str) or not (self.trains or self.lora):
            raise ValueError(f"{at}.trains={self.trains!r}: a tuple of path patterns, ('connector/**',)")
        for name, least in (("steps", 1), ("accumulate", 1), ("log_every", 0), ("save_every", 0), ("keep", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{at}.{name}={getattr(self, name)}: must be at least {least}")
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1] <= self.steps):
            raise ValueError(
                f"{at}.profile={self.profile}: the first and the last step, as in (10, 12), of {self.steps}"
            )
        if self.eval_every < 0:
            raise ValueError(f"{at}.eval_every={self.eval_every}: must be at least 0")

    def mask(self, params: Mapping) -> dict:
        """Boolean tree in the layout of `params` (adapters and all), True where this stage trains.

        Raises:
          ValueError: a pattern that matches nothing, that takes some layers of a scanned stack only, or that takes
            weights under an adapter; a tree without the stage's adapters.
        """
        base, adapters = map(trees.flatten, lora.split(params))
        if bool(adapters) != bool(self.lora):
            have = "has adapters" if adapters else "has no adapters (nn.lora.add)"
            raise ValueError(f"stage.lora of {self.name!r} is {self.lora}, but the tree {have}")
        hit = trees.flatten(trees.mask(trees.unflatten(base), self.trains))
        if both := sorted(p for p in hit if hit[p] and lora.beside(p, lora.A) in adapters and p.endswith("/kernel")):
            raise ValueError(
                f"stage.trains={tuple(self.trains)} of {self.name!r} takes {both[0]} ({len(both)} in all), which "
                "stage.lora holds frozen under an adapter: name parts without adapters, such as ('connector/**',)"
            )
        return trees.unflatten(hit | {path: not path.endswith(lora.SCALE) for path in adapters})


def in_stage_dtype(params: Mapping, mask: Mapping, frozen: DTypeLike) -> dict:
    """The parameters as a stage runs them: trained leaves and adapters float32, frozen leaves in `frozen`.

    Keep the originals: thawing must start from them, not from a rounded copy.
    """
    trained, rest = trees.split(params, mask)
    rest, scales = lora.split(rest)
    return trees.merge(trees.cast(trained, "float32"), trees.cast(rest, frozen), scales)


@dataclasses.dataclass(frozen=True)
class Share:
    """How much of one part of the model a stage trains, in scalars."""

    part: str
    total: int
    trained: int

    @property
    def percent(self) -> float:
        """Trained share in percent."""
        return 100 * self.trained / max(1, self.total)


def trained_share(params: Mapping, mask: Mapping) -> list[Share]:
    """One row for each top-level part of the model and a last one for the whole."""
    flat, chosen = trees.flatten(params), trees.flatten(mask)
    rows = []
    for part in params:
        paths = [path for path in flat if path == part or path.startswith(f"{part}/")]
        total = trees.size([flat[path] for path in paths])
        rows.append(Share(part, total, trees.size([flat[path] for path in paths if chosen[path]])))
    return [*rows, Share("all", sum(r.total for r in rows), sum(r.trained for r in rows))]


def share_text(rows: list[Share]) -> str:
    """The table of `trained_share` as text."""
    width = max(len("part"), *(len(row.part) for row in rows))
    lines = [f"{'part':<{width}}  {'weights':>15}  {'trained':>15}  {'share':>8}"]
    for row in rows:
        lines.append(f"{row.part:<{width}}  {row.total:>15,}  {row.trained:>15,}  {row.percent:>7.2f}%")
    return "\n".join(lines)
