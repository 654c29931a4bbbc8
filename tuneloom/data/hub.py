"""Whether a hub id can be fetched at all, asked before a library spends a minute on retries."""

import os
import socket
from pathlib import Path
from urllib.parse import urlparse

from tuneloom.errors import DataError


def only_local(path: str) -> bool:
    """True when the files of `path` must come from this machine: a folder, or no network.

    Raises DataError for what is neither a folder nor a hub id.
    """
    if Path(path).is_dir():
        return True
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith("/"):
        raise DataError(f"{path}: no such folder; give a model folder or a hub id such as org/name")
    return not reachable()


def reachable() -> bool:
    """Whether the hub's name resolves, or a proxy will do that for us."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
