# mypy: ignore-errors
"""Device code of `lif_residual_norm`: backward, in three launches.

The membrane's gradient runs backward in time, gv[t-1] = (gs[t] f[t] + gv[t] c[t]) (1 - 1/tau), and is affine
in its last value. `rows_kernel` (all channels, a chunk a program) turns the outputs' gradients into that of
x, which is also the spikes', and sums up its chunk's recurrence as gain and offset; `carry_kernel` joins the
chunks; `neuron_kernel` (a chunk and a block of channels a program) runs each chunk from its true end.
Membranes are recomputed by the operations of forward from those that it kept.
"""

import triton
import triton.language as tl

from spikescale.kernels.lif_norm.triton_kernels import (
    STRETCH,
    channel_values,
    dropout_factors,
    load_cuts,
    load_rows,
    neuron_step,
    stack,
    store_rows,
    unstack,
)


@triton.jit
def step_gradient(h, s, v_threshold, v_reset, alpha, SOFT_RESET: tl.constexpr, DETACH_RESET: tl.constexpr):
    """One token's derivatives: surrogate f = ds/dh, direct dv/ds, and whole dv/dh (v after firing)."""
    slope = 1.5707963267948966 * alpha * (h - v_threshold)
    f = (alpha / 2) / (1 + slope * slope)
    if SOFT_RESET:
        by_spike = 0 * h - v_threshold
        through = 0 * h + 1
    else:
        by_spike = v_reset - h
        through = 1 - s
    if not DETACH_RESET:
        through += f * by_spike
    return f, by_spike, through


@triton.jit(do_not_specialize=["T", "chunks", "seed_low", "seed_high", "drop_below"])
def rows_kernel(
    current,
    reset,
    x_out,
    weight,
    taus,
    v_thresholds,
    v_starts,
    mean,
    rstd,
    grad_x_out,  # (B, T, C) float32, or None
    grad_normed,  # likewise
    grad_x,  # (B, T, C) float32
    gains,  # (B, chunks, C) float32
    offsets,
    grad_weights,  # (B, chunks, C) float32: each chunk's share; None without `grad_normed`
    grad_biases,
    T,
    chunks,
    tau,
    inverse_tau,
    v_threshold,
    v_reset,
    alpha,
    seed_low,
    seed_high,
    drop_below,
    scale,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    HALVING: tl.constexpr,
    DROPOUT: tl.constexpr,
    C: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one batch row: grad_x, and gain and offset of gv[before it] = gain gv[after it] + offset.

    The tokens' affine maps are composed in the order of time, in which the membrane runs too.
    """
    batch, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    base = batch * T
    c = tl.arange(0, LANES)
    lane = c < C
    start = chunk * CHUNK
    place = (batch * tl.cdiv(T, STRETCH) + start // STRETCH) * C
    v = tl.load(v_starts + place + c, mask=lane, other=0.0)
    gain = tl.full([LANES], 1.0, dtype=tl.float32)
    offset = tl.zeros([LANES], dtype=tl.float32)
    grad_w = tl.zeros([LANES], dtype=tl.float32)
    grad_b = tl.zeros([LANES], dtype=tl.float32)
    for t in range(start, tl.minimum(start + CHUNK, T), STRETCH):
        row = base + t
        if grad_normed is not None:
            tokens = tl.arange(0, STRETCH)
            means = tl.load(mean + row + tokens, mask=t + tokens < T, other=0.0)[None, :]
            rstds = tl.load(rstd + row + tokens, mask=t + tokens < T, other=0.0)[None, :]
            w = tl.load(weight + c, mask=lane, other=0.0)[:, None]
            grad_out = stack(load_rows(grad_normed, row, t, T, c, lane, C))
            outputs = stack(load_rows(x_out, row, t, T, c, lane, C))
            x_hat = tl.where(lane[:, None], (outputs - means) * rstds, 0.0)
            grad_w += tl.sum(grad_out * x_hat, 1)
            grad_b += tl.sum(grad_out, 1)
            scaled = grad_out * w
            along = tl.sum(scaled * x_hat, 0) / C
            shared = tl.sum(scaled, 0) / C
            tile = (scaled - x_hat * along[None, :] - shared[None, :]) * rstds
            if grad_x_out is not None:
                tile += stack(load_rows(grad_x_out, row, t, T, c, lane, C))
        elif grad_x_out is not None:
            tile = stack(load_rows(grad_x_out, row, t, T, c, lane, C))
        else:
            tile = tl.zeros([LANES, STRETCH], dtype=tl.float32)
        if DROPOUT:
            tile *= dropout_factors(row, c, seed_low, seed_high, drop_below, scale, C)
        grads = unstack(tile)
        store_rows(grad_x, grads, row, t, T, c, lane, C)
        # Loaded anew for every stretch: registers are short while the rows above are held.
        tau_here = channel_values(taus, tau, c, lane)
        threshold = channel_values(v_thresholds, v_threshold, c, lane)
        if taus is not None:
            inverse = 1 / tau_here
        else:
            inverse = inverse_tau
        drive = load_rows(current, row, t, T, c, lane, C)
        cuts = load_cuts(reset, row, t, T)
        for i in tl.static_range(STRETCH):
            _, h, s, v = neuron_step(
                drive[i], v, cuts[i], tau_here, inverse, threshold, v_reset, HALVING, SOFT_RESET
            )
            f, _, through = step_gradient(h, s, threshold, v_reset, alpha, SOFT_RESET, DETACH_RESET)
            own, passed = grads[i] * f, gain * through
            here = tl.where(t + i < T, lane, False)
            # Where nothing enters, a gain that overflowed has nothing to multiply.
            entering = tl.where(own == 0, 0.0, gain * (own - own * inverse))
            offset = tl.where(tl.where(cuts[i], False, here), offset + entering, offset)
            gain = tl.where(here, tl.where(cuts[i], 0.0, passed - passed * inverse), gain)
    share = (batch * chunks + chunk) * C + c
    tl.store(gains + share, gain, mask=lane)
    tl.store(offsets + share, offset, mask=lane)
    if grad_normed is not None:
        tl.store(grad_weights + share, grad_w, mask=lane)
        tl.store(grad_biases + share, grad_b, mask=lane)


@triton.jit(do_not_specialize=["chunks"])
def carry_kernel(
    gains,
    offsets,
    grad_v_out,  # (B, C) float32, or None
    carries,  # (B, chunks, C) float32: gradient of the membrane after each chunk
    grad_v_in,  # (B, C) float32
    chunks,
    C: tl.constexpr,
    LANES: tl.constexpr,
    AT_ONCE: tl.constexpr = 8,
):
    """One batch row and block of channels, from the last chunk to the first."""
    blocks = tl.cdiv(C, LANES)
    batch = tl.program_id(0).to(tl.int64) // blocks
    c = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    lane = c < C
    if grad_v_out is not None:
        grad_v = tl.load(grad_v_out + batch * C + c, mask=lane, other=0.0)
    else:
        grad_v = tl.zeros([LANES], dtype=tl.float32)
    # Several chunks at once, so that their loads do not wait for each other's stores.
    for last in range(chunks - 1, -1, -AT_ONCE):
        gain, offset = (), ()
        for i in tl.static_range(AT_ONCE):
            here = tl.where(last - i >= 0, lane, False)
            place = (batch * chunks + last - i) * C + c
            gain += (tl.load(gains + place, mask=here, other=1.0),)
            offset += (tl.load(offsets + place, mask=here, other=0.0),)
        for i in tl.static_range(AT_ONCE):
            here = tl.where(last - i >= 0, lane, False)
            tl.store(carries + (batch * chunks + last - i) * C + c, grad_v, mask=here)
            joined = tl.where(grad_v == 0, offset[i], offset[i] + gain[i] * grad_v)
            grad_v = tl.where(here, joined, grad_v)
    tl.store(grad_v_in + batch * C + c, grad_v, mask=lane)


@triton.jit(do_not_specialize=["T", "chunks"])
def neuron_kernel(
    current,
    reset,
    taus,
    v_thresholds,
    v_starts,
    carries,
    grad_x,  # what `rows_kernel` stored: the gradient of the spikes
    grad_current,  # (B, T, C) in current's dtype
    grad_taus,  # (B, chunks, C) float32: each chunk's share; None: not wanted
    grad_thresholds,
    T,
    chunks,
    tau,
    inverse_tau,
    v_threshold,
    v_reset,
    alpha,
    SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr,
    HALVING: tl.constexpr,
    C: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one batch row and block of channels, its last stretch first."""
    blocks = tl.cdiv(C, LANES)
    program = tl.program_id(0) // blocks
    batch, chunk = program.to(tl.int64) // chunks, program % chunks
    base = batch * T
    c = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    lane = c < C
    tau = channel_values(taus, tau, c, lane)
    if taus is not None:
        inverse_tau = 1 / tau
    v_threshold = channel_values(v_thresholds, v_threshold, c, lane)
    start = chunk * CHUNK
    stretches = tl.cdiv(tl.minimum(CHUNK, T - start), STRETCH)
    share = (batch * chunks + chunk) * C + c
    grad_v = tl.load(carries + share, mask=lane, other=0.0)
    grad_tau = tl.zeros([LANES], dtype=tl.float32)
    grad_threshold = tl.zeros([LANES], dtype=tl.float32)
    for stretch in range(0, stretches):
        t = start + (stretches - 1 - stretch) * STRETCH
        row = base + t
        drive = load_rows(current, row, t, T, c, lane, C)
        spike_gradients = load_rows(grad_x, row, t, T, c, lane, C)
        cuts = load_cuts(reset, row, t, T)
        place = (batch * tl.cdiv(T, STRETCH) + t // STRETCH) * C
        v = tl.load(v_starts + place + c, mask=lane, other=0.0)
        charges, hs, spikes = (), (), ()
        for i in tl.static_range(STRETCH):
            charge, h, s, v = neuron_step(
                drive[i], v, cuts[i], tau, inverse_tau, v_threshold, v_reset, HALVING, SOFT_RESET
            )
            charges += (charge,)
            hs += (h,)
            spikes += (s,)
        reversed_gradients = ()
        for i in tl.static_range(STRETCH):
            here = tl.where(t + (STRETCH - 1 - i) < T, lane, False)
            h, s, grad_s = hs[STRETCH - 1 - i], spikes[STRETCH - 1 - i], spike_gradients[STRETCH - 1 - i]
            f, by_spike, through = step_gradient(h, s, v_threshold, v_reset, alpha, SOFT_RESET, DETACH_RESET)
            grad_h = grad_s * f + grad_v * through
            grad_drive = grad_h * inverse_tau
            reversed_gradients += (grad_drive,)
            if grad_taus is not None:
                grad_tau -= tl.where(here, grad_drive * charges[STRETCH - 1 - i], 0.0)
            if grad_thresholds is not None:
                by_threshold = grad_s * f
                if not DETACH_RESET:
                    by_threshold += grad_v * by_spike * f
                if SOFT_RESET:
                    by_threshold += grad_v * s
                grad_threshold -= tl.where(here, by_threshold, 0.0)
            before = tl.where(cuts[STRETCH - 1 - i], 0.0, grad_h - grad_drive)
            grad_v = tl.where(here, before, grad_v)
        gradients = ()
        for i in tl.static_range(STRETCH):
            gradients += (reversed_gradients[STRETCH - 1 - i],)
        store_rows(grad_current, gradients, row, t, T, c, lane, C)
    if grad_taus is not None:
        tl.store(grad_taus + share, grad_tau, mask=lane)
    if grad_thresholds is not None:
        tl.store(grad_thresholds + share, grad_threshold, mask=lane)
