"""Uploads of saved folders to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import create_repo, upload_folder, whoami

from llada.flags.declaration import first_line
from llada.flags.paths import note_outputs
from llada.models.flags import HubFlags


def check_hub(flags: HubFlags) -> None:
    """ValueError where --push_to_hub could not succeed in the end: no login, or no hub."""
    if flags.push_to_hub:
        try:
            whoami()
        except Exception as error:  # the library's own classes for the token, the network and offline mode
            raise ValueError(f"--push_to_hub: {first_line(error)}; log in with `hf auth login`") from error


def push(folder: Path, flags: HubFlags, *, name: str) -> None:
    """Uploads a saved folder if --push_to_hub says so, and prints where it is.

    Args:
        name: of the repository where --hub_model_id gives none.

    Raises:
        ValueError: it cannot be uploaded; the folder stays.
    """
    if not flags.push_to_hub:
        return
    note_outputs(is_finished=False)  # an upload can fail for long, and the same command tries again
    try:
        repo = create_repo(flags.hub_model_id or name, private=flags.hub_private_repo or None, exist_ok=True)
        upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:
        what = f"{folder} is saved, the same command tries again"
        raise ValueError(f"--push_to_hub: {first_line(error)}; {what}") from error
    print(f"{folder} -> {repo}")
