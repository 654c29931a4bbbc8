"""What keeps an embedded Ray (`launch=local`) to its owner: a token, loopback as its address, and a
folder for its logs and sockets, which Ray opens to all users of a host (2.60.0).
"""

import os
import secrets
import tempfile
from functools import cache
from pathlib import Path

from tuneloom.private import own_folder

CLIENT_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
AT_HOME = {
    # Where this is on, Ray replaces 127.0.0.1 by the host's address and listens on all interfaces.
    # Off is the default on Windows and macOS, whence the name; it does no more (2.60.0).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Seconds in which Ray's processes outlive its control store: 60 would cut a long save short.
    CLIENT_PATIENCE: "300",
}

LONGEST_SOCKET = 107
"""Characters of a socket's path; a batch job's temporary folder may have a long name."""


@cache
def keep_private() -> tempfile.TemporaryDirectory[str]:
    """Settings for the embedded Rays of this process, with a token in a file that only its owner
    reads.

    Ray makes a token by itself, but as ~/.ray/auth_token, readable by all (2.60.0). It reads the
    variables once, at import, so a sweep's next job keeps them; the folder goes with the process.
    """
    own = own_folder()
    folder = tempfile.TemporaryDirectory(prefix="token-", dir=own)
    path = Path(folder.name) / "token"
    path.touch(0o600)
    path.write_text(secrets.token_hex(32), encoding="utf-8")
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ |= AT_HOME | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    deepest = own / "ray/session_2026-11-28_02-17-39_123456_4194304/sockets/plasma_store.1"
    short = own if len(str(deepest)) < LONGEST_SOCKET else own_folder(Path("/tmp"))
    os.environ.setdefault("RAY_TMPDIR", str(short))
    return folder
