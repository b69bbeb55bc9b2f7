"""Checkpoint keys, both ways: one row table a family, read by import, export and the round-trip test alike."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Change(NamedTuple):
    """How a tensor differs between the two sides: `load(theirs) -> ours` and `save(ours) -> theirs`.

    For a row with several leaves of ours, `load` returns them as a tuple and `save` takes them.
    """

    load: Callable[..., Any]
    save: Callable[..., Any]


SAME = Change(lambda x: x, lambda x: x)
TRANSPOSE = Change(lambda x: x.T, lambda x: x.T)
"""A dense kernel: torch keeps [out, in], we keep [in, out]."""

CONV = Change(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
"""A convolution's kernel: torch keeps [out, in, height, width], we keep [height, width, in, out]."""

SCALAR = Change(lambda x: x.reshape(()), lambda x: x.reshape(1))
"""A single number that torch keeps with one axis."""


UNBATCHED = Change(lambda x: x.reshape(x.shape[1:]), lambda x: x.reshape(1, *x.shape))
"""A table or token that they keep with a batch axis of one in front."""


def patches(size: int) -> Change:
    """A patch embedding: torch's convolution [D, 3, size, size], ours a kernel [size*size*3, D]."""
    return Change(
        lambda x: x.transpose(2, 3, 1, 0).reshape(size * size * 3, -1),
        lambda x: x.reshape(size, size, 3, -1).transpose(3, 2, 0, 1),
    )


def clips(frames: int, size: int) -> Change:
    """A patch embedding over frames: torch's convolution [D, 3, frames, size, size], ours a dense kernel.

    The kernel's rows are a patch's values in (frame, row, column, channel) order.
    """
    return Change(
        lambda x: x.transpose(2, 3, 4, 1, 0).reshape(frames * size * size * 3, -1),
        lambda x: x.reshape(frames, size, size, 3, -1).transpose(4, 3, 0, 1, 2),
    )


def flax_patches(size: int) -> Change:
    """A patch embedding: a flax convolution [size, size, 3, D], ours a kernel [size*size*3, D]."""
    return Change(lambda x: x.reshape(size * size * 3, -1), lambda x: x.reshape(size, size, 3, -1))


def joined(parts: int | Sequence[int], inner: Change = SAME) -> Change:
    """Leaves of ours that stand in one tensor of theirs, one after the other along its first axis (fused q, k, v).

    parts: how many equal ones, or how long each is.
    """
    cuts = parts if isinstance(parts, int) else np.cumsum(parts)[:-1]
    return Change(
        lambda x: tuple(inner.load(part) for part in np.split(x, cuts)),
        lambda *parts: np.concatenate([inner.save(part) for part in parts]),
    )


def by_head(heads: int, inner: Change = SAME) -> Change:
    """Queries, keys and values in one tensor of theirs in which those of a head stand together, along its first axis.

    inner: what each of the three, the heads one after the other, becomes.
    """

    def load(x: Any) -> tuple[Any, Any, Any]:
        apart = x.reshape(heads, 3, -1, *x.shape[1:]).swapaxes(0, 1)
        q, k, v = (inner.load(part.reshape(-1, *x.shape[1:])) for part in apart)
        return q, k, v

    def save(*parts: Any) -> Any:
        rows = [inner.save(part) for part in parts]
        apart = [x.reshape(heads, 1, -1, *x.shape[1:]) for x in rows]
        return np.concatenate(apart, axis=1).reshape(-1, *rows[0].shape[1:])

    return Change(load, save)


def stacked(inner: Change = SAME, parts: int = 1) -> Change:
    """Leaves of ours, layer by layer, that stand in one tensor of theirs along its first axis.

    parts: how many leaves of one layer `inner` takes.
    """

    def load(tensor: Any) -> tuple[Any, ...]:
        return tuple(leaf for layer in map(inner.load, tensor) for leaf in (layer if parts > 1 else (layer,)))

    def save(*leaves: Any) -> Any:
        return np.stack([inner.save(*leaves[i : i + parts]) for i in range(0, len(leaves), parts)])

    return Change(load, save)


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of theirs and the leaf (or leaves) of ours that hold it."""

    ours: str | tuple[str, ...]
    theirs: str
    change: Change = SAME

    @property
    def leaves(self) -> tuple[str, ...]:
        """Our paths, always as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def load(self, tensor: Any) -> dict[str, Any]:
        """Their tensor -> our leaves by path."""
        got = self.change.load(tensor)
        return dict(zip(self.leaves, (got,) if isinstance(self.ours, str) else got, strict=True))

    def save(self, leaves: Mapping[str, Any]) -> Any:
        """Our leaves by path -> their tensor."""
        return self.change.save(*(leaves[path] for path in self.leaves))


def dense(ours: str, theirs: str, bias: bool = False) -> list[Row]:
    """The rows of one dense layer."""
    rows = [Row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE)]
    return rows + ([Row(f"{ours}/bias", f"{theirs}.bias")] if bias else [])


def layer_norm(ours: str, theirs: str) -> list[Row]:
    """The rows of one layer norm."""
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def check(rows: Sequence[Row], ours: Iterable[str], theirs: Iterable[str], source: str) -> None:
    """No key left over on either side.

    Args:
      rows: the table.
      ours: every path of the model.
      theirs: every key of the checkpoint, less those that are known to be unused.
      source: where the checkpoint is, for the message.

    Raises:
      ValueError: lists what the model needs and the checkpoint lacks, and what the checkpoint has and nobody reads.
    """
    ours, theirs = set(ours), set(theirs)
    needed = {row.theirs for row in rows}
    missing, unused = sorted(needed - theirs), sorted(theirs - needed)
    covered = {path for row in rows for path in row.leaves}
    if gaps := sorted(ours ^ covered):
        raise ValueError(f"the key table and the model disagree at {_some(gaps)}: the table of this family is wrong")
    if missing or unused:
        raise ValueError(
            f"{source}: this checkpoint does not fit the model.\n"
            f"  missing ({len(missing)}): {_some(missing)}\n  not used ({len(unused)}): {_some(unused)}\n"
            "Is it another size, family or layout than its config.json says, or are files of it absent?"
        )


def _some(names: list[str], most: int = 12) -> str:
    more = f" ... and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


# ---------------------------------------------------------------------------------------------------------------------
# Public config.json files, field by field

ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Public name of an activation -> ours."""

PUBLIC_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"} | {
    name: name for name in ("quick_gelu", "gelu", "relu", "silu")
}
"""Our name of an activation -> the public one."""


def fields(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A public config with what it leaves out: nested configs are written as differences from the class defaults."""
    return {**defaults, **{name: value for name, value in config.items() if value is not None}}


def one_of(field: str, value: Any, choices: Iterable[Any]) -> Any:
    """The value of a config field, if it is one we can run.

    Raises:
      ValueError: names the field, its value and what is supported.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"config.json: {field} is {value!r}, which is not supported; supported: {_words(choices)}")
    return value


def activation(field: str, value: str) -> str:
    """Our name of a public activation; an unknown one is an error."""
    return ACTIVATIONS[one_of(field, value, ACTIVATIONS)]


def square(field: str, value: Any) -> int:
    """One side length of a field that may also be written as [side, side]."""
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"config.json: {field} is {value!r}, which is not supported; supported: one side of a square")
    return int(sides.pop())


def _words(choices: Sequence[Any]) -> str:
    return ", ".join(repr(choice) for choice in choices)
