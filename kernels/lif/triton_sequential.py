# mypy: ignore-errors
"""Device code of the LIF neuron: one program walks all tokens of a block of channels.

Time is cut into blocks of TOKENS tokens, the unit of everything that is kept: for each channel one 32-bit
word holds the spikes of a block, and one float32 the membrane before it. Inside a block all loads are issued
before the first store, as tuples: the compiler does not move loads across stores, and one at a time their
latency would be the kernel's time. Pointers step from row to row for the same reason that 32 offsets are not
computed ahead: kept in registers, they were most of them.

The membrane is computed with the operations of `reference.py` in their order. Kernels must be launched with
`enable_fp_fusion=False`: a contracted multiply-add rounds once where the reference rounds twice.

Pointers are to contiguous float32 arrays where nothing else is said; those with a token axis have any
floating dtype, and absent arrays are None.
"""

import triton
import triton.language as tl

TOKENS = tl.constexpr(32)


@triton.jit
def forward_kernel(
    x,  # (B, T, C), strides in elements
    v,  # (B, C)
    reset,  # (B, T) bytes
    tau,  # (C,)
    v_threshold,  # (C,)
    spikes,  # (B, T, C)
    v_out,  # (B, C)
    starts,  # (B, blocks, C) membrane before each block
    bits,  # (B, blocks, C) int32, bit i: the block's token i fired
    T,
    C,
    stride_b,
    stride_t,
    stride_c,
    tau_value,  # 1 / tau with INVERSE_TAU
    threshold_value,
    V_RESET: tl.constexpr,
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
    bits = offset(bits, row * blocks * C + c)
    reset = offset(reset, row * T)
    membrane = tl.load(v + row * C + c, mask=lane, other=0.0)
    for block in range(0, blocks):
        membrane = forward_block(
            membrane, x, reset, spikes, starts, bits, block, T, C, stride_t, tau, v_threshold, lane,
            V_RESET, SOFT_RESET, INVERSE_TAU, WHOLE,
        )  # fmt: skip
    tl.store(v_out + row * C + c, membrane, mask=lane)


@triton.jit
def backward_kernel(
    x,
    reset,
    tau,
    v_threshold,
    starts,
    bits,
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
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    INVERSE_TAU: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, c, lane = place(C, BLOCK_C)
    tau = per_channel(tau, tau_value, c, lane)
    v_threshold = per_channel(v_threshold, threshold_value, c, lane)
    x += row * stride_b + c.to(tl.int64) * stride_c
    grad_spikes += row * grad_stride_b + c.to(tl.int64) * grad_stride_c
    grad_x += row * T * C + c
    blocks = tl.cdiv(T, TOKENS)
    starts += row * blocks * C + c
    bits += row * blocks * C + c
    reset = offset(reset, row * T)
    grad = tl.zeros([BLOCK_C], tl.float32)
    if grad_v_out is not None:
        grad = tl.load(grad_v_out + row * C + c, mask=lane, other=0.0)
    grad, sum_tau, sum_threshold = backward_blocks(
        grad, x, reset, starts, bits, grad_spikes, grad_x, 0, blocks, T, C, stride_t, grad_stride_t,
        tau, v_threshold, alpha, lane, V_RESET, SOFT_RESET, DETACH_RESET, INVERSE_TAU, WHOLE,
        grad_tau is not None, grad_threshold is not None,
    )  # fmt: skip
    tl.store(grad_v + row * C + c, grad, mask=lane)
    if grad_tau is not None:
        tl.store(grad_tau + row * C + c, sum_tau, mask=lane)
    if grad_threshold is not None:
        tl.store(grad_threshold + row * C + c, sum_threshold, mask=lane)


@triton.jit
def place(C, BLOCK_C: tl.constexpr):
    """Batch row (int64) and channels of this program, and which of the channels exist."""
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (program // blocks).to(tl.int64), c, c < C


@triton.jit
def per_channel(values, value, c, lane):
    """`values` of these channels, or `value` for all of them."""
    if values is not None:
        return tl.load(values + c, mask=lane, other=1.0)
    else:
        return tl.zeros_like(c).to(tl.float32) + value


@triton.jit
def offset(pointer, by):
    if pointer is not None:
        return pointer + by
    else:
        return None


@triton.jit
def load_rows(pointers, block, T, stride, lane, WHOLE: tl.constexpr, N: tl.constexpr = TOKENS):
    """The N tokens of a block as a tuple of float32 vectors, 0 past the end."""
    pointers += tl.cast(block, tl.int64) * N * stride
    left = T - block * N
    rows = ()
    for i in tl.static_range(N):
        mask = lane
        if not WHOLE:
            mask = tl.where(left > i, lane, False)
        rows += (tl.load(pointers, mask=mask, other=0.0).to(tl.float32),)
        pointers += stride
    return rows


@triton.jit
def load_resets(reset, block, T, N: tl.constexpr = TOKENS):
    """A scalar whose bit i says that the block's token i finds an empty membrane; 0 without `reset`."""
    if reset is not None:
        i = tl.arange(0, N)
        flags = tl.load(reset + block * N + i, mask=T - block * N > i, other=0)
        return tl.sum((flags != 0).to(tl.int32) << i, 0)
    else:
        return 0


@triton.jit
def over_tau(drive, tau, INVERSE_TAU: tl.constexpr):
    """drive / tau, correctly rounded; `tau` is 1 / tau with INVERSE_TAU, where that is a power of two."""
    if INVERSE_TAU:
        return drive * tau
    else:
        return tl.div_rn(drive, tau)


@triton.jit
def after_firing(h, fired, v_threshold, V_RESET: tl.constexpr, SOFT_RESET: tl.constexpr):
    if SOFT_RESET:
        return tl.where(fired, h - v_threshold, h)
    else:
        # The reference's h (1 - s) + v_reset s with s = 1: an infinite h leaves NaN, not v_reset.
        return tl.where(fired, h * 0.0 + V_RESET, h)


@triton.jit
def forward_block(
    membrane, x, reset, spikes, starts, bits, block, T, C, stride_t, tau, v_threshold, lane,
    V_RESET: tl.constexpr, SOFT_RESET: tl.constexpr, INVERSE_TAU: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The membrane after a block's last token. Stores what is not None of spikes, starts and bits."""
    currents = load_rows(x, block, T, stride_t, lane, WHOLE)
    resets = load_resets(reset, block, T)
    if starts is not None:
        tl.store(starts + tl.cast(block, tl.int64) * C, membrane, mask=lane)
    if spikes is not None:
        spikes += tl.cast(block, tl.int64) * TOKENS * C
    left = T - block * TOKENS
    word = tl.zeros_like(lane.to(tl.int32))
    last = membrane
    for i in tl.static_range(TOKENS):
        if reset is not None:
            membrane = tl.where(bit(resets, i), 0.0, membrane)
        h = membrane + over_tau(currents[i] - (membrane - V_RESET), tau, INVERSE_TAU)
        above = h - v_threshold
        if SOFT_RESET:
            fired = above > 0
        else:
            fired = above >= 0
        membrane = after_firing(h, fired, v_threshold, V_RESET, SOFT_RESET)
        inside = lane
        if not WHOLE:
            inside = tl.where(left > i, lane, False)
            last = tl.where(inside, membrane, last)
        if spikes is not None:
            spike = tl.where(above == above, fired.to(tl.float32), above)
            tl.store(spikes, spike.to(spikes.dtype.element_ty), mask=inside)
            spikes += C
        if bits is not None:
            word |= (fired & inside).to(tl.int32) << i
    if bits is not None:
        tl.store(bits + tl.cast(block, tl.int64) * C, word, mask=lane)
    if WHOLE:
        last = membrane
    return last


@triton.jit
def recompute_block(
    membrane, currents, reset, resets, word, tau, v_threshold,
    V_RESET: tl.constexpr, SOFT_RESET: tl.constexpr, INVERSE_TAU: tl.constexpr,
):  # fmt: skip
    """h of a block's tokens and the share of x in it, as tuples: forward again, firing as `word` says."""
    membranes = ()
    charges = ()
    for i in tl.static_range(TOKENS):
        if reset is not None:
            membrane = tl.where(bit(resets, i), 0.0, membrane)
        charge = over_tau(currents[i] - (membrane - V_RESET), tau, INVERSE_TAU)
        h = membrane + charge
        membrane = after_firing(h, bit(word, i), v_threshold, V_RESET, SOFT_RESET)
        membranes += (h,)
        charges += (charge,)
    return membranes, charges


@triton.jit
def bit(word, i: tl.constexpr):
    return ((word >> i) & 1) != 0


@triton.jit
def derivatives(
    h, fired, v_threshold, alpha, V_RESET: tl.constexpr, SOFT_RESET: tl.constexpr, DETACH_RESET: tl.constexpr
):
    """ds/dh by the surrogate, and dv/dh."""
    scaled = 1.5707963267948966 * alpha * (h - v_threshold)
    surrogate = 0.5 * alpha / (1.0 + scaled * scaled)
    if SOFT_RESET:
        through = tl.full(h.shape, 1.0, tl.float32)
        if not DETACH_RESET:
            through = 1.0 - v_threshold * surrogate
    else:
        through = tl.where(fired, 0.0, 1.0)
        if not DETACH_RESET:
            through += (V_RESET - h) * surrogate
    return surrogate, through


@triton.jit
def backward_blocks(
    grad, x, reset, starts, bits, grad_spikes, grad_x, first, stop, T, C, stride_t, grad_stride_t,
    tau, v_threshold, alpha, lane,
    V_RESET: tl.constexpr, SOFT_RESET: tl.constexpr, DETACH_RESET: tl.constexpr, INVERSE_TAU: tl.constexpr,
    WHOLE: tl.constexpr, TAU_GRAD: tl.constexpr, THRESHOLD_GRAD: tl.constexpr,
):  # fmt: skip
    """Walks the blocks from `stop` back to `first`, storing grad_x; `grad` is the gradient of the membrane.

    Returns the gradient of the membrane before `first`, and what these tokens add to those of tau and
    v_threshold.
    """
    inverse_tau = tau if INVERSE_TAU else 1.0 / tau
    sum_tau = tl.zeros_like(grad)
    sum_threshold = tl.zeros_like(grad)
    for back in range(0, stop - first):
        block = stop - 1 - back
        place = tl.cast(block, tl.int64) * C
        left = T - block * TOKENS
        currents = load_rows(x, block, T, stride_t, lane, WHOLE)
        grads = load_rows(grad_spikes, block, T, grad_stride_t, lane, WHOLE)
        resets = load_resets(reset, block, T)
        word = tl.load(bits + place, mask=lane, other=0)
        membrane = tl.load(starts + place, mask=lane, other=0.0)
        membranes, charges = recompute_block(
            membrane, currents, reset, resets, word, tau, v_threshold, V_RESET, SOFT_RESET, INVERSE_TAU
        )
        out = grad_x + place * TOKENS + (TOKENS - 1) * C
        for i in tl.static_range(TOKENS - 1, -1, -1):
            h = membranes[i]
            fired = bit(word, i)
            surrogate, through = derivatives(h, fired, v_threshold, alpha, V_RESET, SOFT_RESET, DETACH_RESET)
            inside = lane
            if not WHOLE:
                inside = tl.where(left > i, lane, False)
            grad_h = grads[i] * surrogate + grad * through
            grad_current = grad_h * inverse_tau
            tl.store(out, grad_current.to(grad_x.dtype.element_ty), mask=inside)
            out -= C
            if TAU_GRAD:
                sum_tau -= tl.where(inside, grad_current * charges[i], 0.0)
            if THRESHOLD_GRAD:
                # The surrogate's part of -grad_h; a soft reset subtracts the threshold itself besides.
                rate = grads[i] * surrogate
                if SOFT_RESET:
                    rate += tl.where(fired, grad, 0.0)
                    if not DETACH_RESET:
                        rate -= grad * (v_threshold * surrogate)
                elif not DETACH_RESET:
                    rate += grad * ((V_RESET - h) * surrogate)
                sum_threshold -= tl.where(inside, rate, 0.0)
            before = grad_h - grad_current
            if reset is not None:
                before = tl.where(bit(resets, i), 0.0, before)
            if WHOLE:
                grad = before
            else:
                grad = tl.where(inside, before, grad)
    return grad, sum_tau, sum_threshold
