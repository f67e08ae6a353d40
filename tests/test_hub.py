"""--push_to_hub against a stand-in: what is uploaded is what was saved, and a failure loses nothing."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from conftest import ROOT, load_script

TOKEN = "hf_stand_in"


class Hub(ThreadingHTTPServer):
    """Keeps the files of commits, as (repository, path) -> bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.created, self.refuses_commits = {}, [], False
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The requests of an upload."""

    def log_message(self, *_):
        pass

    def answer(self, status, **content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.answer(200 if is_known else 401, name="me", type="user", orgs=[])

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub, repo = self.server, "/".join(self.path.split("/")[3:5])
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            hub.created.append((repo, bool(wanted.get("private")) or wanted.get("visibility") == "private"))
            self.answer(200, url=f"{hub.url}/{repo}", id=repo)
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.answer(200, files=files)
        elif self.path == "/api/validate-yaml":  # of the model card
            self.answer(200, errors=[], warnings=[])
        elif hub.refuses_commits:
            self.answer(403, error="You do not have write access")
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = line["value"]
                    hub.files[repo, file["path"]] = base64.b64decode(file["content"])
            self.answer(
                200, success=True, commitUrl=f"{hub.url}/{repo}/commit/1", commitOid="1", hookOutput=""
            )


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.shutdown()
    hub.server_close()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_trained_and_an_exported_model(hub, model_dir, tmp_path, monkeypatch):
    run, sft = tmp_path / "a-run", load_script("sft_training/train_sft.py")
    train = ["--model_name_or_path", model_dir, "--train_data_path", ROOT / "data/samples/sft.jsonl",
             "--output_dir", run, "--max_steps", 1, "--batch_size", 2,
             "--push_to_hub", "--hub_private_repo"]  # fmt: skip
    train = list(map(str, train))
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ValueError, match=r"--push_to_hub: .*; log in with `hf auth login`"):
        sft.main(train)
    assert not run.exists()

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuses_commits = True
    with pytest.raises(ValueError, match="final is saved, the same command tries again"):
        sft.main(train)
    assert (run / "final").is_dir() and not (run / "DONE").exists() and not hub.files

    hub.refuses_commits = False
    sft.main(train)
    assert (run / "DONE").exists() and ("me/a-run", True) in hub.created
    assert {path: data for (_, path), data in hub.files.items()} == files_of(run / "final")

    out, to = str(tmp_path / "out"), ["--push_to_hub", "--hub_model_id", "lab/model"]
    export = load_script("scripts/export_checkpoint.py").main
    hub.refuses_commits = True
    with pytest.raises(ValueError, match="out is saved, the same command tries again"):
        export(["--run", str(run), "--output_dir", out, *to])
    hub.refuses_commits = False
    with pytest.raises(ValueError, match="exists; give another place"):
        export(["--run", str(run), "--output_dir", out, "--step", "1", *to])
    export(["--run", str(run), "--output_dir", out, *to])
    assert hub.created[-1] == ("lab/model", False)
    found = {path: data for (repo, path), data in hub.files.items() if repo == "lab/model"}
    assert found == files_of(tmp_path / "out")
