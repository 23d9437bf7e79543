# mypy: ignore-errors
"""Device code of graded neurons: one program walks all tokens of a block of channels.

Built as `triton_sequential.py` is, whose loads and rules of rounding these kernels share, with blocks of 16
tokens: of 32, backward would not fit into the registers. What is kept for backward is the membrane before
every block: a block's membranes and spikes are computed anew from it with the same operations, so they are
the same bits. A spike's size is counted level by level, as the definition does: dividing by the threshold
would round otherwise.
"""

import triton
import triton.language as tl

from spikescale.kernels.lif.triton_sequential import (
    bit,
    load_resets,
    load_rows,
    offset,
    over_tau,
    per_channel,
    place,
)

TOKENS = tl.constexpr(16)


@triton.jit
def graded_forward_kernel(
    x,  # (B, T, C), strides in elements
    v,  # (B, C)
    reset,  # (B, T) bytes
    tau,  # (C,)
    v_threshold,  # (C,)
    spikes,  # (B, T, C)
    v_out,  # (B, C)
    starts,  # (B, blocks, C) membrane before each block
    T,
    C,
    stride_b,
    stride_t,
    stride_c,
    tau_value,  # 1 / tau with INVERSE_TAU
    threshold_value,
    V_RESET: tl.constexpr,
    LEVELS: tl.constexpr,
    SIGNED: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    INVERSE_TAU: tl.constexpr,
    WHOLE: tl.constexpr,  # T is a multiple of TOKENS
    BLOCK_C: tl.constexpr,
):
    row, c, lane = place(C, BLOCK_C)
    tau = per_channel(tau, tau_value, c, lane)
    v_threshold = per_channel(v_threshold, threshold_value, c, lane)
    x += row * stride_b + c.to(tl.int64) * stride_c
    spikes += row * T * C + c
    blocks = tl.cdiv(T, TOKENS)
    starts = offset(starts, row * blocks * C + c)
    reset = offset(reset, row * T)
    membrane = tl.load(v + row * C + c, mask=lane, other=0.0)
    for block in range(0, blocks):
        if starts is not None:
            tl.store(starts + tl.cast(block, tl.int64) * C, membrane, mask=lane)
        currents = load_rows(x, block, T, stride_t, lane, WHOLE, TOKENS)
        resets = load_resets(reset, block, T, TOKENS)
        left = T - block * TOKENS
        for i in tl.static_range(TOKENS):
            h, _ = charged(membrane, currents[i], reset, bit(resets, i), tau, V_RESET, INVERSE_TAU)
            size = count_levels(h, v_threshold, LEVELS, SIGNED, SOFT_RESET)
            after = after_spike(h, size, v_threshold, V_RESET, SOFT_RESET)
            inside = lane
            if WHOLE:
                membrane = after
            else:
                inside = tl.where(left > i, lane, False)
                membrane = tl.where(inside, after, membrane)
            spike = tl.where(h == h, size, h)
            tl.store(spikes, spike.to(spikes.dtype.element_ty), mask=inside)
            spikes += C
    tl.store(v_out + row * C + c, membrane, mask=lane)


@triton.jit
def graded_backward_kernel(
    x,
    reset,
    tau,
    v_threshold,
    starts,
    grad_spikes,  # (B, T, C), strides in elements
    grad_v_out,  # (B, C)
    grad_x,  # (B, T, C)
    grad_v,  # (B, C)
    grad_tau,  # (B, C), summed over time
    grad_threshold,  # (B, C), summed over time
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
    V_RESET: tl.constexpr,
    LEVELS: tl.constexpr,
    SIGNED: tl.constexpr,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    INVERSE_TAU: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, c, lane = place(C, BLOCK_C)
    tau = per_channel(tau, tau_value, c, lane)
    v_threshold = per_channel(v_threshold, threshold_value, c, lane)
    inverse_tau = tau if INVERSE_TAU else 1.0 / tau
    x += row * stride_b + c.to(tl.int64) * stride_c
    grad_spikes += row * grad_stride_b + c.to(tl.int64) * grad_stride_c
    grad_x += row * T * C + c
    blocks = tl.cdiv(T, TOKENS)
    starts += row * blocks * C + c
    reset = offset(reset, row * T)
    grad = tl.load(grad_v_out + row * C + c, mask=lane, other=0.0)
    sum_tau = tl.zeros_like(grad)
    sum_threshold = tl.zeros_like(grad)
    for back in range(0, blocks):
        block = blocks - 1 - back
        block_start = tl.cast(block, tl.int64) * C
        left = T - block * TOKENS
        currents = load_rows(x, block, T, stride_t, lane, WHOLE, TOKENS)
        grads = load_rows(grad_spikes, block, T, grad_stride_t, lane, WHOLE, TOKENS)
        resets = load_resets(reset, block, T, TOKENS)
        membrane = tl.load(starts + block_start, mask=lane, other=0.0)
        membranes = ()
        charges = ()
        for i in tl.static_range(TOKENS):
            h, charge = charged(membrane, currents[i], reset, bit(resets, i), tau, V_RESET, INVERSE_TAU)
            size = count_levels(h, v_threshold, LEVELS, SIGNED, SOFT_RESET)
            membrane = after_spike(h, size, v_threshold, V_RESET, SOFT_RESET)
            membranes += (h,)
            charges += (charge,)
        out = grad_x + block_start * TOKENS + (TOKENS - 1) * C
        for i in tl.static_range(TOKENS - 1, -1, -1):
            h = membranes[i]
            inside = lane
            if not WHOLE:
                inside = tl.where(left > i, lane, False)
            by_membrane, by_threshold = spike_derivatives(h, v_threshold, alpha, LEVELS, SIGNED)
            size = count_levels(h, v_threshold, LEVELS, SIGNED, SOFT_RESET)
            through, through_threshold = reset_derivatives(
                h, size, by_membrane, by_threshold, v_threshold, alpha, V_RESET, SIGNED, SOFT_RESET,
                DETACH_RESET,
            )  # fmt: skip
            grad_h = grads[i] * by_membrane + grad * through
            grad_current = grad_h * inverse_tau
            tl.store(out, grad_current.to(grad_x.dtype.element_ty), mask=inside)
            out -= C
            if grad_tau is not None:
                sum_tau -= tl.where(inside, grad_current * charges[i], 0.0)
            if grad_threshold is not None:
                rate = grads[i] * by_threshold + grad * through_threshold
                sum_threshold += tl.where(inside, rate, 0.0)
            before = grad_h - grad_current
            if reset is not None:
                before = tl.where(bit(resets, i), 0.0, before)
            if WHOLE:
                grad = before
            else:
                grad = tl.where(inside, before, grad)
    tl.store(grad_v + row * C + c, grad, mask=lane)
    if grad_tau is not None:
        tl.store(grad_tau + row * C + c, sum_tau, mask=lane)
    if grad_threshold is not None:
        tl.store(grad_threshold + row * C + c, sum_threshold, mask=lane)


@triton.jit
def charged(membrane, current, reset, emptied, tau, V_RESET: tl.constexpr, INVERSE_TAU: tl.constexpr):
    """h, and the share of the current in it."""
    if reset is not None:
        membrane = tl.where(emptied, 0.0, membrane)
    charge = over_tau(current - (membrane - V_RESET), tau, INVERSE_TAU)
    return membrane + charge, charge


@triton.jit
def passed(h, level, STRICT: tl.constexpr):
    """1 where h is at `level` (past it if STRICT), else 0; also 0 where h is NaN."""
    above = h - level
    if STRICT:
        return (above > 0).to(tl.float32)
    else:
        return (above >= 0).to(tl.float32)


@triton.jit
def count_levels(h, v_threshold, LEVELS: tl.constexpr, SIGNED: tl.constexpr, STRICT: tl.constexpr):
    """How large the spike of a membrane is."""
    size = passed(h, v_threshold, STRICT)
    if SIGNED:
        size -= passed(-h, v_threshold, STRICT)
    for k in range(2, LEVELS + 1):
        level = tl.cast(k, tl.float32) * v_threshold
        size += passed(h, level, STRICT)
        if SIGNED:
            size -= passed(-h, level, STRICT)
    return size


@triton.jit
def after_spike(h, size, v_threshold, V_RESET: tl.constexpr, SOFT_RESET: tl.constexpr):
    if SOFT_RESET:
        return h - size * v_threshold
    else:
        # The definition's h (1 - fired) + v_reset fired: an infinite h leaves NaN, not v_reset.
        return tl.where(size != 0, h * 0.0 + V_RESET, h)


@triton.jit
def surrogate(distance, alpha):
    scaled = 1.5707963267948966 * alpha * distance
    return 0.5 * alpha / (1.0 + scaled * scaled)


@triton.jit
def spike_derivatives(h, v_threshold, alpha, LEVELS: tl.constexpr, SIGNED: tl.constexpr):
    """ds/dh and ds/dv_threshold by the surrogate, a term a level."""
    by_membrane = tl.zeros_like(h)
    by_threshold = tl.zeros_like(h)
    for k in range(1, LEVELS + 1):
        times = tl.cast(k, tl.float32)
        level = times * v_threshold
        up = surrogate(h - level, alpha)
        by_membrane += up
        by_threshold -= times * up
        if SIGNED:
            down = surrogate(-h - level, alpha)
            by_membrane += down
            by_threshold += times * down
    return by_membrane, by_threshold


@triton.jit
def reset_derivatives(
    h, size, by_membrane, by_threshold, v_threshold, alpha,
    V_RESET: tl.constexpr, SIGNED: tl.constexpr, SOFT_RESET: tl.constexpr, DETACH_RESET: tl.constexpr,
):  # fmt: skip
    """dv/dh and dv/dv_threshold of the membrane that a token leaves behind."""
    if SOFT_RESET:
        through = tl.full(h.shape, 1.0, tl.float32)
        through_threshold = -size
        if not DETACH_RESET:
            through -= v_threshold * by_membrane
            through_threshold -= v_threshold * by_threshold
    else:
        through = tl.where(size != 0, 0.0, 1.0)
        through_threshold = tl.zeros_like(h)
        if not DETACH_RESET:
            # Whether it fires at all is the first step's doing, up or down.
            kept = V_RESET - h
            first = surrogate(h - v_threshold, alpha)
            through += kept * first
            through_threshold -= kept * first
            if SIGNED:
                second = surrogate(-h - v_threshold, alpha)
                through -= kept * second
                through_threshold -= kept * second
    return through, through_threshold
