"""Train without Ray: torchrun --nproc-per-node 2 -m tuneloom.train experiment=demo run.id=my-run

Also one process: python -m tuneloom.train ...; the same config, data order and losses as `tuneloom
train`.
"""

import os
import sys
import time

from tuneloom.cli import split_config_dir
from tuneloom.config import build, compose, dotted_keys, unknown_override
from tuneloom.errors import Stopped, TuneloomError
from tuneloom.redact import redact, redact_tracebacks
from tuneloom.train.config import TrainConfig
from tuneloom.train.rules import refuse_unread
from tuneloom.train.runs import refuse_masked

LAST_WORDS_SECONDS = 2.0


def main(overrides: list[str]) -> int:
    """Compose conf/train.yaml, leave its `launch` to torchrun, train as the rank of the
    environment.
    """
    os.environ.setdefault("TUNELOOM_STARTED", str(time.time()))
    redact_tracebacks()
    known = [*dotted_keys(TrainConfig), "launch"]
    try:
        config_dir, overrides = split_config_dir(overrides)
        unknown_override([o for o in overrides if not o.startswith("launch.")], known)
        mapping = compose("train", overrides, config_dir=config_dir, known=known)
        del mapping["launch"]
        config = build(TrainConfig, mapping)
        refuse_unread(config)
        refuse_masked(config)

        from tuneloom.train.loop import fit

        fit(config, launcher={"kind": "torchrun"})
    except TuneloomError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"tuneloom train: {redact(str(error))}", file=sys.stderr, flush=True)
        elif not isinstance(error, Stopped):
            # torchrun ends all ranks once one has ended, and the first has something to say.
            time.sleep(LAST_WORDS_SECONDS)
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # ZeRO-3's parameters keep gloo's threads; threads that outlive the interpreter can abort it:
    # SIGABRT in place of the exit code (seen once; https://github.com/pytorch/pytorch/pull/179291).
    os._exit(code)
