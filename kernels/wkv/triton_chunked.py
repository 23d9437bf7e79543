# mypy: ignore-errors
"""WKV in Triton, chunked over time: forward. Backward is in triton_chunked_backward.py.

A scan of three passes; inside a chunk tokens go one after another, chunks run in parallel.

    summaries   each chunk but the last alone: the past that it would leave if nothing came before it
    carry       along the chunks: the past before each of them
    outputs     each chunk from the past before it

Arrays over chunks are (B, chunks, rows, C) float32; pasts have six rows, or four when no gradient is wanted.
"""

import triton
import triton.language as tl

from spikescale.kernels.wkv.triton_token import (
    absorb,
    choose,
    difference,
    empty_past,
    forward_tokens,
    lanes,
    load_keys,
    load_past,
    load_resets,
    load_rows,
    load_state,
    moved,
    older_past,
    shares,
    store_past,
    store_state,
)


@triton.jit
def wkv_summaries(
    w, k, v, reset, summaries, closed, T, chunks, k_batch, v_batch, C: tl.constexpr,
    K_TIME: tl.constexpr, V_TIME: tl.constexpr,
    SLOPE: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B (chunks - 1), channel blocks): every chunk but the last of each sequence, so all are full.

    closed (B, chunks) bytes, with resets only: whether a token of the chunk empties the state.
    """
    program = tl.program_id(0)
    b, chunk = (program // (chunks - 1)).to(tl.int64), program % (chunks - 1)
    channels, inside = lanes(tl.program_id(1), C, BLOCK)
    k, v, reset = k + b * k_batch, v + b * v_batch, moved(reset, b * T)
    w = tl.load(w + channels, mask=inside, other=0.0)
    past = empty_past(w)
    emptied = chunk < 0
    for t in range(chunk * CHUNK, (chunk + 1) * CHUNK, SUB):
        keys = load_keys(k, t, T, channels, inside, K_TIME, SUB)
        values = load_rows(v, t, T, channels, inside, V_TIME, 0.0, SUB)
        resets = load_resets(reset, t, T, SUB)
        for i in tl.static_range(SUB):
            if len(resets) > 0:
                past = choose(resets[i], empty_past(w), past)
                emptied = emptied | resets[i]
            above, low = difference(keys[i], past[2])
            past, _, _ = absorb(past, keys[i], above, low, values[i] - past[0], w, True, SLOPE)
    index = b * chunks + chunk
    store_past(summaries + index * (6 if SLOPE else 4) * C, past, C, channels, inside, SLOPE)
    if closed is not None:
        tl.store(closed + index, emptied.to(tl.uint8), mask=tl.program_id(1) == 0)


@triton.jit
def join(past, chunk, length, w, SLOPE: tl.constexpr):
    """The past after a chunk of `length` tokens: that before it, grown older, and the chunk's own."""
    past = older_past(past, length)
    above, low = difference(chunk[2], past[2])
    lead = tl.fma(chunk[3] - past[3], w, above) + low
    share, rest, total, _, taller = shares(lead, chunk[1], past[1])
    news = chunk[0] - past[0]
    slope, mean_age = past[4], past[5]
    if SLOPE:
        slope = tl.fma(share, chunk[4], rest * (slope + share * (chunk[5] - mean_age) * news))
        mean_age = tl.fma(share, chunk[5], rest * mean_age)
    base, age = tl.where(taller, chunk[2], past[2]), tl.where(taller, chunk[3], past[3])
    return tl.fma(share, news, past[0]), total, base, age, slope, mean_age


@triton.jit
def wkv_carry(
    w, state, summaries, closed, starts, chunks, C: tl.constexpr,
    SLOPE: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B, channel blocks). starts: the past before every chunk. GROUP chunks are loaded together."""
    ROWS: tl.constexpr = 6 if SLOPE else 4
    b = tl.program_id(0).to(tl.int64)
    channels, inside = lanes(tl.program_id(1), C, BLOCK)
    w = tl.load(w + channels, mask=inside, other=0.0)
    past = load_state(state + b * 3 * C, C, channels, inside)
    summaries += b * chunks * ROWS * C
    starts += b * chunks * ROWS * C
    closed = moved(closed, b * chunks)
    store_past(starts, past, C, channels, inside, SLOPE)
    for first in range(0, chunks - 1, GROUP):
        own = ()
        for i in tl.static_range(GROUP):
            there = tl.where(first + i < chunks - 1, inside, False)
            own += (load_past(summaries + (first + i) * ROWS * C, C, channels, there, SLOPE),)
        emptied = load_resets(closed, first, chunks - 1, GROUP)
        for i in tl.static_range(GROUP):
            past = join(past, own[i], CHUNK, w, SLOPE)
            if len(emptied) > 0:
                past = choose(emptied[i], own[i], past)
            there = tl.where(first + i < chunks - 1, inside, False)
            store_past(starts + (first + i + 1) * ROWS * C, past, C, channels, there, SLOPE)


@triton.jit
def wkv_outputs(
    w, u, k, v, gate, reset, starts, y, state_out,
    T, chunks, k_batch, v_batch, gate_batch, C: tl.constexpr,
    K_TIME: tl.constexpr, V_TIME: tl.constexpr, GATE_TIME: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B chunks, channel blocks). y, and from the last chunk of every sequence state_out."""
    program = tl.program_id(0)
    b, chunk = (program // chunks).to(tl.int64), program % chunks
    channels, inside = lanes(tl.program_id(1), C, BLOCK)
    k, v, gate, reset = k + b * k_batch, v + b * v_batch, moved(gate, b * gate_batch), moved(reset, b * T)
    w = tl.load(w + channels, mask=inside, other=0.0)
    u = tl.load(u + channels, mask=inside, other=0.0)
    past = load_past(starts + (b * chunks + chunk) * ROWS * C, C, channels, inside, False)
    first = chunk * CHUNK
    blocks = tl.cdiv(tl.minimum(CHUNK, T - first), SUB)
    for block in range(blocks):
        t = first + block * SUB
        keys = load_keys(k, t, T, channels, inside, K_TIME, SUB)
        values = load_rows(v, t, T, channels, inside, V_TIME, 0.0, SUB)
        gates = load_rows(gate, t, T, channels, inside, GATE_TIME, 0.0, SUB)
        resets = load_resets(reset, t, T, SUB)
        past = forward_tokens(
            past, keys, values, gates, resets, w, u, y + b * T * C, t, T, channels, inside, C, False
        )
    if chunk == chunks - 1:
        past = older_past(past, T - first - blocks * SUB)
        store_state(state_out + b * 3 * C, past, w, C, channels, inside)
