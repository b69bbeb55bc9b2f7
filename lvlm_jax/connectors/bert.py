"""Keys of BERT's layers, under which a Q-Former's and a P-Former's stand too (BERT: arXiv 1810.04805)."""

from lvlm_jax.keymap import Row, dense, layer_norm


def attention_rows(ours: str, theirs: str, inner: str = "self") -> list[Row]:
    """Attention with its norm; `inner` is the name of what holds queries, keys and values."""
    out = []
    for x, y in (("q", "query"), ("k", "key"), ("v", "value")):
        out += dense(f"{ours}/{x}", f"{theirs}.{inner}.{y}", bias=True)
    out += dense(f"{ours}/o", f"{theirs}.output.dense", bias=True)
    return out + layer_norm(f"{ours}_norm", f"{theirs}.output.LayerNorm")


def mlp_rows(ours: str, theirs: str, suffix: str = "") -> list[Row]:
    """Feed-forward with its norm; `suffix` sets one of two apart."""
    out = dense(f"{ours}/up", f"{theirs}.intermediate{suffix}.dense", bias=True)
    out += dense(f"{ours}/down", f"{theirs}.output{suffix}.dense", bias=True)
    return out + layer_norm(f"{ours}_norm", f"{theirs}.output{suffix}.LayerNorm")
