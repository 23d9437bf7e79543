"""Where text comes from: one interface over registry packages, the HF hub, and local files.

A source is turned into numbered partitions, fixed independently of how many workers there are; each
partition yields its documents, in the same order every time it is read.
"""

from spikescale.data_pipeline.sources.base import Document, Partition, ReadOptions, Source, SourceInfo
from spikescale.data_pipeline.sources.catalog import list_sources, open_source

__all__ = ["Document", "Partition", "ReadOptions", "Source", "SourceInfo", "list_sources", "open_source"]
