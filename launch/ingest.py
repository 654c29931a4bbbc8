"""`tuneloom ingest`: on this machine's processes, or (launch=ray) on Ray Data over a cluster.

Each source is read by one task, whose blocks other tasks prepare; they come back in the order of
sources and lines, so the dataset is the one that a single process makes, byte for byte. Raw files,
evaluation sets, schema and key file must lie where every node sees them; the dataset is written by
the process that was started.
"""

import functools
import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tuneloom.data import ingest
from tuneloom.data.gather import Spill, write_run
from tuneloom.data.pool import prepare_here
from tuneloom.data.prepare import Prepared, Preparer
from tuneloom.data.readers import Block, Passed, Refused, read_blocks
from tuneloom.data.recipe import IngestConfig, Recipe
from tuneloom.data.redact import KEY_VARIABLE
from tuneloom.data.sources import Source
from tuneloom.errors import RefusedError, TuneloomError

OBJECT_STORE_BYTES = 512 << 20
"""Of the Ray of this machine alone: a few dozen blocks of 4 MiB, raw and prepared."""
TASK_BYTES = 8 << 20
"""Ray Data hands results on in pieces of about this size; its own 128 MiB would hold 30 blocks."""


class IngestJob(IngestConfig):
    """What `tuneloom ingest` composes and validates."""

    launch: Literal["local", "ray"] = "local"
    """`local`: `workers` processes of this machine; `ray`: `workers` tasks of a Ray cluster."""


CONFIG = IngestJob
TEXT_KEYS = ("launch",)
"""Not a config group, as `launch` is for `train`: Hydra would look for conf/launch/ray.yaml."""


def main(config: IngestJob) -> int:
    """Ingest by the launcher that the config names."""
    if config.launch == "local":
        return ingest.main(config, prepare_here)
    with cluster(config):
        return ingest.main(config, prepare_on_ray)


@contextmanager
def cluster(config: IngestJob) -> Iterator[None]:
    """The Ray cluster of RAY_ADDRESS, or a Ray of this machine alone, with a token of its own."""
    # Imported here, for it brings torch: 3 s that launch=local does without.
    from tuneloom.launch.embedded import keep_private
    from tuneloom.launch.head import join
    from tuneloom.launch.reaper import after_us
    from tuneloom.launch.supervise import READ_AT_IMPORT

    address = os.environ.get("RAY_ADDRESS")
    if not address:
        keep_private()
    os.environ |= READ_AT_IMPORT
    import ray

    try:
        if address:
            join(address, logging_level=logging.ERROR)
        else:
            print("launch=ray: RAY_ADDRESS is unset, so a Ray is started here", flush=True)
            ray.init(
                address="local", num_cpus=max(config.workers, os.cpu_count() or 1),
                include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1", _system_config={"worker_niceness": 0},
                logging_level=logging.ERROR,
            )  # fmt: skip
            after_us()
        _refuse_what_cannot_run(config)
        yield
    finally:
        ray.shutdown()


def _refuse_what_cannot_run(config: IngestJob) -> None:
    """More tasks than processors would wait for ever; a job's working_dir is deleted by Ray."""
    import ray

    processors = int(ray.cluster_resources().get("CPU", 0))
    if config.workers > processors:
        raise RefusedError(
            f"workers: {config.workers} tasks at once, but the Ray cluster has {processors} "
            "processors; lower it"
        )
    shipped = ray.get_runtime_context().runtime_env.get("working_dir")
    if shipped and not Path(config.root).is_absolute():
        raise RefusedError(
            f"root: {config.root!r} would lie in the working_dir that Ray deletes after the job; "
            "give an absolute folder"
        )


def prepare_on_ray(
    config: IngestConfig, sources: list[Source], folder: Path, ends: list[Passed | Refused]
) -> Iterator[tuple[Block, Prepared]]:
    """`Prepare` by `config.workers` tasks of Ray Data; rows come back to be written here."""
    Preparer(config.data)  # a recipe that cannot run is refused here, not in a task
    recipe, key = _seen_from_everywhere(config.data), os.environ.get(KEY_VARIABLE)
    # Reading waits for disks, and no processor is set aside for it: with one, Ray Data would make
    # a single task of both steps, and a file would keep one processor busy.
    blocks = _dataset(sources).flat_map(
        _read, fn_args=(config.max_archive_bytes, config.max_refused_files > 0), num_cpus=0,
        concurrency=config.workers,
    )  # fmt: skip
    results = blocks.map(_prepare, fn_args=(recipe, key), num_cpus=1, concurrency=config.workers)
    number = 0
    for row in results.iter_rows():
        said = pickle.loads(row["said"])
        if isinstance(said, TuneloomError):
            raise said
        if isinstance(said, Passed | Refused):
            ends.append(said)
            continue
        block, done = said
        write_run(Spill(folder).block(number), done.table)
        number += 1
        yield block, done


def _dataset(sources: list[Source]) -> Any:
    """The sources as a Ray Dataset, a block each, that keeps their order and says nothing."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = TASK_BYTES
    context.execution_options.preserve_order = True
    return ray.data.from_items(
        [{"source": pickle.dumps(source)} for source in sources], override_num_blocks=len(sources)
    )


def _read(
    row: dict[str, Any], max_archive_bytes: int, refuse_files: bool
) -> Iterator[dict[str, bytes]]:
    """One source's blocks, and what it was; an error of ours is a row too, and so loses nothing."""
    ends: list[Passed | Refused] = []
    try:
        source = pickle.loads(row["source"])
        for block in read_blocks(
            [source], ends, max_archive_bytes=max_archive_bytes, refuse_files=refuse_files
        ):
            yield {"said": pickle.dumps(block)}
        for part in ends:
            yield {"said": pickle.dumps(part)}
    except TuneloomError as error:
        yield {"said": pickle.dumps(error)}


def _prepare(row: dict[str, Any], recipe: str, key: str | None) -> dict[str, bytes]:
    """A block prepared; anything else is handed on."""
    said = pickle.loads(row["said"])
    if not isinstance(said, Block):
        return {"said": row["said"]}
    if key is not None:
        os.environ[KEY_VARIABLE] = key
    return {"said": pickle.dumps((said.without_rows(), _preparer(recipe)(said)))}


@functools.cache
def _preparer(recipe: str) -> Preparer:
    """Compiled once a process of Ray's."""
    return Preparer(Recipe.model_validate_json(recipe))


def _seen_from_everywhere(recipe: Recipe) -> str:
    """The recipe as JSON, its paths as seen from the root: tasks run in a folder of Ray's."""
    said = recipe.model_dump(mode="json")
    for entry in said["against"]["sets"]:
        entry["path"] = os.path.abspath(entry["path"])
    for holder, name in ((said, "json_schema"), (said["privacy"], "key_file")):
        holder[name] = holder[name] and os.path.abspath(holder[name])
    return Recipe.model_validate(said).model_dump_json()
