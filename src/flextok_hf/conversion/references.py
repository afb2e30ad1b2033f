"""References in a checkpoint: to a folder next to its files, or to a repository on the Hub."""

from pathlib import Path, PurePosixPath

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .source import Checkpoint


def resolve_reference(reference: str, checkpoint: Checkpoint, what: str, remedy: str) -> Path | str:
    """Return the folder or Hub id that a setting of a checkpoint refers to.

    Args:
        reference: value of the setting, untrusted.
        checkpoint: the one with the setting; folders are allowed only beside a local one.
        what: the setting, for messages.
        remedy: what a user can do instead, for messages.

    Raises:
        ValueError: if it points outside the checkpoint's folder, or is neither a folder nor a Hub id.
    """
    parts = PurePosixPath(reference).parts
    if reference.startswith(("/", "~")) or "\\" in reference or "\0" in reference or ".." in parts:
        raise ValueError(f"{what} is {reference!r}, which points outside the checkpoint's folder. {remedy}")
    folder = checkpoint.folder / reference
    if checkpoint.is_local and folder.is_dir():
        if not folder.resolve().is_relative_to(checkpoint.folder.resolve()):
            raise ValueError(f"{what} is {reference!r}, which points outside the checkpoint's folder. {remedy}")
        return folder
    try:
        validate_repo_id(reference)
        is_hub_id = reference.count("/") == 1
    except HFValidationError:
        is_hub_id = False
    if not is_hub_id:
        raise ValueError(f"{what} is {reference!r}, neither a folder beside the checkpoint nor a Hub id. {remedy}")
    return reference
