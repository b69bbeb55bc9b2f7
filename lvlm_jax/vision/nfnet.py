"""NFNet, a convolutional tower without normalisation: module, sizes, checkpoint keys, a config.json of our own.

Flamingo's tower is the largest, F6. It is fed as a ViT is, with patches: those of a picture, 32 pixels square as its
stride is, are put together again, and each gives the vector of its place in the last map.
Source: NFNet (arXiv 2102.06171); keys are those of timm's `NormFreeNet`. The authors' own weights are pickles, which
are not read here; timm's ``dm_nfnet`` releases hold the same weights, and `AUTHORS` gives the authors' numbers of them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.keymap import CONV, Change, Row, dense
from lvlm_jax.nn.conv import Standardization, StandardizedConv
from lvlm_jax.nn.linear import linear, named
from lvlm_jax.nn.mlp import ACTIVATIONS
from lvlm_jax.nn.stack import make_stack, run_stack
from lvlm_jax.shapes import Array, DTypeLike, Float, Int

STRIDE = 32
"""Pixels along a side of what becomes one vector."""

GAINS = {"gelu": 1.7015043497085571, "gelu_tanh": 1.7015043497085571, "silu": 1.7881293296813965}
"""What keeps the variance of unit-normal values through an activation (a table of the authors' code)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFNetConfig:
    """Sizes of an NFNet.

    depths, widths: blocks of each of the four stages, and their width. stem_width: before them. final_width: of the
    last convolution. group_width: values that a 3x3 convolution of a block reads at once. alpha: growth of the
    residual stream's spread by each block. `feature_layer` says what a vision-language model reads: -1 the map behind
    the last convolution and its activation, -2 that of the last stage before it.
    """

    image_size: int
    depths: tuple[int, ...]
    widths: tuple[int, ...] = (256, 512, 1536, 1536)
    stem_width: int = 128
    final_width: int = 3072
    group_width: int = 128
    alpha: float = 0.2
    activation: str = "gelu"
    standardization: Standardization = "timm"
    feature_layer: int = -2
    classes: int = 0
    frames: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.image_size % STRIDE:
            raise ValueError(f"image_size={self.image_size} is no multiple of the stride of an NFNet, {STRIDE} pixels")
        if len(self.depths) != 4 or len(self.widths) != 4 or min(self.depths) < 1:
            raise ValueError(f"depths={self.depths} and widths={self.widths}: an NFNet has four stages")
        if wrong := [width for width in self.widths if width % (2 * self.group_width)]:
            raise ValueError(
                f"widths: half of {wrong[0]} does not divide into groups of group_width={self.group_width}"
            )
        if self.stem_width % 8:
            raise ValueError(
                f"stem_width={self.stem_width} is no multiple of 8, which its first convolution divides by"
            )
        if self.activation not in GAINS:
            raise ValueError(f"activation={self.activation!r}: an NFNet has one of {', '.join(GAINS)}")
        if self.feature_layer not in (-1, -2):
            raise ValueError(f"feature_layer={self.feature_layer}: -1 is the last convolution's map, -2 the one before")

    # What a ViT's config tells, the same for every NFNet; of layers `feature_layer` counts one, the last convolution.
    patch_size = STRIDE
    depth = 1
    class_token = class_feature = feature_norm = False
    resize = "none"
    max_patches = None

    @property
    def grid(self) -> int:
        """Places along one side of the last map."""
        return self.image_size // STRIDE

    @property
    def patches(self) -> int:
        """Patches of a vision row (P), one picture."""
        return self.grid**2

    @property
    def values(self) -> int:
        """Values of a patch (C)."""
        return 3 * STRIDE**2

    @property
    def features(self) -> int:
        """Visual tokens that a vision-language model reads from one picture."""
        return self.patches

    @property
    def width(self) -> int:
        """Width of what a vision-language model reads."""
        return self.final_width if self.feature_layer == -1 else self.widths[-1]

    def places(self, path: str) -> int:
        """Positions of a vision row at which the kernel at `path`, below the tower, is multiplied."""
        part, *rest = path.split("/")
        kind, _, number = part.partition("_")
        if kind == "final":
            return self.patches
        if kind == "stem":
            return (self.image_size // (4 if number == "3" else 2)) ** 2
        if kind != "stages" or {"squeeze", "excite"} & set(rest):
            return 1
        stage = int(number)
        # The first block of a stage halves the map behind its first convolution.
        before = stage > 0 and rest[0] == "first" and rest[1] == "conv1"
        return (self.image_size // 2 ** (2 + stage - before)) ** 2

    @property
    def attention_flops(self) -> int:
        """FLOPs of attention's two products over a vision row: none."""
        return 0

    def build(self, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module."""
        return NFNet(self, dtype, scan, remat)


AUTHORS = {"standardization": "deepmind", "activation": "gelu_tanh"}
"""How the authors compute what timm computes a little otherwise, as `NFNetConfig` says it."""


def activate(x: Float[Array, "*B D"], name: str) -> Float[Array, "*B D"]:
    """An activation that keeps the variance of unit-normal values."""
    return ACTIVATIONS[name](x) * GAINS[name]


class Block(nn.Module):
    """Residual block: 1x1, two grouped 3x3 and 1x1 convolutions, squeeze-and-excite, and a gain that starts at zero.

    Attributes:
      side: of the map that comes in.
      moves: the block changes width or size, so that its shortcut is a convolution.
    """

    side: int
    width: int
    group_width: int
    alpha: float
    activation: str
    standardization: Standardization
    stride: int = 1
    moves: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N T C"], beta: Array) -> tuple[Float[Array, "N P D"], None]:
        """beta: one over the spread of `x` that is to be expected."""
        x = x.reshape(len(x), self.side, self.side, -1)
        conv = functools.partial(StandardizedConv, standardization=self.standardization, dtype=self.dtype)
        act = functools.partial(activate, name=self.activation)
        hidden, groups = self.width // 2, self.width // 2 // self.group_width
        out = act(x) * beta.astype(self.dtype)
        shortcut = x
        if self.moves:
            shortcut = nn.avg_pool(out, (2, 2), (2, 2)) if self.stride == 2 else out
            shortcut = conv(self.width, axes=(None, "embed"), name="shortcut")(shortcut)
        out = conv(hidden, name="conv1")(out)
        out = conv(hidden, side=3, stride=self.stride, groups=groups, name="conv2")(act(out))
        out = conv(hidden, side=3, groups=groups, name="conv3")(act(out))
        out = conv(self.width, axes=("mlp", "embed"), name="conv4")(act(out))
        dense = functools.partial(linear, use_bias=True, dtype=self.dtype)
        seen = dense(self.width // 2, ("embed", "mlp"), name="squeeze")(out.mean((1, 2)))
        seen = nn.sigmoid(dense(self.width, ("mlp", "embed"), name="excite")(nn.relu(seen)))
        gain = self.param("skip_gain", named(nn.initializers.zeros, ()), ()).astype(self.dtype)
        out = out * (2 * seen[:, None, None]) * (gain * self.alpha) + shortcut
        return out.reshape(len(out), -1, self.width), None


class Stage(nn.Module):
    """Blocks of one width; the first one moves there, the others are a stack of equal ones."""

    block: functools.partial
    side: int
    depth: int
    stride: int
    spread: float
    alpha: float
    scan: bool
    remat: str

    @nn.compact
    def __call__(self, x: Float[Array, "N T C"]) -> Float[Array, "N P D"]:
        first = self.block(side=self.side, stride=self.stride, moves=True, name="first")
        x = first(x, jnp.asarray(1 / self.spread))[0]
        if self.depth == 1:
            return x
        block = functools.partial(self.block, side=self.side // self.stride)
        stack = make_stack(block, self.depth - 1, self.scan, self.remat, name="layers")
        betas = [(1 + i * self.alpha**2) ** -0.5 for i in range(1, self.depth)]
        return run_stack(stack, self.depth - 1, x, jnp.asarray(betas))[0]


PRESETS: dict[str, NFNetConfig] = {
    # timm/dm_nfnet_fN.dm_in1k, at the size of the pictures they were trained with
    f"nfnet_f{n}": NFNetConfig(image_size=size, depths=(n + 1, 2 * n + 2, 6 * n + 6, 3 * n + 3), classes=1000)
    for n, size in enumerate((192, 224, 256, 320, 384, 416, 448))
}
"""Towers, each as timm builds the release named beside it."""

HUB_NAMES = {f"timm/dm_{name}.dm_in1k": name for name in PRESETS}
"""Hub name of a release -> preset."""


class NFNet(nn.Module):
    """An NFNet over patches, with the methods of `vision.vit.VisionTower`. A vision row is one picture.

    Parameters: ``stem_0`` to ``stem_3``, ``stages_0`` to ``stages_3`` (``first`` and ``layers``), ``final``, and
    ``classifier`` where the config has classes.
    """

    config: NFNetConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """Stem, stages, last convolution, classifier."""
        c = self.config
        conv = functools.partial(StandardizedConv, standardization=c.standardization, dtype=self.dtype)
        self.stem = [
            conv(c.stem_width // share, side=3, stride=stride, axes=(None, "embed"))
            for share, stride in ((8, 2), (4, 1), (2, 1), (1, 2))
        ]
        same = {name: getattr(c, name) for name in ("group_width", "alpha", "activation", "standardization")}
        stages, side, spread = [], c.image_size // 4, 1.0
        for depth, width in zip(c.depths, c.widths):
            block, stride = functools.partial(Block, width=width, **same, dtype=self.dtype), 2 if stages else 1
            stages.append(Stage(block, side, depth, stride, spread, c.alpha, self.scan, self.remat))
            side, spread = side // stride, (1 + depth * c.alpha**2) ** 0.5
        self.stages = stages
        self.final = conv(c.final_width)
        if c.classes:
            self.classifier = linear(c.classes, ("embed", None), use_bias=True, dtype=self.dtype)

    def __call__(
        self, patches: Float[Array, "N P C"], positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]
    ) -> tuple[Float[Array, "N P D"], Float[Array, "N D"]]:
        """(map behind the last activation, its mean over the picture)."""
        x = self._end(self._map(patches, positions, segments))
        pooled = x.mean(1)
        if self.config.classes and self.is_initializing():
            self.classifier(pooled)
        return self._read(x, positions), pooled

    def logits(self, pooled: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """Pooled vectors -> scores of the classes, for a tower that has some."""
        return self.classifier(pooled)

    def features(
        self, patches: Float[Array, "N P C"], positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]
    ) -> Float[Array, "N Q D"]:
        """What a vision-language model reads: the map of `feature_layer`, at each patch's place."""
        if self.is_initializing():
            self(patches, positions, segments)
        x = self._map(patches, positions, segments)
        return self._read(self._end(x) if self.config.feature_layer == -1 else x, positions)

    def _map(self, patches: Array, positions: Array, segments: Array) -> Float[Array, "N P D"]:
        """The last stage's map in reading order, of pictures whose patches may stand in any."""
        grid, n = self.config.grid, len(patches)
        place = jnp.where(segments > 0, positions[..., 0] * grid + positions[..., 1], grid**2)
        blank = jnp.zeros((grid**2, patches.shape[-1]), patches.dtype)
        x = jax.vmap(lambda x, at: blank.at[at].set(x, mode="drop"))(patches, place)
        x = x.reshape(n, grid, grid, STRIDE, STRIDE, 3).swapaxes(2, 3).reshape(n, grid * STRIDE, grid * STRIDE, 3)
        for i, conv in enumerate(self.stem):
            x = conv(activate(x, self.config.activation) if i else x)
        x = x.reshape(n, -1, x.shape[-1])
        for stage in self.stages:
            x = stage(x)
        return x

    def _end(self, x: Float[Array, "N P D"]) -> Float[Array, "N P F"]:
        x = x.reshape(len(x), self.config.grid, self.config.grid, -1)
        x = activate(self.final(x), self.config.activation)
        return x.reshape(len(x), -1, x.shape[-1])

    def _read(self, x: Float[Array, "N S D"], positions: Int[Array, "N P 2"]) -> Float[Array, "N P D"]:
        """The vector of each patch's place."""
        return jnp.take_along_axis(x, (positions[..., 0] * self.config.grid + positions[..., 1])[..., None], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint keys

GAIN = Change(lambda x: x.reshape(-1), lambda x: x.reshape(-1, 1, 1, 1))
POINT = Change(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
"""A dense layer that is a 1x1 convolution there."""

_CONVS = {"conv1": "conv1", "conv2": "conv2", "conv3": "conv2b", "conv4": "conv3"}

LAYOUTS = ("nfnet",)
"""How timm writes a tower alone."""


def rows(config: NFNetConfig, ours: str = "vision", theirs: str = "") -> list[Row]:
    """The key table of the tower, with the classifier where the config has one.

    Args:
      ours: path of the tower's parameters ("" for a tower alone).
      theirs: prefix of its keys.
    """
    base = f"{ours}/" if ours else ""
    out = [*_conv_rows(f"{base}final", f"{theirs}final_conv")]
    for i in range(4):
        out += _conv_rows(f"{base}stem_{i}", f"{theirs}stem.conv{i + 1}")
    for stage, depth in enumerate(config.depths):
        for i in range(depth):
            a, b = f"{base}stages_{stage}/{f'layers/{i - 1}' if i else 'first'}", f"{theirs}stages.{stage}.{i}"
            for x, y in (_CONVS if i else _CONVS | {"shortcut": "downsample.conv"}).items():
                out += _conv_rows(f"{a}/{x}", f"{b}.{y}")
            for x, y in (("squeeze", "fc1"), ("excite", "fc2")):
                out += [Row(f"{a}/{x}/kernel", f"{b}.attn_last.{y}.weight", POINT)]
                out += [Row(f"{a}/{x}/bias", f"{b}.attn_last.{y}.bias")]
            out += [Row(f"{a}/skip_gain", f"{b}.skipinit_gain")]
    return out + (dense(f"{base}classifier", f"{theirs}head.fc", bias=True) if config.classes else [])


def _conv_rows(ours: str, theirs: str) -> list[Row]:
    return [
        Row(f"{ours}/kernel", f"{theirs}.weight", CONV),
        Row(f"{ours}/scale", f"{theirs}.gain", GAIN),
        Row(f"{ours}/bias", f"{theirs}.bias"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# config.json

MODEL_TYPE = "lvlm_jax_nfnet"
"""``model_type`` of what no public class computes: the authors' standardisation. timm's is `vision.timm_nfnet`'s."""


def fits(config: Any) -> bool:
    """Whether this is an NFNet."""
    return isinstance(config, NFNetConfig)


def from_hf(config: Mapping[str, Any]) -> NFNetConfig:
    """The tower of a config that `to_hf` wrote.

    Raises:
      ValueError: a field that is missing, or a value that cannot be run.
    """
    fields = [field.name for field in dataclasses.fields(NFNetConfig)]
    if missing := [name for name in fields if name not in config]:
        raise ValueError(f"config.json: a {MODEL_TYPE} lacks {', '.join(missing)}")
    values = {name: config[name] for name in fields}
    return NFNetConfig(**values | {name: tuple(values[name]) for name in ("depths", "widths")})


def to_hf(config: NFNetConfig) -> dict[str, Any]:
    """A config field by field; `from_hf` reads it back."""
    lists = {"depths": list(config.depths), "widths": list(config.widths)}
    return {"model_type": MODEL_TYPE, **dataclasses.asdict(config), **lists}
