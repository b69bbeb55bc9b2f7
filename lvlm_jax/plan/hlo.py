"""What a compiled program does, read from its text: FLOPs with loops counted as often as they run, and collectives.

XLA's own count (`cost_analysis`) takes the body of a loop once, which for scanned layers is nonsense.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SCATTER = "all-reduce-scatter"
"""How the TPU compiler names a computation that reduces and keeps one part: a reduce-scatter, written as all-reduce."""
BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
"""What marks a transfer to the hosts of other slices, and says what they do with it."""
KERNEL = 'custom_call_target="tpu_custom_call"'
"""What marks a Pallas kernel, whose products the text does not tell."""

_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange: how often a step, and the bytes of the whole array that it gathers or reduces."""

    kind: str
    count: int
    bytes: float
    groups: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel: its name, where in the model it stands, how often a step, and the shapes that it reads."""

    name: str
    path: str
    count: int
    shapes: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in one run of a program.

    flops: of matrix products and convolutions, kernels apart. collectives: inside a slice. between: what goes to other
    slices, through the hosts; bytes of one device.
    """

    flops: float
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    between: tuple[Collective, ...] = ()

    def bytes_of(self, kind: str) -> float:
        """Bytes of all collectives of a kind."""
        return sum(c.bytes for c in self.collectives if c.kind == kind)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    inside: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        return re.findall(r"%([\w.\-]+)", self.inside)


def read(text: str) -> Work:
    """The work of a compiled program's text (`Compiled.as_text()`).

    Raises:
      ValueError: no entry computation, or a loop that does not say how often it runs.
    """
    return _Program(text).work()


class _Program:
    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        here: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                here = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif found := _LINE.match(line):
                here[found[1]] = _instruction(found[1], found[2])
        if not self.entry:
            raise ValueError("this is no text of a compiled program: it has no ENTRY computation")
        self.found: dict[tuple, Collective] = {}
        self.between: list[Collective] = []
        self.kernels: list[Kernel] = []

    def work(self) -> Work:
        flops = self._walk(self.entry, 1, self.entry)
        return Work(flops, _added_up(self.found.values()), tuple(self.kernels), _added_up(self.between))

    def _walk(self, name: str, times: int, level: str) -> float:
        """FLOPs of a computation run so often. level: the loop body around it, by which collectives are told apart."""
        total = 0.0
        for one in self.computations[name].values():
            total += self._own(one, self.computations[name]) * times
            self._note(one, self.computations[name], times, level, name)
            if one.op == "while":
                count, body = self._trips(one, self.computations[name]), _called(one, "body")[0]
                total += self._walk(body, times * count, body)
            elif one.op == "conditional":
                branches = _called(one, "branch_computations") or [
                    *_called(one, "true_computation"),
                    *_called(one, "false_computation"),
                ]
                total += max(self._walk(branch, times, level) for branch in branches)
            elif one.op in ("fusion", "call", "async-start", "custom-call"):
                for called in (*_called(one, "calls"), *_called(one, "to_apply"), *_called(one, "called_computations")):
                    total += self._walk(called, times, level)
        return total

    def _trips(self, one: _Instruction, around: dict[str, _Instruction]) -> int:
        """How often a loop runs: as it says itself, or by where its counter starts, its step and its bound.

        A compiler may run several turns as one, and the first one before the loop.
        """
        if found := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', one.rest):
            return int(found[1])
        condition, body = (self.computations[_called(one, which)[0]] for which in ("condition", "body"))
        for test in condition.values():
            if test.op != "compare" or "direction=LT" not in test.rest:
                continue
            counter, bound = (condition[name] for name in test.operands)
            index = re.search(r"index=(\d+)", counter.rest)
            first = around[one.operands[0]]
            if index is None or first.op != "tuple":
                continue
            start = _constant(around, first.operands[int(index[1])])
            new = body[next(reversed(body.values())).operands[int(index[1])]]
            steps = [_constant(body, name) for name in new.operands] if new.op == "add" else []
            step, stop = next((x for x in steps if x), None), _constant(condition, bound.name)
            if None not in (start, step, stop):
                return -(-(stop - start) // step)
        raise ValueError(f"the loop {one.name} does not say how often it runs, so the FLOPs cannot be counted")

    def _own(self, one: _Instruction, around: dict[str, _Instruction]) -> float:
        if one.op == "dot":
            contracted = _numbers(one.rest, "lhs_contracting_dims")
            return 2.0 * _elements(one.type) * _product(_shape(around[one.operands[0]].type), contracted)
        if one.op == "custom-call" and 'custom_call_target="__cublas$' in one.rest:
            # Of a GPU's library the products stand in JSON, and the result may come in a tuple with scratch space.
            contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.rest)
            dims = [int(x) for x in re.findall(r"\d+", contracted[1])]
            return 2.0 * _elements(one.type) * _product(_shape(around[one.operands[0]].type), dims)
        if one.op == "convolution":
            return _convolution(one, *(_shape(around[x].type) for x in one.operands))
        return 0.0

    def _note(self, one: _Instruction, around: dict[str, _Instruction], times: int, level: str, name: str) -> None:
        if one.op == "send" and (found := BETWEEN.search(one.rest)):
            sent = _bytes(around[one.operands[0]].type) * times
            self.between.append(Collective(found[1].lower().replace("_", "-"), times, sent))
        kind = one.op.removesuffix("-start")
        if one.op == "custom-call" and KERNEL in one.rest:
            path = re.search(r'op_name="([^"]*)"', one.rest)
            shapes = tuple(_shape(around[x].type) for x in one.operands if x in around)
            self.kernels.append(Kernel(one.name.split(".")[0], path[1] if path else "", times, shapes))
        if kind not in COLLECTIVES:
            return
        took = sum(_bytes(around[x].type) for x in one.operands if x in around)
        gave = _bytes(one.type) - (took if one.op.endswith("-start") and one.type.startswith("(") else 0)
        channel = re.search(r"channel_id=(\d+)", one.rest)
        key = (kind, level, channel[1] if channel else one.name)
        size = max(took, gave) * times
        kind = "reduce-scatter" if name.startswith(SCATTER) else kind
        # A collective that overlaps with work stands there several times: as start, update and done of one channel.
        if key not in self.found or self.found[key].bytes < size:
            self.found[key] = Collective(kind, times, size, _groups(one.rest))


def _added_up(found: Iterable[Collective]) -> tuple[Collective, ...]:
    """One a kind and set of groups, the largest first."""
    totals: dict[tuple, Collective] = {}
    for one in found:
        key = one.kind, one.groups
        had = totals.get(key, dataclasses.replace(one, count=0, bytes=0.0))
        totals[key] = dataclasses.replace(one, count=had.count + one.count, bytes=had.bytes + one.bytes)
    return tuple(sorted(totals.values(), key=lambda c: (c.kind, -c.bytes)))


def _instruction(name: str, text: str) -> _Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    op, _, rest = rest.partition("(")
    close = _closing("(" + rest) - 1
    return _Instruction(name, kind, op.strip(), rest[: close - 1], rest[close:])


def _constant(around: dict[str, _Instruction], name: str) -> int | None:
    """The value of a whole number that is written down, behind copies too; None of any other."""
    one = around[name]
    if one.op in ("copy", "bitcast", "convert"):
        return _constant(around, one.operands[0])
    return int(one.inside) if one.op == "constant" and one.inside.isdigit() else None


def _closing(text: str) -> int:
    """One past the bracket that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return i + 1
    return len(text)


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    text = re.sub(r"/\*.*?\*/|\{[^{}]*\}", "", text)
    dims = lambda sides: tuple(int(re.sub(r"\D", "", side)) for side in sides.split(",") if side)  # noqa: E731
    return [(kind, dims(sides)) for kind, sides in _ARRAY.findall(text)]


def _shape(text: str) -> tuple[int, ...]:
    return _arrays(text)[0][1]


def _elements(text: str) -> int:
    return math.prod(_shape(text))


def _bytes(text: str) -> float:
    width = lambda kind: BYTES.get(kind) or int(re.search(r"\d+", kind)[0]) / 8  # noqa: E731
    return float(sum(width(kind) * math.prod(shape) for kind, shape in _arrays(text) if kind != "token"))


def _product(shape: Sequence[int], dims: Sequence[int]) -> int:
    return math.prod(shape[i] for i in dims)


def _numbers(text: str, name: str) -> list[int]:
    found = re.search(rf"{name}=\{{([\d,]*)\}}", text)
    return [int(x) for x in found[1].split(",") if x] if found else []


def _called(one: _Instruction, name: str) -> list[str]:
    found = re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)", one.rest)
    return re.findall(r"[\w.\-]+", found[1].replace("%", "")) if found else []


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Which devices exchange with which, by their number in the mesh; three ways of writing it."""
    if found := re.search(r"replica_groups=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", text):
        return tuple(tuple(int(x) for x in group.split(",") if x) for group in re.findall(r"\{([\d,]*)\}", found[1]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sides = lambda numbers: [int(x) for x in numbers.split(",")]  # noqa: E731
        order = np.arange(math.prod(sides(found[2]))).reshape(sides(found[2]))
        order = order.transpose(sides(found[3])) if found[3] else order
        return tuple(map(tuple, order.reshape(sides(found[1])[0], -1).tolist()))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        inside = [list(axes).index(name) for name in re.findall(r"'([^']+)'", found[2])]
        outside = [i for i in range(len(axes)) if i not in inside]
        order = np.arange(math.prod(axes.values())).reshape(*axes.values()).transpose(outside + inside)
        return tuple(map(tuple, order.reshape(-1, math.prod(order.shape[len(outside) :])).tolist()))
    return ()


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions, which is how the TPU compiler writes matrix products


def _convolution(one: _Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """FLOPs by the definition: only places where the window meets the picture itself count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    lhs, rhs, out = labels[1], labels[2], labels[3]
    result = _shape(one.type)
    inner = right[rhs.index("i")]
    rest = result[out.index("b")] * result[out.index("f")]
    batches = re.search(r"batch_group_count=(\d+)", one.rest)
    rest /= int(batches[1]) if batches else 1
    met = 1
    for digit in (x for x in out if x.isdigit()):
        met *= _met(
            left[lhs.index(digit)],
            right[rhs.index(digit)],
            result[out.index(digit)],
            *_window(one.rest, int(digit)),
        )
    return 2.0 * rest * inner * met


def _window(text: str, axis: int) -> tuple[int, int, int, int]:
    """(stride, low padding, dilation of the left side, of the right side) of one axis of a window."""
    found = re.search(r"window=\{([^}]*)\}", text)
    values = dict(re.findall(r"(\w+)=([\dx_\-]+)", found[1])) if found else {}
    take = lambda name, other: values[name].split("x")[axis] if name in values else other  # noqa: E731
    return (
        int(take("stride", 1)),
        int(take("pad", "0_0").split("_")[0]),
        int(take("lhs_dilate", 1)),
        int(take("rhs_dilate", 1)),
    )


@functools.cache
def _met(size: int, window: int, places: int, stride: int, pad: int, spread: int, gap: int) -> int:
    """How many pairs of (place of the result, place of the window) meet an element of the left side."""
    wide = (size - 1) * spread + 1
    inside = lambda at: 0 <= at < wide and at % spread == 0  # noqa: E731
    return sum(inside(place * stride + at * gap - pad) for place in range(places) for at in range(window))
