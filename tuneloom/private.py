"""Folders of one user alone, on hosts that many share."""

import os
import tempfile
from pathlib import Path

from tuneloom.errors import RefusedError


def is_private(folder: Path) -> bool:
    """True when no other user can have put files there, nor read them."""
    try:
        facts = folder.lstat()
    except FileNotFoundError:
        return False
    return facts.st_uid == os.getuid() and facts.st_mode & 0o170077 == 0o040000


def own_folder(parent: Path | None = None) -> Path:
    """This user's folder beneath `parent`, by default the temporary one, made when it is not there;
    raises RefusedError where another user can have made it, or can write there.
    """
    folder = (parent or Path(tempfile.gettempdir())) / f"tuneloom-user-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder):
        raise RefusedError(
            f"{folder} is not this user's alone, and code is run and tokens are kept there; remove "
            f"it{', or set TMPDIR' if parent is None else ''}"
        )
    return folder
