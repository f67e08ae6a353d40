"""scripts/download.py against a hub that is monkeypatched: whole, broken off, offline."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.utils import httpx

from conftest import load_script

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"12345678",
    "sub/notes.txt": b"abc",
    "original/x.pth": b"no",
}
download = load_script("scripts/download.py")


@pytest.fixture
def hub(monkeypatch):
    """A hub of one repository; `served` is what the next download delivers, `calls` its arguments."""
    state = SimpleNamespace(served=dict(FILES), calls=[], error=None)

    def repo_info(self, repo_id, *, revision, files_metadata):
        assert files_metadata
        files = [SimpleNamespace(rfilename=name, size=len(data)) for name, data in FILES.items()]
        return SimpleNamespace(sha="c0ffee" + "0" * 34, siblings=files)

    def snapshot_download(repo_id, *, revision, local_dir, ignore_patterns):
        state.calls.append((repo_id, revision))
        for name, data in state.served.items():
            if name.startswith("original/"):
                continue
            path = Path(local_dir, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if state.error is not None:
            raise state.error
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def run(folder: Path, *, model: str = "base", revision: str = "main") -> None:
    download.main(["--model", model, "--output_dir", str(folder), "--revision", revision])


def test_names_of_the_published_checkpoints():
    assert download.repository("base") == "GSAI-ML/LLaDA-8B-Base"
    assert download.repository("instruct") == "GSAI-ML/LLaDA-8B-Instruct"
    assert download.repository("1.5") == "GSAI-ML/LLaDA-1.5"
    assert download.repository("org/name") == "org/name"
    with pytest.raises(ValueError, match="--model bose: choose base, instruct, 1\\.5, or a hub repo"):
        download.repository("bose")


def test_complete_download_is_recorded_and_not_repeated(hub, tmp_path, capsys):
    run(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not (tmp_path / "out.partial").exists()
    record = json.loads((tmp_path / "out/download.json").read_text())
    assert record == {"repo_id": "GSAI-ML/LLaDA-8B-Base", "revision": "main", "commit": "c0ffee" + "0" * 34}
    assert hub.calls == [("GSAI-ML/LLaDA-8B-Base", record["commit"])]  # pinned, even if main moves meanwhile
    assert "3 files" in capsys.readouterr().out  # original/x.pth is not wanted

    run(tmp_path / "out")
    assert len(hub.calls) == 1
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--output_dir .*out: holds .*LLaDA-8B-Base.*another folder"):
        run(tmp_path / "out", model="instruct")
    with pytest.raises(ValueError, match=r"another folder for .*v2"):
        run(tmp_path / "out", revision="v2")


def test_broken_off_download_is_never_called_complete_and_resumes(hub, tmp_path):
    hub.served.pop("model.safetensors")
    hub.error = httpx.ReadTimeout("timed out")
    with pytest.raises(SystemExit, match=r"be reached.*timed out.*is kept in .*out\.partial") as caught:
        run(tmp_path / "out")
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code  # status 1
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial/config.json").is_file()

    hub.error = None  # a client that returns normally with a short file is caught by the sizes
    hub.served["model.safetensors"] = b"1234"
    with pytest.raises(SystemExit, match=r"1 of 3 files are missing or short, first model\.safetensors"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()

    hub.served["model.safetensors"] = FILES["model.safetensors"]
    run(tmp_path / "out")
    assert (tmp_path / "out/config.json").is_file() and not (tmp_path / "out.partial").exists()


def test_offline_says_what_to_check(monkeypatch, tmp_path):
    # the constant is what HF_HUB_OFFLINE=1 sets when the client is imported
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()  # a client made before would not look again
    with pytest.raises(SystemExit, match=r"--model base: .*not downloaded: offline.*unset HF_HUB_OFFLINE"):
        run(tmp_path / "out")
    huggingface_hub.close_session()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "status", "advice"),
    [
        ("RepositoryNotFoundError", 404, "no such repository, or a private one"),
        ("GatedRepoError", 403, "gated: accept its terms"),
        ("RevisionNotFoundError", 404, "no such --revision"),
    ],
)
def test_refusals_of_the_hub(monkeypatch, tmp_path, name, status, advice):
    response = httpx.Response(status, request=httpx.Request("GET", "https://hub.test"))

    def repo_info(self, repo_id, *, revision, files_metadata):
        raise getattr(huggingface_hub.errors, name)("refused\nsecond line", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    with pytest.raises(SystemExit, match=advice) as caught:
        run(tmp_path / "out", model="org/name")
    assert "\n" not in caught.value.code
    assert list(tmp_path.iterdir()) == []


def test_folder_of_someone_else_is_not_touched(hub, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not written by this script; give a new folder"):
        run(tmp_path)
    assert hub.calls == []
