"""The peer of benchmarks/ingest.py, run by datatrove's own interpreter: FOLDER of JSONL, OUT.

Two tasks on two processes, as `core` has two workers: read, drop exact copies, write Parquet. It
does not validate, repair or split, so it does less. Prints JSON: seconds and rows kept.
"""

import json
import sys
import time
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import ParquetWriter
from datatrove.utils.logging import logger


def adapt(self: object, data: dict, path: str, number: int) -> dict:
    """A chat as one text, its turns as metadata."""
    text = "\n".join(turn["content"] for turn in data["messages"])
    return {"text": text, "id": f"{path}/{number}", "metadata": {"messages": json.dumps(data)}}


def content(document: object) -> bytes:
    return document.text.encode()  # type: ignore[attr-defined]


def main() -> None:
    logger.remove()
    folder, out = sys.argv[1:3]
    config = ExactDedupConfig(content_getter=content)
    signatures, duplicates = f"{out}/signatures", f"{out}/duplicates"
    started = time.perf_counter()
    for number, (pipeline, tasks) in enumerate((
        ([JsonlReader(folder, adapter=adapt), ExactDedupSignature(signatures, config)], 2),
        ([ExactFindDedups(signatures, duplicates, config)], 1),
        ([JsonlReader(folder, adapter=adapt), ExactDedupFilter(duplicates, config),
          ParquetWriter(f"{out}/kept", compression="zstd")], 2),
    )):  # fmt: skip
        logs = f"{out}/logs-{number}"
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=tasks, logging_dir=logs).run()
    seconds = time.perf_counter() - started
    import pyarrow.parquet as pq

    kept = sum(pq.read_metadata(path).num_rows for path in Path(out, "kept").glob("*.parquet"))
    print(json.dumps({"workers": 2, "seconds": round(seconds, 2), "kept": kept}))


if __name__ == "__main__":
    main()
