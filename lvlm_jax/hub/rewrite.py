"""A model that cannot be asked about pictures, or one in a single file, as a folder that the torch library loads."""

from pathlib import Path

from lvlm_jax.hub import beside, configs, download
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.hub.export import export_folder
from lvlm_jax.hub.gguf import contents
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.shapes import DTypeLike


def is_alone(source: str | Path) -> bool:
    """Whether a name is that of a model in one file, or of a folder that holds a decoder, a tower or two alone."""
    if str(source).startswith(download.INSTALLED) or Path(source).suffix in download.FILES:
        return True
    config = Path(source).expanduser() / "config.json"
    return config.is_file() and configs.describe(configs.read_json(config), config.parent).kind != "lvlm"


def as_folder(
    source: str | Path,
    out: str | Path,
    layout: str = "hf",
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model's config, weights, and what stands beside it, or in its file, of tokenizer and chat template.

    Args:
      source: a folder, a file, or ``pip:package/file``; dtype: of the weights, default as they are read.

    Raises:
      CheckpointError: as `import_folder`. FileExistsError: `out` is there and `overwrite` is False.
    """
    loaded = import_folder(source)
    path = loaded.folder
    tokenizer = _tokenizer(path)
    whole = dict.fromkeys(("dual", "lvlm", "unified"), lambda c: c.vision)
    tower = {"vision": lambda c: c, **whole}.get(loaded.kind)
    spec = None if tower is None else beside.image_spec(path, tower(loaded.config).patch_size)
    return export_folder(
        out,
        loaded.config,
        loaded.params,
        tokenizer,
        spec,
        template=None if tokenizer is None else beside.chat_template(path),
        layout=layout,
        image_token_id=loaded.image_token_id,
        dtype=dtype,
        overwrite=overwrite,
    )


def _tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a folder or a file; None where it has none."""
    if path.suffix == ".gguf" and "tokenizer.ggml.tokens" not in contents(path).metadata:
        return None
    try:
        return None if path.suffix == ".npz" else beside.tokenizer(path)
    except FileNotFoundError:
        return None
