"""croissant.json: the dataset in the words of MLCommons Croissant 1.0, for catalogues."""

from collections.abc import Mapping
from typing import Any

CONTEXT: dict[str, Any] = {
    "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/", "citeAs": "cr:citeAs", "column": "cr:column",
    "conformsTo": "dct:conformsTo", "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract", "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject", "fileSet": "cr:fileSet",
    "format": "cr:format", "includes": "cr:includes", "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath", "key": "cr:key", "md5": "cr:md5", "parentField": "cr:parentField",
    "path": "cr:path", "recordSet": "cr:recordSet", "references": "cr:references",
    "regex": "cr:regex", "repeated": "cr:repeated", "replace": "cr:replace",
    "separator": "cr:separator", "source": "cr:source", "subField": "cr:subField",
    "transform": "cr:transform",
}  # fmt: skip
FIELDS = {
    "id": "sha256 of the record's canonical JSON",
    "record": "the record as canonical JSON: messages, prompt and completion, or text",
    "source": "the raw file the record came from",
    "meta": "line, split key, label and findings, as JSON; no part of the id",
}


def croissant(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON-LD of a dataset, every value taken from its manifest."""
    shards = [
        (split, shard) for split, part in manifest["splits"].items() for shard in part["shards"]
    ]
    counts = manifest["counts"]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": manifest["name"],
        "version": f"1.0.0+{manifest['id']}",
        "description": f"{counts['kept']:,} records from {counts['in']:,} rows; see card.md.",
        "license": manifest["licence"]["effective"],
        "distribution": [
            {"@type": "cr:FileObject", "@id": shard["file"], "name": shard["file"],
             "contentUrl": shard["file"], "encodingFormat": "application/x-parquet",
             "sha256": shard["sha256"]}
            for _, shard in shards
        ],
        "recordSet": [
            {"@type": "cr:RecordSet", "@id": shard["file"].removesuffix(".parquet"),
             "name": shard["file"].removesuffix(".parquet"),
             "description": f"{shard['rows']:,} records of the split {split}",
             "field": [_field(shard["file"], name, text) for name, text in FIELDS.items()]}
            for split, shard in shards
        ],
    }  # fmt: skip


def _field(file: str, name: str, description: str) -> dict[str, Any]:
    """One column of one shard."""
    return {
        "@type": "cr:Field", "@id": f"{file.removesuffix('.parquet')}/{name}", "name": name,
        "description": description, "dataType": "sc:Text",
        "source": {"fileObject": {"@id": file}, "extract": {"column": name}},
    }  # fmt: skip
