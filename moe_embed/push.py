"""A finished folder to the Hugging Face hub: huggingface_hub's upload, a new repository private unless asked otherwise.

The token is read from the environment variable HF_TOKEN alone, and is in no message and no file.
"""

import importlib.util
import os
import pathlib
from collections.abc import Collection, Mapping

from moe_embed.card_facts import REPO
from moe_embed.config import UserError

VARIABLE = "HF_TOKEN"


def check(repo: str, environment: Mapping[str, str] = os.environ) -> None:
    """UserError, before any work, where `push` could not start: no OWNER/NAME, no package, no token."""
    if not REPO.fullmatch(repo):
        raise UserError(f"--push={repo} is no OWNER/NAME of the hub.")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError('--push needs huggingface_hub: pip install -e ".[push]"')
    if not environment.get(VARIABLE):
        raise UserError(f"--push needs a token that may write, in the environment variable {VARIABLE}.")


def network_faults() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the hub refuses or cannot be reached.

    Which package it sends by changes with its versions (requests, httpx, httpx2), and a lost connection need be no OSError. The
    base of all that package's faults is also one of huggingface_hub's own error.
    """
    from huggingface_hub.errors import HfHubHTTPError  # here: an extra

    return (OSError, *(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"))


def push(
    folder: pathlib.Path,
    repo: str,
    *,
    public: bool = False,
    replaces: Collection[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> str:
    """Upload all files of `folder` in one commit; returns the repository's address.

    A repository that exists stays as visible as it is, and keeps its other files but those of `replaces`: they are of an earlier
    model. UserError, without the token in it, for what the hub refuses, and where it cannot be reached.
    """
    import huggingface_hub  # here: an extra

    token = environment[VARIABLE]
    api = huggingface_hub.HfApi(token=token)
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        stale = sorted(name for name in replaces if not (folder / name).exists())
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="moe_embed.export", delete_patterns=stale or None
        )
    except (*network_faults(), ValueError, RuntimeError) as error:  # the last: a file that broke off
        said = " ".join(str(error).replace(token, "***").split()) or type(error).__name__
        raise UserError(f"the folder is written, but was not pushed to {repo}: {said}") from None
    return str(address)
