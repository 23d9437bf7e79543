# mypy: ignore-errors
"""Device code of the LIF neuron in parallel over time.

Time is cut into chunks of whole blocks (`triton_sequential.py`), one program each. Forward guesses where a
chunk starts by walking some blocks before it from an empty membrane, and keeps where every chunk ended. Then
`fix_up_kernel` walks the chunks' ends, once for every row and block of channels: where a chunk did not start
with exactly the bits its predecessor ended with, it is run again from there until the membrane has the bits
that were computed before. What results is what one program walking all tokens computes, bit for bit.

Backward needs no guess. Its recursion is linear in the gradient of the membrane, so a chunk's effect on it is
an affine map, whatever the size of its factors: `adjoint_kernel` finds the maps, `carry_kernel` applies them
one after another, and `chunk_backward_kernel` walks every chunk with the gradient that enters at its end.
"""

import triton
import triton.language as tl

from spikescale.kernels.lif.triton_sequential import (
    TOKENS,
    backward_blocks,
    bit,
    derivatives,
    forward_block,
    load_resets,
    load_rows,
    offset,
    per_channel,
    place,
    recompute_block,
)

# Chunks whose ends are loaded together by the programs that walk over chunks.
AHEAD = tl.constexpr(8)


@triton.jit
def chunk_forward_kernel(
    x,
    v,
    reset,
    tau,
    v_threshold,
    spikes,
    starts,
    ends,  # (B, chunks, C) membrane after each chunk
    bits,
    T,
    C,
    stride_b,
    stride_t,
    stride_c,
    tau_value,
    threshold_value,
    chunk_blocks,
    warm_up_blocks,
    V_RESET: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    INVERSE_TAU: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, c, lane = place(C, BLOCK_C)
    chunk = tl.program_id(1)
    tau = per_channel(tau, tau_value, c, lane)
    v_threshold = per_channel(v_threshold, threshold_value, c, lane)
    x += row * stride_b + c.to(tl.int64) * stride_c
    spikes += row * T * C + c
    blocks = tl.cdiv(T, TOKENS)
    starts += row * blocks * C + c
    bits = offset(bits, row * blocks * C + c)
    reset = offset(reset, row * T)
    first = chunk * chunk_blocks
    warm_up = tl.maximum(first - warm_up_blocks, 0)
    # The first token's membrane is known, and a chunk that can start there needs no guess.
    membrane = tl.load(v + row * C + c, mask=tl.where(warm_up == 0, lane, False), other=0.0)
    for block in range(warm_up, first):
        membrane = forward_block(
            membrane, x, reset, None, None, None, block, T, C, stride_t, tau, v_threshold, lane,
            V_RESET, SOFT_RESET, INVERSE_TAU, True,
        )  # fmt: skip
    for block in range(first, tl.minimum(first + chunk_blocks, blocks)):
        membrane = forward_block(
            membrane, x, reset, spikes, starts, bits, block, T, C, stride_t, tau, v_threshold, lane,
            V_RESET, SOFT_RESET, INVERSE_TAU, WHOLE,
        )  # fmt: skip
    tl.store(ends + (row * tl.num_programs(1) + chunk) * C + c, membrane, mask=lane)


@triton.jit
def fix_up_kernel(
    x,
    reset,
    tau,
    v_threshold,
    spikes,
    v_out,
    starts,
    ends,
    bits,
    T,
    C,
    stride_b,
    stride_t,
    stride_c,
    tau_value,
    threshold_value,
    chunks,
    chunk_blocks,
    V_RESET: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    INVERSE_TAU: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, c, lane = place(C, BLOCK_C)
    tau = per_channel(tau, tau_value, c, lane)
    v_threshold = per_channel(v_threshold, threshold_value, c, lane)
    x += row * stride_b + c.to(tl.int64) * stride_c
    spikes += row * T * C + c
    blocks = tl.cdiv(T, TOKENS)
    starts += row * blocks * C + c
    bits = offset(bits, row * blocks * C + c)
    reset = offset(reset, row * T)
    ends += row * chunks * C + c
    membrane = tl.load(ends, mask=lane, other=0.0)
    chunk = 1
    while chunk < chunks:
        begun = ()
        ended = ()
        for i in tl.static_range(AHEAD):
            exists = tl.where(chunk + i < chunks, lane, False)
            place_of_start = tl.cast((chunk + i) * chunk_blocks, tl.int64) * C
            begun += (tl.load(starts + place_of_start, mask=exists, other=0.0),)
            ended += (tl.load(ends + tl.cast(chunk + i, tl.int64) * C, mask=exists, other=0.0),)
        good = tl.full([BLOCK_C], AHEAD, tl.int32)  # chunks that began as their predecessor ended
        before = membrane
        for i in tl.static_range(AHEAD):
            exists = tl.where(chunk + i < chunks, lane, False)
            good = tl.where(exists & differ(before, begun[i]), tl.minimum(good, i), good)
            before = ended[i]
        joined = tl.minimum(tl.min(good, 0), chunks - chunk)
        for i in tl.static_range(AHEAD):
            membrane = tl.where(i < joined, ended[i], membrane)
        chunk += joined
        if (joined < AHEAD) & (chunk < chunks):
            block = chunk * chunk_blocks
            stop = tl.minimum(block + chunk_blocks, blocks)
            apart = 1
            while (block < stop) & (apart != 0):
                membrane = forward_block(
                    membrane, x, reset, spikes, starts, bits, block, T, C, stride_t, tau, v_threshold, lane,
                    V_RESET, SOFT_RESET, INVERSE_TAU, WHOLE,
                )  # fmt: skip
                block += 1
                inner = tl.where(block < stop, lane, False)
                computed = tl.load(starts + tl.cast(block, tl.int64) * C, mask=inner, other=0.0)
                apart = tl.max((lane & differ(membrane, computed)).to(tl.int32), 0)
                apart = tl.where(block < stop, apart, 1)
            if apart == 0:
                membrane = tl.load(ends + tl.cast(chunk, tl.int64) * C, mask=lane, other=0.0)
            chunk += 1
    tl.store(v_out + row * C + c, membrane, mask=lane)


@triton.jit
def differ(a, b):
    """Where two membranes are not the same bit for bit, apart from kinds of NaN."""
    return membrane_bits(a) != membrane_bits(b)


@triton.jit
def membrane_bits(membrane):
    # Of the sign and payload of a NaN nothing depends: spikes and gradients are NaN.
    return tl.where(membrane == membrane, membrane.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def adjoint_kernel(
    x,
    reset,
    tau,
    v_threshold,
    starts,
    bits,
    grad_spikes,
    factors,  # (B, chunks, C): the gradient before a chunk is factor * gradient after it + term
    terms,  # (B, chunks, C)
    T,
    C,
    stride_b,
    stride_t,
    stride_c,
    grad_stride_b,
    grad_stride_t,
    grad_stride_c,
    tau_value,
    threshold_value,
    alpha,
    chunk_blocks,
    V_RESET: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    INVERSE_TAU: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, c, lane = place(C, BLOCK_C)
    chunk = tl.program_id(1)
    tau = per_channel(tau, tau_value, c, lane)
    v_threshold = per_channel(v_threshold, threshold_value, c, lane)
    x += row * stride_b + c.to(tl.int64) * stride_c
    grad_spikes += row * grad_stride_b + c.to(tl.int64) * grad_stride_c
    blocks = tl.cdiv(T, TOKENS)
    starts += row * blocks * C + c
    bits += row * blocks * C + c
    reset = offset(reset, row * T)
    inverse_tau = tau if INVERSE_TAU else 1.0 / tau
    first = chunk * chunk_blocks
    stop = tl.minimum(first + chunk_blocks, blocks)
    factor = tl.full([BLOCK_C], 1.0, tl.float32)
    term = tl.zeros([BLOCK_C], tl.float32)
    for back in range(0, stop - first):
        block = stop - 1 - back
        currents = load_rows(x, block, T, stride_t, lane, WHOLE)
        grads = load_rows(grad_spikes, block, T, grad_stride_t, lane, WHOLE)
        resets = load_resets(reset, block, T)
        word = tl.load(bits + tl.cast(block, tl.int64) * C, mask=lane, other=0)
        membrane = tl.load(starts + tl.cast(block, tl.int64) * C, mask=lane, other=0.0)
        membranes, _ = recompute_block(
            membrane, currents, reset, resets, word, tau, v_threshold, V_RESET, SOFT_RESET, INVERSE_TAU
        )
        for i in tl.static_range(TOKENS - 1, -1, -1):
            surrogate, through = derivatives(
                membranes[i], bit(word, i), v_threshold, alpha, V_RESET, SOFT_RESET, DETACH_RESET
            )
            new_term = grads[i] * surrogate + term * through
            new_term -= new_term * inverse_tau
            new_factor = factor * through
            new_factor -= new_factor * inverse_tau
            if reset is not None:
                new_term = tl.where(bit(resets, i), 0.0, new_term)
                new_factor = tl.where(bit(resets, i), 0.0, new_factor)
            if not WHOLE:
                inside = T - block * TOKENS > i
                new_term = tl.where(inside, new_term, term)
                new_factor = tl.where(inside, new_factor, factor)
            term = new_term
            factor = new_factor
    here = (row * tl.num_programs(1) + chunk) * C + c
    tl.store(factors + here, factor, mask=lane)
    tl.store(terms + here, term, mask=lane)


@triton.jit
def carry_kernel(
    factors,
    terms,
    grad_v_out,
    grads,  # (B, chunks, C): gradient of the membrane after each chunk
    grad_v,
    C,
    chunks,
    BLOCK_C: tl.constexpr,
):
    row, c, lane = place(C, BLOCK_C)
    base = row * chunks * C + c
    grad = tl.zeros([BLOCK_C], tl.float32)
    if grad_v_out is not None:
        grad = tl.load(grad_v_out + row * C + c, mask=lane, other=0.0)
    for group in range(0, tl.cdiv(chunks, AHEAD)):
        last = chunks - 1 - group * AHEAD
        loaded = ()
        for i in tl.static_range(AHEAD):
            here = base + tl.cast(last - i, tl.int64) * C
            exists = tl.where(i <= last, lane, False)
            factor = tl.load(factors + here, mask=exists, other=1.0)
            loaded += ((factor, tl.load(terms + here, mask=exists, other=0.0)),)
        for i in tl.static_range(AHEAD):
            exists = tl.where(i <= last, lane, False)
            tl.store(grads + base + tl.cast(last - i, tl.int64) * C, grad, mask=exists)
            # Where nothing enters, a factor that overflowed has nothing to multiply.
            grad = tl.where(grad == 0, loaded[i][1], loaded[i][0] * grad + loaded[i][1])
    tl.store(grad_v + row * C + c, grad, mask=lane)


@triton.jit
def chunk_backward_kernel(
    x,
    reset,
    tau,
    v_threshold,
    starts,
    bits,
    grad_spikes,
    grads,
    grad_x,
    grad_tau,  # (B, chunks, C), summed over the chunk
    grad_threshold,  # (B, chunks, C), summed over the chunk
    T,
    C,
    stride_b,
    stride_t,
    stride_c,
    grad_stride_b,
    grad_stride_t,
    grad_stride_c,
    tau_value,
    threshold_value,
    alpha,
    chunk_blocks,
    V_RESET: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    INVERSE_TAU: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, c, lane = place(C, BLOCK_C)
    chunk = tl.program_id(1)
    tau = per_channel(tau, tau_value, c, lane)
    v_threshold = per_channel(v_threshold, threshold_value, c, lane)
    x += row * stride_b + c.to(tl.int64) * stride_c
    grad_spikes += row * grad_stride_b + c.to(tl.int64) * grad_stride_c
    grad_x += row * T * C + c
    blocks = tl.cdiv(T, TOKENS)
    starts += row * blocks * C + c
    bits += row * blocks * C + c
    reset = offset(reset, row * T)
    here = (row * tl.num_programs(1) + chunk) * C + c
    first = chunk * chunk_blocks
    _, sum_tau, sum_threshold = backward_blocks(
        tl.load(grads + here, mask=lane, other=0.0),
        x, reset, starts, bits, grad_spikes, grad_x, first, tl.minimum(first + chunk_blocks, blocks),
        T, C, stride_t, grad_stride_t, tau, v_threshold, alpha, lane,
        V_RESET, SOFT_RESET, DETACH_RESET, INVERSE_TAU, WHOLE,
        grad_tau is not None, grad_threshold is not None,
    )  # fmt: skip
    if grad_tau is not None:
        tl.store(grad_tau + here, sum_tau, mask=lane)
    if grad_threshold is not None:
        tl.store(grad_threshold + here, sum_threshold, mask=lane)
