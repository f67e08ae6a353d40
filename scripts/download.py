"""Fetch a checkpoint from the Hugging Face hub into a folder.

Run:
    python scripts/download.py --model instruct --output_dir checkpoints/llada-8b-instruct
    python scripts/download.py --model Qwen/Qwen2.5-0.5B --output_dir checkpoints/qwen2.5-0.5b --revision main

`--model` is `base`, `instruct` or `1.5` (the published LLaDA checkpoints, about 16 GB each), or any
`org/name`. Files arrive in `OUTPUT_DIR.partial`; OUTPUT_DIR is complete or absent. After an interruption run
the same command again: finished files are kept. `OUTPUT_DIR/download.json` says what was fetched.
"""

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from llada.flags.declaration import first_line
from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass
class Config:
    """Flags of this script."""

    model: str = flag(help="base, instruct, 1.5, or a hub repository org/name")
    output_dir: str = flag(help="folder that receives the files; must be new", writes="folder")
    revision: str = flag("main", help="branch, tag or commit on the hub")


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # whichever HTTP library this version of the hub client uses

from llada.resumable import read_object

PUBLISHED = {
    "base": "GSAI-ML/LLaDA-8B-Base",
    "instruct": "GSAI-ML/LLaDA-8B-Instruct",
    "1.5": "GSAI-ML/LLaDA-1.5",
}
# Copies of the weights in formats that no script here reads.
UNREAD_FORMATS = ["original/*", "*.pth", "*.onnx", "*.msgpack", "*.h5", "*.ot", "*.mlmodel"]
RECORD = "download.json"
# Kind of failure -> what to check. GatedRepoError is a RepositoryNotFoundError: it comes first.
ADVICE = {
    OfflineModeIsEnabled: "offline mode is on: unset HF_HUB_OFFLINE, or copy the files and use their folder",
    GatedRepoError: "the repository is gated: accept its terms on the hub, then `hf auth login` or HF_TOKEN",
    RevisionNotFoundError: "no such --revision in that repository",
    RepositoryNotFoundError: "no such repository, or a private one: check the spelling, and HF_TOKEN",
    HFValidationError: "not a valid repository name: give org/name",
    httpx.TransportError: "the hub cannot be reached: check the network, HTTPS_PROXY and HF_ENDPOINT",
}


def repository(model: str) -> str:
    """The hub's org/name for a value of --model."""
    if model in PUBLISHED:
        return PUBLISHED[model]
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"--model {model}: choose {', '.join(PUBLISHED)}, or a hub repository as org/name")
    return model


def listing(repo_id: str, revision: str) -> tuple[str, dict[str, int]]:
    """What the hub holds: the commit, and the size in bytes of every file that is wanted."""
    # Asked first, so that "complete" can be checked: offline, `snapshot_download` hands back a half-filled
    # folder with only a warning.
    info = huggingface_hub.HfApi().repo_info(repo_id, revision=revision, files_metadata=True)
    wanted = {
        file.rfilename: file.size or 0
        for file in info.siblings or []
        if not any(fnmatch(file.rfilename, pattern) for pattern in UNREAD_FORMATS)
    }
    return info.sha, wanted


def fetch(repo_id: str, revision: str, folder: Path) -> str:
    """Downloads into `folder`, resuming what is there; returns the commit. ValueError for a missing file."""
    commit, wanted = listing(repo_id, revision)
    print(f"{repo_id} at {commit[:12]}: {len(wanted)} files, {sum(wanted.values()) / 1e9:.2f} GB", flush=True)
    huggingface_hub.snapshot_download(
        repo_id,
        revision=commit,
        local_dir=folder,
        ignore_patterns=UNREAD_FORMATS,  # the commit, not the branch: it may move during the download
    )
    bad = [
        name
        for name, size in wanted.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != size
    ]
    if bad:
        raise ValueError(f"{len(bad)} of {len(wanted)} files are missing or short, first {sorted(bad)[0]}")
    return commit


def main(argv: list[str] | None = None) -> None:
    """Fetches the checkpoint, or says in one line why not."""
    config = parse(Config, argv, description=__doc__)
    repo_id = repository(config.model)
    output_dir = Path(config.output_dir)
    request = {"repo_id": repo_id, "revision": config.revision}
    record = output_dir / RECORD
    if record.is_file():
        found = read_object(record, "commit")
        if {key: found.get(key) for key in request} == request:
            print(f"{output_dir}: already complete ({repo_id} at {found['commit'][:12]})")
            return
        raise ValueError(f"--output_dir {output_dir}: holds {found}; give another folder for {request}")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"--output_dir {output_dir}: was not written by this script; give a new folder")

    partial = output_dir.with_name(output_dir.name + ".partial")
    try:
        commit = fetch(repo_id, config.revision, partial)
    except (httpx.HTTPError, OSError, ValueError) as error:  # the hub's own errors are among these
        reason = first_line(error)
        kept = f"; what arrived is kept in {partial}" if partial.exists() else ""
        retry = "run the same command again to resume"
        advice = next((text for kind, text in ADVICE.items() if isinstance(error, kind)), retry)
        raise SystemExit(
            f"--model {config.model}: {repo_id} was not downloaded: {advice} ({reason}){kept}"
        ) from error
    text = json.dumps({**request, "commit": commit}, indent=2)
    (partial / RECORD).write_text(text + "\n", encoding="utf-8")
    partial.replace(output_dir)
    print(f"{output_dir}: complete")


if __name__ == "__main__":
    run_main(main)
