"""The peer of benchmarks/ingest.py, run by Data-Juicer's own interpreter: FOLDER of JSONL, OUT.

Two processes, as `core` has two workers: read, drop exact copies (its document_deduplicator, over
the chat as one text), write Parquet. It does not validate, repair or split, so it does less. Prints
JSON: seconds and rows kept.
"""

import json
import os
import sys
import time
from pathlib import Path

PROCESSES = 2


def as_text(row: dict) -> dict:
    """A chat as one text."""
    return {"text": "\n".join(turn["content"] for turn in row["messages"])}


def main() -> None:
    folder, out = sys.argv[1:3]
    os.environ["HF_DATASETS_CACHE"] = f"{out}/cache"
    from data_juicer.core.data import NestedDataset
    from data_juicer.ops.deduplicator.document_deduplicator import DocumentDeduplicator
    from datasets import load_dataset

    files = sorted(str(path) for path in Path(folder).glob("*.jsonl"))
    started = time.perf_counter()
    rows = load_dataset("json", data_files=files, split="train", num_proc=PROCESSES)
    dataset = NestedDataset(rows).map(as_text, num_proc=PROCESSES)
    dataset = dataset.process([DocumentDeduplicator(num_proc=PROCESSES)])
    dataset.select_columns(["messages"]).to_parquet(f"{out}/kept.parquet")
    seconds = time.perf_counter() - started
    print(json.dumps({"workers": PROCESSES, "seconds": round(seconds, 2), "kept": len(dataset)}))


if __name__ == "__main__":
    main()
