"""Folder or hub name: what is taken, what is asked of the hub, and one message for each way it can fail."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from lvlm_jax.hub.download import ALLOW, named, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path):
    """A cache in the hub library's own layout."""
    repo = tmp_path / "cache" / "models--lvlm--tiny"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    return tmp_path / "cache"


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="is a folder on this machine, which has no revision 'v1'; leave it out"):
        resolve(tmp_path, revision="v1")


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_offline_from_the_cache(cache, revision):
    found = resolve("lvlm/tiny", revision=revision, cache=cache, offline=True)
    assert found == cache / "models--lvlm--tiny" / "snapshots" / COMMIT


def test_what_is_asked_of_the_hub(tmp_path, monkeypatch):
    asked = {}

    def fake(name, **given):
        asked.update(given, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert resolve("lvlm/tiny", revision="v1", token="t", cache="c", offline=False) == tmp_path
    assert asked["name"] == "lvlm/tiny"
    assert (asked["revision"], asked["token"], asked["cache_dir"]) == ("v1", "t", "c")
    assert asked["local_files_only"] is False
    assert asked["allow_patterns"] == ALLOW
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in ALLOW)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    resolve("lvlm/tiny")
    assert asked["local_files_only"] is True


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "no such folder here, and not a hub name either"),
        ("word", "no such folder here, and not a hub name either"),
        ("./folder", "no such folder here, and not a hub name either"),
        ("lvlm/absent", "no such folder here, nor \\(wholly\\) in the hub cache, and offline mode is on. If a fold"),
    ],
)
def test_not_found(cache, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        resolve(name, cache=cache, offline=True)


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="a file; give the folder that holds it together"):
        resolve(tmp_path / "model.safetensors")


def _http(kind, status):
    """An HTTP error of the hub library, which builds its arguments differently from version to version."""
    error = kind.__new__(kind)
    Exception.__init__(error, "refused")
    error.response = type("Response", (), {"status_code": status})()
    return error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (_http(errors.GatedRepoError, 403), PermissionError, "is gated. Accept its licence on its page, then pass tok"),
        (_http(errors.RepositoryNotFoundError, 404), FileNotFoundError, "no such repository on the hub, or it is priv"),
        (_http(errors.RevisionNotFoundError, 404), FileNotFoundError, "has no revision 'v9'; give a branch, a tag or"),
        (_http(errors.HfHubHTTPError, 401), PermissionError, "the hub refuses this token \\(401\\). Pass token="),
        (_http(errors.HfHubHTTPError, 403), PermissionError, "the hub refuses this token \\(403\\)"),
        (_http(errors.HfHubHTTPError, 503), ConnectionError, "the hub answered 503; try again later, or pass a fold"),
        (errors.LocalEntryNotFoundError("no network"), ConnectionError, "the hub cannot be reached \\(no network\\)"),
        (OSError("connection refused"), ConnectionError, "cannot be reached \\(connection refused\\). If a folder"),
    ],
)
def test_failures(monkeypatch, error, kind, message):
    def fake(name, **given):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    with pytest.raises(kind, match=message):
        resolve("lvlm/tiny", revision="v9", offline=False)


def test_a_name_beside_folders_of_ones_own_is_a_wrong_path(tmp_path, monkeypatch):
    def fake(name, **given):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    with pytest.raises(FileNotFoundError) as error:
        resolve("runs/nope", offline=False)
    assert str(error.value) == (
        "runs/nope: no such folder here, nor in the hub cache; the hub cannot be reached (no network). If a folder of "
        "yours is meant, check the path; if a hub name is, check the network or its proxy, or copy the repository here "
        "and pass the folder"
    )
    with pytest.raises(ConnectionError, match="gpt2: no such folder here, nor in the hub cache"):
        resolve("gpt2", offline=False, ownerless=True)


def test_an_error_names_the_field_that_asks():
    with pytest.raises(FileNotFoundError, match=r"^--vision: word: no such folder here"), named("--vision"):
        resolve("word", offline=True)
    with pytest.raises(PermissionError, match=r"^.Errno 13. denied$"), named("--vision"):
        raise PermissionError(13, "denied")


def test_other_errors_pass(monkeypatch):
    def fake(name, **given):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    with pytest.raises(ZeroDivisionError):
        resolve("lvlm/tiny", offline=False)
