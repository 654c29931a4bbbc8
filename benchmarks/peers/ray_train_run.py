"""`python -m benchmarks.peers.ray_train_run CONFIG [LEAST]`: our loop as a bare Ray Train job of
two ranks, or no fewer than LEAST, on the cluster that RAY_ADDRESS names, one rank a host, or on
this machine.

Ray Train places, watches and restarts (`FailureConfig`), as its documentation shows it; the loop
and its checkpoints are ours, so that only the launcher differs.
"""

import json
import os
import sys
from typing import Any

RANKS = 2


def train(config: dict[str, Any]) -> None:
    """One worker."""
    import ray.train

    from tuneloom.config import build
    from tuneloom.train.config import TrainConfig
    from tuneloom.train.loop import fit

    context = ray.train.get_context()
    config["batch"]["accumulation"] = RANKS // context.get_world_size()  # the same global batch
    os.environ |= {
        "RANK": str(context.get_world_rank()), "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    fit(build(TrainConfig, config))


def main() -> None:
    """Three retries."""
    config = json.loads(sys.argv[1])
    least = int(sys.argv[2]) if sys.argv[2:] else RANKS
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_hosts = "RAY_ADDRESS" in os.environ
    ray.init(
        **({} if on_hosts else {"address": "local", "include_dashboard": False, "num_cpus": 4}),
        logging_level="error",
    )
    TorchTrainer(
        train,
        train_loop_config=config,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=RANKS if least == RANKS else (least, RANKS),
            placement_strategy="STRICT_SPREAD" if on_hosts else "PACK",
        ),
        run_config=RunConfig(
            name=config["run"]["id"],
            storage_path=f"{config['run']['root']}/ray",
            failure_config=FailureConfig(max_failures=3),
        ),
    ).fit()


if __name__ == "__main__":
    main()
