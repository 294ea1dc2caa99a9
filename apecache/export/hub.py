"""Upload an exported folder to a Hugging Face hub."""

import re

from apecache.arguments import AnyPath, as_path
from apecache.errors import OptionError, RunError, one_line

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def push_to_hub(folder: AnyPath, repository: str, private: bool = False) -> str:
    """Create the repository if there is none, and upload the folder in one commit.

    The hub is that of `HF_ENDPOINT`, the token that of `HF_TOKEN` or of `hf auth login`.

    Args:
        folder: what `export_run` wrote.
        repository: `ORG/NAME`.
        private: whether a new repository is private.

    Returns:
        The URL of the repository.

    Raises:
        OptionError: not the name of a repository.
        RunError: the hub refuses or does not answer.
    """
    folder = as_path(folder, "folder")
    require_repository(repository)
    import os

    from huggingface_hub import HfApi

    # Read at the call: the library reads it once, when it is imported.
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        created = api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            repo_type="model",
            commit_message="Upload a model exported by apecache",
        )
    except Exception as error:  # the hub client's errors share no base class
        raise RunError(
            f"{folder} is written, but {repository} refused it ({one_line(error)}); upload it "
            f"later with: hf upload {repository} {folder}"
        ) from error
    return str(created)


def require_repository(repository: str) -> None:
    """Raise OptionError unless the text is `ORG/NAME`."""
    if not REPOSITORY.fullmatch(repository):
        raise OptionError(f"--push-to-hub {repository!r}: expected ORG/NAME")
