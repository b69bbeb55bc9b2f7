"""One format into another: a model in one file (GGUF, npz) as a folder that the torch library loads."""

from pathlib import Path

from lvlm_jax.hub import beside, download
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.hub.export import export_folder
from lvlm_jax.hub.gguf import contents
from lvlm_jax.shapes import DTypeLike


def is_file(source: str | Path) -> bool:
    """Whether a name is that of a model in one file, here or in an installed package."""
    return str(source).startswith(download.INSTALLED) or Path(source).suffix in download.FILES


def as_folder(
    source: str | Path,
    out: str | Path,
    layout: str = "hf",
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model file's config, weights, and what it carries of tokenizer and chat template.

    Args:
      source: a path, or ``pip:package/file``; dtype: of the weights, default as they are read.

    Raises:
      CheckpointError: as `import_folder`. FileExistsError: `out` is there and `overwrite` is False.
    """
    loaded = import_folder(source)
    path = loaded.folder
    speaks = path.suffix == ".gguf" and "tokenizer.ggml.tokens" in contents(path).metadata
    return export_folder(
        out,
        loaded.config,
        loaded.params,
        beside.tokenizer(path) if speaks else None,
        template=beside.chat_template(path) if speaks else None,
        layout=layout,
        image_token_id=loaded.image_token_id,
        dtype=dtype,
        overwrite=overwrite,
    )
