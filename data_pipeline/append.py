"""Adding shards at the end of a data set that is there: the new source's partitions follow the old ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.manifest import REQUEST, Manifest, load_manifest, request_digest
from spikescale.data_pipeline.shards import ShardInfo
from spikescale.errors import UserError
from spikescale.files import read_json, write_json

EXTENDS = "extends"
# What the new text may have of its own; all else decides ids or splits, and must be as it was.
OWN = ("source", "partitions", "limit_documents", EXTENDS)


@dataclass(frozen=True)
class Earlier:
    """What an addition is added to.

    Attributes:
        partitions: the first number that is free.
        shards: with lower numbers. source: name of what was there.
    """

    partitions: int = 0
    shards: tuple[ShardInfo, ...] = ()
    source: str = ""


def extend(folder: Path, request: Mapping[str, Any]) -> tuple[dict[str, Any], Earlier]:
    """The request with the chain of requests before it, written to the folder; and what is there.

    The same addition, begun before, goes on; one that is complete stays as it is. Raises UserError for a
    folder without a complete data set, and for settings that differ from those that it was made with.
    """
    manifest = load_manifest(folder, verify="size")
    before = read_json(folder / REQUEST)
    for key in sorted({*before, *request} - set(OWN)):
        if before.get(key) != request.get(key):
            raise UserError(
                f"{folder}: --append needs the settings that its data were prepared with: {key} was"
                f" {before.get(key)} and is now {request.get(key)}"
            )
    chain = before.get(EXTENDS, [])
    if chain and {**request, EXTENDS: chain} == before:
        return before, _earlier(manifest, chain[-1]["partitions"])
    if before["partitions"]["count"] + (chain[-1]["partitions"] if chain else 0) != manifest.partitions:
        raise UserError(f"{folder}: another addition was begun there; finish it with the same words first")
    chain = [*chain, {"sha256": request_digest(before), "partitions": manifest.partitions}]
    extended = {**request, EXTENDS: chain}
    write_json(folder / REQUEST, extended)
    return extended, _earlier(manifest, manifest.partitions)


def _earlier(manifest: Manifest, partitions: int) -> Earlier:
    shards = (shard for found in manifest.splits.values() for shard in found if shard.number < partitions)
    name = manifest.source if manifest.partitions == partitions else manifest.source.rpartition(" + ")[0]
    return Earlier(partitions, tuple(shards), name)
