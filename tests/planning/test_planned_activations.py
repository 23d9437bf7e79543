"""What the planner says is kept for backward is what autograd keeps."""

import pytest
import torch
from workloads import VARIANTS, small

from spikescale.model import SpikeGPT
from spikescale.planning.activations import Shape, activations, kept_by_block

BATCH = 4


def bytes_kept(config, bfloat16=False, checkpointing=False, compact=True):
    """Bytes of the storages that a forward pass keeps for backward, without parameters and head."""
    model = SpikeGPT(config)
    model.activation_checkpointing, model.compact_activations = checkpointing, compact
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # projections start as zeros, and nothing would fire
                parameter.normal_(0, 2 / parameter.shape[1] ** 0.5, generator=generator)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    tokens = torch.randint(config.vocab_size, (BATCH, config.context_length), generator=generator)

    def remember(value):
        for tensor in value if isinstance(value, tuple) else (value,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
        return value

    with (
        torch.autograd.graph.saved_tensors_hooks(remember, lambda value: value),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        logits, _ = model(tokens)
    casts = 2 * sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    sizes = sum(storage.nbytes() for storage in kept.values()) - (casts if bfloat16 else 0)
    return sizes, logits


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_kept_bytes_of_each_variant(variant, bfloat16):
    config = small(variant)
    compact = variant not in ("spikegpt-b", "spikegpt-driven")  # packed bits are hidden from the hooks
    measured, _ = bytes_kept(config, bfloat16, compact=compact)
    tokens = BATCH * config.context_length
    planned = activations(config, tokens, 2 if bfloat16 else 4, compact=compact)
    assert planned.kept == pytest.approx(measured, rel=0.03)


def test_a_binary_embedding_and_longer_sequences():
    config = small(binary_embedding=True, layers=2)
    for length in (64, 256):
        longer = config.model_copy(update={"context_length": length})
        planned = activations(longer, BATCH * length, 4).kept
        assert planned == pytest.approx(bytes_kept(longer)[0], rel=0.03)


def test_spikes_kept_as_bits_save_what_the_planner_says():
    config = small("spikegpt-driven")
    shape = Shape(BATCH * config.context_length, config.width, 4)
    saved = shape.bytes_of(kept_by_block(config, False)) - shape.bytes_of(kept_by_block(config, True))
    # Ten spikes a token and channel, of 32 bits or 1.
    assert saved == 10 * (4 - 1 / 8) * BATCH * config.context_length * config.width


def test_recomputed_blocks_keep_a_byte_an_element():
    config = small(layers=8)
    tokens = BATCH * config.context_length
    stream = tokens * config.width
    assert activations(config, tokens, 4, recompute=True).blocks == 8 * stream
    assert activations(config, tokens, 4, recompute=True, compact=False).blocks == 8 * 4 * stream
    dropped = config.model_copy(update={"dropout": 0.1})
    assert activations(dropped, tokens, 4, recompute=True).blocks == 8 * 4 * stream
    assert activations(config, tokens, 4).blocks > 90 * activations(config, tokens, 4, recompute=True).blocks


def test_tensor_ranks_share_what_lies_between_projections():
    config = small()
    tokens = BATCH * config.context_length
    whole, half = (activations(config, tokens, 4, tensor=size).block for size in (1, 2))
    # wkv's inputs 3, states 1/4, output 1, channel mix 8: 12.25 numbers of 4 bytes a token and channel.
    assert whole - half == 12.25 * 4 / 2 * tokens * config.width


def test_the_loss_takes_four_copies_of_the_logits_or_one_chunk():
    config = small(vocab_size=50_000)
    tokens = 4096
    assert activations(config, tokens, 2).loss == 4 * 4 * tokens * 50_000
    assert activations(config, tokens, 2, regulariser=False).loss == 3 * 4 * tokens * 50_000
    assert activations(config, tokens, 2, fused_loss=True).loss == 2 * 2**26 + 8 * (tokens + 50_000) * 64
