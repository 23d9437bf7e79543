"""From text to batches: sources, tokenizers, shards, preparation with Ray, and the ordered stream."""
