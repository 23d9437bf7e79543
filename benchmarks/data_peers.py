"""The same preparation by other means, for `data.py`: JSON lines to files of GPT-2 tokens."""

import json
import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from spikescale.data_pipeline.shards import dtype_for
from spikescale.data_pipeline.tokenizers import Tokenizer, load_tokenizer
from spikescale.data_pipeline.tokenizers.huggingface import HuggingFaceTokenizer

BATCH = 1000  # documents


def plain_loop(texts: Path, tokenizer_folder: Path, output: Path) -> int:
    """Read, tokenise, append to one file, in one loop: the limit. Tokens written."""
    with texts.open(encoding="utf-8") as lines:
        return _loop(lines, json.loads, tokenizer_folder, output)


def plain_loop_orjson(texts: Path, tokenizer_folder: Path, output: Path) -> int:
    """The same with a faster reader of JSON, on undecoded lines. Tokens written."""
    with texts.open("rb") as lines:
        return _loop(lines, orjson.loads, tokenizer_folder, output)


def _loop(lines: Any, read: Callable[[Any], Any], tokenizer_folder: Path, output: Path) -> int:
    tokenizer, tokens = _tokenizer(tokenizer_folder), 0
    dtype = dtype_for(tokenizer.vocab_size)
    end = np.array([tokenizer.eos_id], dtype=dtype)
    with (output / "tokens.bin").open("wb") as file:
        for batch in _batches(lines, read):
            for ids in tokenizer.encode_arrays(batch):
                file.write(ids.astype(dtype).tobytes())
                file.write(end.tobytes())
                tokens += len(ids) + 1
    return tokens


def datasets_map(texts: Path, tokenizer_folder: Path, output: Path) -> int:
    """HF datasets: load_dataset, map over batches in two processes, save_to_disk. Tokens written."""
    import datasets
    import pyarrow.compute as pc

    datasets.disable_progress_bars()
    cache = str(output / "cache")
    data = datasets.load_dataset("json", data_files=str(texts), split="train", cache_dir=cache)

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        tokenizer = _cached(tokenizer_folder)
        return {"ids": [_ended(tokenizer, ids) for ids in tokenizer.encode_arrays(batch["text"])]}

    mapped = data.map(encode, batched=True, num_proc=2, remove_columns=data.column_names)
    mapped.save_to_disk(str(output / "saved"))
    return sum(pc.sum(pc.list_value_length(chunk)).as_py() for chunk in mapped.data.column("ids").chunks)


def ray_data(texts: Path, tokenizer_folder: Path, output: Path) -> int:
    """Ray Data: read_json, map_batches on two workers, write_parquet. Tokens written."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False

        def encode(batch: dict[str, Any]) -> dict[str, Any]:
            tokenizer = _cached(tokenizer_folder)
            rows = [_ended(tokenizer, ids) for ids in tokenizer.encode_arrays(list(batch["text"]))]
            held = np.empty(len(rows), dtype=object)
            held[:] = rows
            return {"ids": held, "length": np.array([len(row) for row in rows])}

        data = ray.data.read_json(str(texts), override_num_blocks=8).map_batches(encode, batch_size=BATCH)
        data.write_parquet(str(output / "parquet"))
        written = ray.data.read_parquet(str(output / "parquet"), columns=["length"])
        return int(written.sum("length"))
    finally:
        ray.shutdown()


def megatron_style(texts: Path, tokenizer_folder: Path, output: Path) -> int:
    """As Megatron's preprocess_data does it: a pool of two takes lines, one process writes the dataset."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    import torch

    tokenizer = _tokenizer(tokenizer_folder)
    dtype = dtype_for(tokenizer.vocab_size)
    builder, tokens = IndexedDatasetBuilder(str(output / "data.bin"), dtype=dtype.type), 0
    context = multiprocessing.get_context("spawn")
    with texts.open(encoding="utf-8") as lines, context.Pool(2, _start, (tokenizer_folder,)) as pool:
        for ids in pool.imap(_encode_line, lines, 32):
            builder.add_item(torch.from_numpy(ids.astype(dtype)))
            builder.end_document()
            tokens += len(ids)
    builder.finalize(str(output / "data.idx"))
    return tokens


PEERS = {
    "plain loop (the limit)": plain_loop,
    "plain loop, orjson": plain_loop_orjson,
    "datasets.map, 2 processes": datasets_map,
    "Ray Data, 2 workers": ray_data,
    "Megatron style, 2 processes": megatron_style,
}

_held: dict[str, Tokenizer] = {}


def _tokenizer(folder: Path) -> Tokenizer:
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(folder)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.use_fast_path("require", sample=None)
    return tokenizer


def _cached(folder: Path) -> Tokenizer:
    if str(folder) not in _held:
        _held[str(folder)] = _tokenizer(folder)
    return _held[str(folder)]


def _start(folder: Path) -> None:
    _held["pool"] = _tokenizer(folder)


def _encode_line(line: str) -> np.ndarray:
    tokenizer = _held["pool"]
    return _ended(tokenizer, tokenizer.encode_arrays([json.loads(line)["text"]])[0])


def _ended(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    return np.append(ids, tokenizer.eos_id).astype(np.int32)


def _batches(lines: Any, read: Callable[[Any], Any]) -> Any:
    batch: list[str] = []
    for line in lines:
        batch.append(read(line)["text"])
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


if __name__ == "__main__":
    import sys

    print(PEERS[sys.argv[1]](*(Path(word) for word in sys.argv[2:])))
