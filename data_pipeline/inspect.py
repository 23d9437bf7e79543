"""Looking at prepared data: document lengths as a picture, and documents as text."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from spikescale.data_pipeline.manifest import Manifest
from spikescale.data_pipeline.shards import document_lengths
from spikescale.data_pipeline.tokenizers import load_tokenizer
from spikescale.data_pipeline.tokens import iterate_documents
from spikescale.files import written_aside


def split_document_lengths(manifest: Manifest, split: str) -> np.ndarray:
    """Tokens of every document of a split, ends included, int64."""
    parts = [document_lengths(shard) for shard in manifest.shards(split)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def sample_documents(manifest: Manifest, count: int) -> Iterator[tuple[str, int, str]]:
    """(split, number, text) of the first `count` documents of each split, decoded from their tokens."""
    tokenizer = load_tokenizer(manifest.tokenizer_folder)
    for split in manifest.splits:
        for number, ids in enumerate(islice(iterate_documents(manifest, split), count)):
            yield split, number, tokenizer.decode(ids.tolist())


def draw_document_lengths(manifest: Manifest, path: Path) -> None:
    """Write a PNG with a histogram of document lengths, one panel a split, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = {split: split_document_lengths(manifest, split) for split in manifest.splits}
    lengths = {split: values for split, values in lengths.items() if len(values)}
    longest = max(int(values.max()) for values in lengths.values())
    shortest = min(int(values.min()) for values in lengths.values())
    bins = np.geomspace(shortest, max(longest, shortest + 1) + 1, 41)
    figure = Figure(figsize=(8, 2.2 * len(lengths) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(lengths), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (split, values) in zip(panels, lengths.items(), strict=True):
        panel.hist(values, bins=bins, color="#4878a8")
        median = float(np.median(values))
        panel.axvline(median, color="#c44e52", linewidth=1.2, label=f"median {median:,.0f}")
        panel.set_ylabel("documents")
        panel.set_title(f"{split}: {len(values):,} documents, {int(values.sum()):,} tokens", fontsize=10)
        panel.legend(frameon=False, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xscale("log")
    panels[-1].set_xlabel(f"tokens in a document ({manifest.tokenizer.kind} tokenizer)")
    figure.suptitle(f"Document lengths of {manifest.source}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
