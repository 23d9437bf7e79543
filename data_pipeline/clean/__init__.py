"""Cleaning of documents before they are tokenised: each stage counted, each drop explained.

    documents -> repair, filters, scrubbing (a partition at a time) -> duplicates (the whole corpus) -> shards

The first part is a pass of its own over every partition; what it lets through is kept beside the
shards until these are finished, with the numbers that tell duplicates. Like all of preparation it
depends on the request alone.
"""

from spikescale.data_pipeline.clean.settings import CleanSettings

__all__ = ["CleanSettings"]
