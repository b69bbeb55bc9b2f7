"""How a reference is made difficult, how its weights come over, and how two results are compared."""

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lvlm_jax import keymap
from lvlm_jax import params as P

TOLERANCE = 2e-5
"""Largest absolute difference over largest absolute reference value. The one tolerance; it is never loosened."""


def perturb(module: torch.nn.Module, seed: int = 0, factor: float = 5.0) -> torch.nn.Module:
    """Matrices times `factor`, N(0, 0.3) on vectors: what is one or zero at first would hide a weight nobody reads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.add_(0.3 * noise)
            elif weight.ndim > 1:
                weight.mul_(factor)
                if weight.std() == 0:  # latents that all start alike
                    weight.add_(noise)
    return module.eval()


def tensors(module: torch.nn.Module, unused: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The reference's state, less the keys that hold no weights."""
    skip = re.compile("|".join(unused) or "(?!)")
    return {k: v.detach().numpy() for k, v in module.state_dict().items() if not skip.fullmatch(k)}


def load(
    rows: Sequence[keymap.Row], theirs: Mapping[str, np.ndarray], shapes: Mapping, source: str = "reference"
) -> dict:
    """Their tensors as our parameters: no key left over on either side, shapes equal, and back again byte for byte."""
    expected = P.flatten(shapes)
    keymap.check(rows, expected, theirs, source)
    flat: dict[str, np.ndarray] = {}
    for row in rows:
        leaves = row.load(theirs[row.theirs])
        back = row.save(leaves)
        assert back.shape == theirs[row.theirs].shape, row
        assert np.ascontiguousarray(back).tobytes() == np.ascontiguousarray(theirs[row.theirs]).tobytes(), row
        flat.update(leaves)
    wrong = {k: (v.shape, expected[k].shape) for k, v in flat.items() if v.shape != expected[k].shape}
    assert not wrong, wrong
    return jax.tree.map(jnp.asarray, P.unflatten(flat))


def ratio(ours, reference) -> float:
    """Largest absolute difference over largest absolute reference value."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(_numpy(reference), np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    assert np.isfinite(reference).all()
    assert reference.std() > 1e-3, "a constant reference proves nothing"
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def close(ours, reference, what: str) -> None:
    """Asserts parity and prints the ratio (``pytest -rP`` shows it)."""
    found = ratio(ours, reference)
    print(f"parity {what}: {found:.2e} of the largest value")
    assert found <= TOLERANCE, f"{what}: largest difference is {found:.2e} of the largest value, above {TOLERANCE:.0e}"


def dead(run: Callable[[dict], np.ndarray], params: Mapping) -> set[str]:
    """Paths of the leaves that nothing reads: zeroed, the output is the same bits."""
    flat, base = P.flatten(params), np.asarray(run(params))
    found = set()
    for path, leaf in flat.items():
        out = np.asarray(run(P.unflatten({**flat, path: jnp.zeros_like(leaf)})))
        if np.array_equal(out, base):
            found.add(path)
    return found


def gradients(module: torch.nn.Module, unused: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The reference's gradients by key, zeros where it computed none."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    state = tensors(module, unused)
    zero = np.zeros_like
    return {k: zero(v) if weights[k].grad is None else weights[k].grad.numpy() for k, v in state.items()}


def _numpy(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else x


def same_gradients(expected, model, module, params, batch, output, rows, unused, name):
    """Gradients of one random projection of the outputs on real positions: theirs, by our names, and ours, by part.

    Args:
      expected: the torch library's outputs [B, T, V], still attached to `model`.
      output: method of our `module` that gives the same.
    """
    shown = (batch.segments > 0)[..., None]
    pull = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32) * shown
    (expected * torch.tensor(pull)).sum().backward()
    theirs = gradients(model, unused)
    wanted = P.flatten(P.unflatten({k: v for row in rows for k, v in row.load(theirs[row.theirs]).items()}))
    loss = lambda p, b: (module.apply({"params": p}, b, method=output) * pull).sum()  # noqa: E731
    ours = P.flatten(jax.jit(jax.grad(loss))(params, batch))
    for part in ("vision", "connector", "llm"):
        keys = sorted(k for k in ours if k.startswith(f"{part}/"))
        together = [np.concatenate([np.asarray(flat[k]).ravel() for k in keys]) for flat in (ours, wanted)]
        close(*together, f"{name}, gradients of {part}")
