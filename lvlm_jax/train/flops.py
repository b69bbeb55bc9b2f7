"""Model FLOPs of a training step, defined once: what MFU divides by the chips' peak.

A matrix product costs 2 FLOPs a weight and token forward, 2 for the gradient of its inputs and 2 for that of its
weights: 6 where it is trained, 4 where it is frozen in or behind a part with a trained leaf (the kernels under
adapters), 2 in a part before every trained one. Attention adds its two products over the keys that a query may see,
once, twice or three times its forward cost.
Recomputation (remat) does not count.
"""

from collections.abc import Mapping

from lvlm_jax import params as trees
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.llm.encoder_decoder import EncoderDecoderConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.models.senses import FeatureSlot, Sense
from lvlm_jax.nn import lora
from lvlm_jax.shapes import Params

ORDER = ("vision", "connector", "fusion", "llm")
"""The way of the gradient, backwards."""

SENSES = "senses/"
"""What the paths of named senses begin with: beside the pictures' way, and before the language model too."""

_BEHIND = ("vision/post_norm/", "vision/globals/")
"""What reads a tower's trunk and sends nothing back to it when the trunk is frozen."""


def factors(trained: Mapping[str, bool]) -> dict[str, int]:
    """FLOPs a weight and token of each part, 6, 4 or 2; `trained` says which parts have a trained leaf.

    A named sense begins a way of its own, which meets the pictures' before the language model.
    """
    senses = {part: 6 if hit else 2 for part, hit in trained.items() if part.startswith(SENSES)}
    out, upstream = {}, False
    for part in filter(trained.__contains__, ORDER):
        before = upstream or (part in ("fusion", "llm") and 6 in senses.values())
        out[part] = 6 if trained[part] else 4 if before else 2
        upstream = upstream or trained[part]
    return out | senses


def step_flops(
    config: LVLMConfig,
    shapes: Params,
    mask: Mapping,
    *,
    rows: int,
    length: int,
    pictures: int,
    senses: Mapping[str, int] | None = None,
) -> float:
    """Model FLOPs of one step of `rows` text rows of `length` positions and `pictures` pictures, all full.

    Args:
      shapes: parameter shapes of the whole model (any layout), adapters among them.
      mask: boolean tree of the same structure, True where a leaf is trained.
      senses: vision rows of each named sense.
    """
    flat, chosen = trees.flatten(shapes), trees.flatten(mask)
    names = (*ORDER, *(f"{SENSES}{name}" for name, _ in config.senses))
    factor = factors({part: any(hit for p, hit in chosen.items() if p.startswith(f"{part}/")) for part in names})
    # The gradient enters a tower where something inside trains: not for its last norm, nor for blocks that read it.
    inner = any(hit for p, hit in chosen.items() if p.startswith("vision/") and not p.startswith(_BEHIND))
    tower = factor["vision"] if inner else 2
    # A table is looked up, not multiplied; a tied one is multiplied once, as the head.
    products = {path: leaf for path, leaf in flat.items() if path.endswith(("/kernel", lora.A, lora.B))}
    if config.llm.tied:
        products["llm/embed/table"] = flat["llm/embed/table"]
    vision, llm = config.vision, config.llm
    visual, text = pictures * config.row_tokens, rows * length
    tokens = {"connector": visual, "fusion": text, "llm": text}
    total = 0.0
    for path, leaf in products.items():
        part, _, rest = path.partition("/")
        if part not in ORDER:
            continue
        # A visual expert's weights see the pictures' positions alone, as the keys and values of gated blocks do.
        theirs = "/expert_" in path or (part == "fusion" and ("/attn/k/" in path or "/attn/v/" in path))
        uses = pictures * vision.places(rest) if part == "vision" else visual if theirs else tokens[part]
        uses = length if "/relative/" in path else uses  # distances are the same in all rows
        through = tower if part == "vision" else factor[part]
        total += uses * trees.size(leaf) * (6 if chosen[path] else min(4, through))
    if (fusion := config.fusion) is not None:
        blocks = len(fusion.spots(llm.depth))  # a position sees one picture's tokens, or more where it sees all
        total += factor["fusion"] / 2 * blocks * 4 * text * config.row_tokens * fusion.heads * fusion.head_dim
    total += tower / 2 * pictures * vision.attention_flops
    for name, sense in config.senses:
        own = {path: (leaf, chosen[path]) for path, leaf in products.items() if path.startswith(f"{SENSES}{name}/")}
        total += _sense_flops(sense, own, f"{SENSES}{name}/") * (senses or {}).get(name, 0)
    seen = _seen_by_all(llm, length, config.attention)
    return total + factor["llm"] / 2 * _attention(llm, text, seen)


def decoder_flops(llm: DecoderConfig, shapes: Params, mask: Mapping, *, rows: int, length: int) -> float:
    """The same of a decoder alone, trained or not at all: what stands before it is counted by nobody.

    Args:
      shapes, mask: of the decoder's own tree.
    """
    flat, chosen = trees.flatten(shapes), trees.flatten(mask)
    products = [leaf for path, leaf in flat.items() if path.endswith("/kernel")]
    products += [flat["embed/table"]] if llm.tied else []
    factor, text = 6 if any(chosen.values()) else 2, rows * length
    return factor * (text * trees.size(products) + _attention(llm, text, _seen_by_all(llm, length, "causal")) / 2)


def _attention(llm: DecoderConfig | EncoderDecoderConfig, tokens: int, seen: float) -> float:
    """FLOPs of both products of attention, forward alone; `seen`: keys of a position, in all layers together."""
    return 4 * tokens * seen * llm.heads * llm.head_width


def _sense_flops(sense: Sense, products: Mapping[str, tuple], at: str) -> float:
    """Of one row of a named sense; `products` are its kernels, and whether each is trained."""
    encoder, total = sense.encoder, 0.0
    sees = any(hit for path, (_, hit) in products.items() if path.startswith(f"{at}vision/"))
    if not isinstance(encoder, FeatureSlot):
        total += (3 if sees else 1) * encoder.attention_flops
    for path, (leaf, hit) in products.items():
        part, _, rest = path.removeprefix(at).partition("/")
        uses = encoder.places(rest) if part == "vision" else sense.tokens
        total += uses * trees.size(leaf) * (6 if hit else 4 if sees else 2)
    return total


def _seen_by_all(llm: DecoderConfig | EncoderDecoderConfig, length: int, pattern: str) -> float:
    """Keys that a position of a full row sees on average, in all layers together.

    Of two stacks both run over every position of a row; the second sees what is before it, and all of the first.
    """
    if isinstance(llm, EncoderDecoderConfig):
        return llm.depth * length + llm.decoder_depth * (length / 2 + length)
    return sum(_seen(length, llm.window if kind == "local" else None, pattern) for kind in llm.layer_kinds)


def _seen(length: int, window: int | None, attention: str) -> float:
    """Keys that a position of a full row sees, on average."""
    if window is None or window >= length:
        return length / 2 if attention == "causal" else length
    return window * (1 - window / (2 * length))  # the first positions of a row have fewer before them
