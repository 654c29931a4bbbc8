"""Does a chat template end in time? Asked once of each, before it runs in this process.

A template comes with a model's folder and is a program of its author. Jinja's sandbox keeps it from
files and attributes, not from nested loops, powers and strings of gigabytes. A process with limits
(template_jail.py) renders short chats with it first; rows are then rendered here, at no cost. What
waits for one message that the probe does not send is not found.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tuneloom.errors import DataError

JAIL = Path(__file__).with_name("template_jail.py")
WAIT_SECONDS = 60
"""For the start of a Python on a busy machine; the templates have 2 s of CPU each."""
VERDICTS: dict[tuple[str, str], str | None] = {}


def faults(sources: Sequence[str], variables: dict[str, str]) -> list[str | None]:
    """What is wrong with each template, `takes more than 2 s ...`, or None; each is asked once."""
    told = json.dumps(variables, sort_keys=True)
    new = sorted({source for source in sources if (source, told) not in VERDICTS})
    if new:
        for source, fault in zip(new, _ask(new, variables), strict=True):
            VERDICTS[source, told] = fault
    return [VERDICTS[source, told] for source in sources]


def _ask(sources: list[str], variables: dict[str, str]) -> list[str | None]:
    """Start the jail; -P, since its folder has modules with names of the standard library's."""
    asked = json.dumps({"sources": sources, "variables": variables})
    seconds = WAIT_SECONDS + 4 * len(sources)
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(JAIL)], input=asked, capture_output=True, text=True,
            check=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise DataError(
            f"chat template: its check did not end in {seconds} s; is the machine out of CPU?"
        ) from None
    except subprocess.CalledProcessError as error:
        raise DataError(
            f"chat template: its check failed: {error.stderr.strip()[-300:]}"
        ) from error
    return list(json.loads(done.stdout))
