"""Adapters in the format of the peft package, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``.

A file holds, under the torch library's own module names, ``lora_A`` [rank, in] and ``lora_B`` [out, rank] of each
adapted layer, and the weights of modules that were trained whole (``modules_to_save``). Names of all layouts of the
base are understood: adapters trained under versions 4 and 5 of the library, or by the LLaVA authors' code, read alike.
"""

import collections
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import params as P
from lvlm_jax import zoo
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub import configs
from lvlm_jax.hub.families import KINDS, Config
from lvlm_jax.hub.safetensors_io import Overlay, TensorFolder, new_folder, write_file
from lvlm_jax.keymap import TRANSPOSE, Row
from lvlm_jax.nn import lora
from lvlm_jax.shapes import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALSO = ("non_lora_trainables.safetensors", "mm_projector.safetensors")
"""Files of the LLaVA authors' code with modules that were trained whole, once they are no pickles."""
PICKLES = ("adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin")
PREFIX = "base_model.model."

PLAIN: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}
"""Fields of adapter_config.json with another value than this (or nothing) change the maths in a way not read here."""
MOVES_BASE = ("pissa", "olora", "corda", "loftq")
"""Values of init_lora_weights under which training began from another base than the file names."""

# ---------------------------------------------------------------------------------------------------------------------
# Out


def save(
    folder: str | Path, config: Config, params: Params, *, base: str = "", layout: str = "", overwrite: bool = False
) -> Path:
    """Writes adapters that ``peft.PeftModel.from_pretrained(model, folder)`` loads.

    Args:
      config: of the whole model.
      params: adapters (stacked or apart), and leaves that were trained whole; both go out, nothing else.
      base: hub name or folder of the model that the adapters are for.
      layout: of the module names; default those of the torch library's version 5 in memory.

    Raises:
      ValueError: no adapter, one beside what is no dense layer of the torch library, or a module of which only a part
        was trained.
      FileExistsError: the folder is there and `overwrite` is False.
    """
    kind = KINDS[configs.kind_of(config)]
    known = _layouts(config)
    layout = layout or ("hf-5-memory" if "hf-5-memory" in known else known[0])
    rows = kind.rows(config, layout)
    whole, low = map(P.flatten, lora.split(P.unstack_layers(params)))
    modules = {kernel: module for module, kernel in _dense(rows).items()}
    kernels = [path.removesuffix(lora.A) + "kernel" for path in low if path.endswith(lora.A)]
    if not kernels:
        raise ValueError("there is no adapter in these parameters; was the stage trained with stage.lora?")
    if absent := [path for path in kernels if path not in modules]:
        raise ValueError(f"{absent[:5]}: no dense layer of the torch library's model, so peft cannot hold its adapter")
    tensors, ranks, alphas = {}, {}, {}
    for path in kernels:
        a, b, scale = (np.asarray(low[lora.beside(path, name)]) for name in lora.NAMES)
        module = modules[path]
        ranks[module], alphas[module] = a.shape[1], _number(scale * a.shape[1])
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a.T, b.T
    saved = _whole_modules(rows, whole)
    tensors |= {f"{PREFIX}{key}": value for key, value in saved.items()}
    content = _config(ranks, alphas, sorted({key.rpartition(".")[0] for key in saved}), base)
    with new_folder(folder, overwrite) as partial:
        (partial / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_file(partial / WEIGHTS, tensors)
    return Path(folder)


def _number(value: Any) -> int | float:
    """alpha as it was given: a whole number wherever rounding hides one."""
    value = float(value)
    return round(value) if abs(value - round(value)) < 1e-5 * abs(value) else value


def _config(ranks: dict, alphas: dict, saved: list[str], base: str) -> dict[str, Any]:
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "modules_to_save": saved or None,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        **PLAIN,
    }


def _layouts(config: Config) -> list[str]:
    """The layouts of a model that are module names of the torch library, or of the LLaVA authors' code."""
    kind = configs.kind_of(config)
    names = zoo.family_of(config).LAYOUTS if kind == "lvlm" else KINDS[kind].layouts
    return [name for name in names if not name.startswith("big_vision")]


def _dense(rows: Iterable[Row]) -> dict[str, str]:
    """Module name -> path of our kernel, of every plain dense layer."""
    dense = (row for row in rows if row.change is TRANSPOSE and row.theirs.endswith(".weight"))
    return {row.theirs.removesuffix(".weight"): row.leaves[0] for row in dense}


def _whole_modules(rows: Iterable[Row], leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their tensors of modules trained whole; every leaf of each must be there."""
    modules, used = collections.defaultdict(list), set()
    for row in rows:
        modules[row.theirs.rpartition(".")[0]].append(row)
    out = {}
    for module, members in modules.items():
        paths = {path for row in members for path in row.leaves}
        if not paths & leaves.keys():
            continue
        bare = [row.theirs for row in members if row.theirs.rpartition(".")[2] not in ("weight", "bias")]
        if bare or (lacking := sorted(paths - leaves.keys())):
            raise ValueError(
                f"peft keeps modules, trained whole, beside adapters; of {module!r} "
                + (f"{bare[0]!r} is a parameter of its own" if bare else f"{lacking[:3]} were not trained")
                + ". Export the merged model instead"
            )
        out |= {row.theirs: np.asarray(row.save({p: np.asarray(leaves[p]) for p in row.leaves})) for row in members}
        used |= paths
    if left := sorted(set(leaves) - used):
        raise ValueError(f"{left[:5]} have no name in the torch library's model; export the merged model instead")
    return out


# ---------------------------------------------------------------------------------------------------------------------
# In


def on_base(folder: Path, base: Path) -> Overlay:
    """The LLaVA authors' projector, or what they trained whole beside adapters, on top of their language model.

    Their names are those of the language model alone, so the two folders are one LLaVA; `apply` adds the adapters.

    Raises:
      CheckpointError: a pickle, or nothing of a model in the folder.
    """
    names = [name for name in _files(folder) if name in ALSO]
    if not names:
        raise CheckpointError(
            f"{folder}: neither {' nor '.join(ALSO)} is in it, so what lies on top of the base is not known; an "
            "adapter for a whole LLaVA goes by adapter= (--adapter)"
        )
    return Overlay([*(TensorFolder(folder, only=name) for name in names), TensorFolder(base)], _plain_key)


def apply(params: Params, config: Config, folder: str | Path) -> Params:
    """A base model with an adapter merged in, and with the modules that were trained whole in place of its own.

    Also takes a folder that holds nothing but such modules: the LLaVA authors' ``mm_projector.safetensors``.

    Args:
      params: of the base, layers stacked or apart, sharded or not.
      config: of the base.

    Raises:
      CheckpointError: no adapter there, a pickle, one of another kind than LoRA, or one for another base.
    """
    low, whole = load(folder, config)
    flat = P.flatten(params)
    for path, leaf in whole.items():
        place, index = (path, None) if path in flat else P.stack_path(path)
        old = flat[place]
        new = jnp.asarray(leaf, old.dtype) if index is None else jnp.asarray(old).at[index].set(leaf.astype(old.dtype))
        flat[place] = jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new
    return lora.merge(P.unflatten(flat), low)


def load(folder: str | Path, config: Config) -> tuple[Params, dict[str, np.ndarray]]:
    """(adapters beside the kernels of a model, layers apart; leaves trained whole by path), as `apply` takes them."""
    folder = Path(folder)
    tensors: dict[str, np.ndarray] = {}
    for file in _files(folder):
        tensors |= {_plain_key(key): tensor for key, tensor in TensorFolder(folder, only=file).items()}
    low_keys: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
        if match:
            low_keys.setdefault(match[1], {})[match[2]] = key
        elif "lora_" in key:
            raise CheckpointError(
                f"{folder}: {key!r} is a part of an adapter that is not read here; LoRA's are A and B"
            )
    whole_keys = [key for key in tensors if "lora_" not in key]
    settings = _settings(folder) if low_keys else {}
    rows = _layout(folder, config, low_keys, whole_keys, settings)
    dense, by_key = _dense(rows), {row.theirs: row for row in rows}
    shapes = P.flatten(KINDS[configs.kind_of(config)].shapes(config, False)[0])
    low: dict[str, Any] = {}
    for module, keys in low_keys.items():
        if set(keys) != {"A", "B"}:
            raise CheckpointError(f"{folder}: of {module!r} only lora_{min(keys)} is there; fetch the adapter again")
        a, b = tensors[keys["A"]].T, tensors[keys["B"]].T
        path = dense[module]
        _fits(folder, settings, module, (a.shape[0], b.shape[1]), shapes[path].shape)
        low[lora.beside(path, lora.A)], low[lora.beside(path, lora.B)] = a, b
        low[lora.beside(path, lora.SCALE)] = np.float32(_scale(settings, module, a.shape[1]))
    whole: dict[str, np.ndarray] = {}
    for key in whole_keys:
        leaves = by_key[key].load(tensors[key])
        for path, leaf in leaves.items():
            _fits(folder, settings, key, leaf.shape, shapes[path].shape)
        whole |= leaves
    return P.unflatten(low), whole


def _plain_key(key: str) -> str:
    """A key without what peft puts around the torch library's."""
    return re.sub(r"\.(modules_to_save\.)?default\.|\.modules_to_save\.", ".", key.removeprefix(PREFIX))


def _files(folder: Path) -> list[str]:
    """The files to read; pickles are refused by name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    files = [name for name in (WEIGHTS, *ALSO) if (folder / name).is_file()]
    for name in PICKLES:
        safe = f"{Path(name).stem}.safetensors"
        if (folder / name).is_file() and safe not in files:
            raise CheckpointError(
                f"{folder / name}: a pickle, which runs code when it is read, so it is refused. Convert it where you "
                f"trust it: safetensors.torch.save_file(torch.load('{name}', weights_only=True), '{safe}')"
            )
    if not files:
        raise CheckpointError(f"{folder}: no adapter: neither {WEIGHTS} nor {' nor '.join(ALSO)} is in it")
    return files


def _settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json, if it is of a plain LoRA."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: {CONFIG} is not beside the weights; it says how strong they are")
    content = configs.read_json(folder / CONFIG)
    if content.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / CONFIG}: peft_type is {content.get('peft_type')!r}; only 'LORA' is read here")
    for field, plain in PLAIN.items():
        if content.get(field, plain) not in (plain, None, [], {}):
            raise CheckpointError(f"{folder / CONFIG}: {field}={content[field]!r} is not read here, only {plain!r}")
    start = str(content.get("init_lora_weights", ""))
    if start.startswith(MOVES_BASE):
        raise CheckpointError(
            f"{folder / CONFIG}: init_lora_weights={start!r} trains over a changed base; save the adapter with peft's "
            "path_initial_model_for_weight_conversion= and give that"
        )
    return content


def _layout(folder: Path, config: Config, low: Mapping, whole: list[str], settings: Mapping) -> list[Row]:
    """The key table in the layout whose names the file uses."""
    kind, best, rest = KINDS[configs.kind_of(config)], None, None
    for layout in _layouts(config):
        try:
            rows = kind.rows(config, layout)
        except ValueError:  # this way of writing has no place for a part of the model, so the adapter is not in it
            continue
        dense, keys = _dense(rows), {row.theirs for row in rows}
        left = [module for module in low if module not in dense] + [key for key in whole if key not in keys]
        if rest is None or len(left) < len(rest):
            best, rest = rows, left
    if rest:
        raise CheckpointError(
            f"{folder}: {len(rest)} of {len(low) + len(whole)} modules are none of this model's dense layers: "
            f"{', '.join(rest[:4])}. {_for_another(settings)}"
        )
    return best


def _for_another(settings: Mapping) -> str:
    base = settings.get("base_model_name_or_path")
    return f"This adapter is for another base{f': {CONFIG} names {base!r}' if base else ''}"


def _fits(folder: Path, settings: Mapping, name: str, found: tuple, wanted: tuple) -> None:
    if tuple(found) != tuple(wanted):
        raise CheckpointError(
            f"{folder}: {name!r} is for a weight of shape {list(found)}, this model's is {list(wanted)}. "
            f"{_for_another(settings)}"
        )


def _scale(settings: Mapping, module: str, rank: int) -> float:
    """What multiplies an adapter, by peft's rules: a pattern that ends a module's name overrides lora_alpha."""
    patterns = settings.get("alpha_pattern") or {}
    hits = (value for name, value in patterns.items() if re.match(rf"(.*\.)?({name})$", module))
    return lora.scale_of(rank, float(next(hits, settings["lora_alpha"])), bool(settings.get("use_rslora")))
