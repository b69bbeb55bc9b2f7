"""big_vision's flat files, made from the torch library's SigLIP by the equalities of its conversion."""

import ml_dtypes
import numpy as np

from lvlm_jax.hub.safetensors_io import TensorFolder


def _dense(tensors, key):
    return {"kernel": tensors[f"{key}.weight"].T, "bias": tensors[f"{key}.bias"]}


def _norm(tensors, key):
    return {"scale": tensors[f"{key}.weight"], "bias": tensors[f"{key}.bias"]}


def _attention(parts, heads):
    """parts: name -> (weight [out, in], bias) in the torch library's order of axes."""
    out = {}
    for name, (weight, bias) in parts.items():
        if name == "out":
            out[name] = {"kernel": weight.T.reshape(heads, -1, len(weight)), "bias": bias}
        else:
            out[name] = {"kernel": weight.T.reshape(-1, heads, len(weight) // heads), "bias": bias.reshape(heads, -1)}
    return out


def _layers(tensors, prefix, heads):
    out, i = [], 0
    while f"{prefix}encoder.layers.{i}.layer_norm1.weight" in tensors:
        at = f"{prefix}encoder.layers.{i}"
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
        parts = {
            ours: (tensors[f"{at}.self_attn.{name}.weight"], tensors[f"{at}.self_attn.{name}.bias"])
            for ours, name in names.items()
        }
        out.append(
            {
                "LayerNorm_0": _norm(tensors, f"{at}.layer_norm1"),
                "MultiHeadDotProductAttention_0": _attention(parts, heads),
                "LayerNorm_1": _norm(tensors, f"{at}.layer_norm2"),
                "MlpBlock_0": {
                    "Dense_0": _dense(tensors, f"{at}.mlp.fc1"),
                    "Dense_1": _dense(tensors, f"{at}.mlp.fc2"),
                },
            }
        )
        i += 1
    return out


def _encoder(tensors, prefix, heads, norm, scan):
    layers = [_flat(layer) for layer in _layers(tensors, prefix, heads)]
    out = {"encoder_norm": _norm(tensors, f"{prefix}{norm}")}
    if scan:
        return out | {"encoderblock": {key: np.stack([layer[key] for layer in layers]) for key in layers[0]}}
    return out | {f"encoderblock_{i}": layer for i, layer in enumerate(layers)}


def siglip(folder, heads=4, scan=False, head=True):
    """The arrays of a SigLIP by their flat keys, less ``params/``."""
    tensors, v, t = TensorFolder(folder), "vision_model.", "text_model."
    width = tensors.shape(f"{v}post_layernorm.weight")[0]
    img = {
        "embedding": {
            "kernel": tensors[f"{v}embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
            "bias": tensors[f"{v}embeddings.patch_embedding.bias"],
        },
        "pos_embedding": tensors[f"{v}embeddings.position_embedding.weight"][None],
        "Transformer": _encoder(tensors, v, heads, "post_layernorm", scan),
    }
    if head:
        weights = np.split(tensors[f"{v}head.attention.in_proj_weight"], 3)
        biases = np.split(tensors[f"{v}head.attention.in_proj_bias"], 3)
        parts = dict(zip(("query", "key", "value"), zip(weights, biases)))
        parts["out"] = (tensors[f"{v}head.attention.out_proj.weight"], tensors[f"{v}head.attention.out_proj.bias"])
        img["MAPHead_0"] = {
            "probe": tensors[f"{v}head.probe"].reshape(1, 1, width),
            "MultiHeadDotProductAttention_0": _attention(parts, heads),
            "LayerNorm_0": _norm(tensors, f"{v}head.layernorm"),
            "MlpBlock_0": {
                "Dense_0": _dense(tensors, f"{v}head.mlp.fc1"),
                "Dense_1": _dense(tensors, f"{v}head.mlp.fc2"),
            },
        }
    txt = {
        "Embed_0": {"embedding": tensors[f"{t}embeddings.token_embedding.weight"]},
        "pos_embedding": tensors[f"{t}embeddings.position_embedding.weight"][None],
        "Encoder_0": _encoder(tensors, t, heads, "final_layer_norm", scan),
        "head": _dense(tensors, f"{t}head"),
    }
    return _flat({"img": img, "txt": txt, "t": tensors["logit_scale"], "b": tensors["logit_bias"]})


def paligemma(folder, heads, kv_heads):
    """The arrays of a PaliGemma by their flat keys, less ``params/``, out of the torch library's folder (layout hf-5).

    Tower heads are 4. Every decoder tensor stands for all layers: einsum kernels with the heads on an axis.
    """
    raw = TensorFolder(folder)
    tower = {key.removeprefix("vision_tower."): raw[key] for key in raw if key.startswith("vision_tower.")}
    text = {
        key.removeprefix("language_model.model."): raw[key] for key in raw if key.startswith("language_model.model.")
    }
    depth = 1 + max(int(key.split(".")[1]) for key in text if key.startswith("layers."))

    def every(name):
        return [text[f"layers.{i}.{name}.weight"] for i in range(depth)]

    def split(weight, n):  # [heads x width of a head, in] -> [heads, in, width of a head]
        return weight.reshape(n, -1, weight.shape[1]).swapaxes(1, 2)

    keys, values = every("self_attn.k_proj"), every("self_attn.v_proj")
    gates, ups = every("mlp.gate_proj"), every("mlp.up_proj")
    layers = {
        "pre_attention_norm/scale": every("input_layernorm"),
        "pre_ffw_norm/scale": every("post_attention_layernorm"),
        "attn/q_einsum/w": [split(w, heads) for w in every("self_attn.q_proj")],
        "attn/kv_einsum/w": [np.stack([split(k, kv_heads), split(v, kv_heads)]) for k, v in zip(keys, values)],
        "attn/attn_vec_einsum/w": [w.T.reshape(heads, -1, len(w)) for w in every("self_attn.o_proj")],
        "mlp/gating_einsum": [np.stack([gate.T, up.T]) for gate, up in zip(gates, ups)],
        "mlp/linear": [w.T for w in every("mlp.down_proj")],
    }
    img = {
        "embedding": {
            "kernel": tower["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
            "bias": tower["embeddings.patch_embedding.bias"],
        },
        "pos_embedding": tower["embeddings.position_embedding.weight"][None],
        "Transformer": _encoder(tower, "", 4, "post_layernorm", True),
        "head": _dense(raw, "multi_modal_projector.linear"),
    }
    llm = {
        "embedder": {"input_embedding": text["embed_tokens.weight"]},
        "final_norm": {"scale": text["norm.weight"]},
        "layers": {key: np.stack(parts) for key, parts in layers.items()},
    }
    return _flat({"img": img, "llm": llm})


def _flat(tree, prefix=""):
    out = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def save(path, arrays, prefix="params/", optimizer=True):
    """The file as big_vision writes it: bfloat16 as two bytes without a name, the optimizer's state beside it."""
    arrays = {prefix + key: value for key, value in arrays.items()}
    arrays = {k: v.view("V2") if v.dtype == ml_dtypes.bfloat16 else v for k, v in arrays.items()}
    if optimizer and prefix:
        arrays |= {"opt/0/count": np.zeros((), np.int32), "opt/1/mu/img/pos_embedding": np.ones((1, 2, 3), np.float32)}
    np.savez(path, **arrays)
    return path
