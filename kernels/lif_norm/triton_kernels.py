# mypy: ignore-errors
"""Device code of `lif_residual_norm`: what both directions share, and forward.

A program holds all channels of one batch row and walks along time, STRETCH tokens at once: their
loads are issued together, the membrane passes through them one after another, and one reduction normalises
them all. The membrane before every stretch is kept; chunks and warm-up are whole stretches. Lanes past the
last channel and tokens past the last one are masked.
"""

import triton
import triton.language as tl

STRETCH = tl.constexpr(4)


@triton.jit
def load_rows(source, row, t, T, c, lane, C: tl.constexpr):
    """STRETCH rows of a (B T, C) matrix from `row`, token t, on: a tuple of float32 vectors."""
    # One address for all rows, which differ by constants: an address each would take the registers.
    first = source + row * C + c
    rows = ()
    for i in tl.static_range(STRETCH):
        here = tl.where(t + i < T, lane, False)
        rows += (tl.load(first + i * C, mask=here, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def load_cuts(reset, row, t, T):
    """Which tokens of a stretch start anew: a tuple of scalars; zeros without `reset`."""
    cuts = ()
    for i in tl.static_range(STRETCH):
        if reset is not None:
            cuts += (tl.load(reset + row + i, mask=t + i < T, other=0) != 0,)
        else:
            cuts += (False,)
    return cuts


@triton.jit
def channel_values(values, value, c, lane):
    """What `values` holds for these channels; without it, the number `value` for all."""
    if values is not None:
        return tl.load(values + c, mask=lane, other=1.0)
    else:
        return value


@triton.jit
def neuron_step(
    current, v, cut, tau, inverse_tau, v_threshold, v_reset, HALVING: tl.constexpr, SOFT_RESET: tl.constexpr
):
    """One token: (charge h - v, membrane h before firing, spike s, membrane after), as in `lif_reference`.

    The order of operations is the reference's. HALVING: tau is a power of two, so that multiplying by its
    inverse rounds as dividing does.
    """
    v = tl.where(cut, 0.0, v)
    if HALVING:
        charge = (current - (v - v_reset)) * inverse_tau
    else:
        charge = tl.div_rn(current - (v - v_reset), tau)
    h = v + charge
    above = h - v_threshold
    if SOFT_RESET:
        fired = above > 0
    else:
        fired = above >= 0
    # A NaN must stay visible: as a spike of 0 it would hide a diverged run.
    s = tl.where(above == above, fired.to(tl.float32), above)
    if SOFT_RESET:
        after = h - s * v_threshold
    else:
        after = h * (1 - s) + v_reset * s
    return charge, h, s, after


@triton.jit
def bits_differ(a, b, lane):
    """Lanes in which two float32 vectors are not the same bit for bit."""
    return lane & (a.to(tl.int32, bitcast=True) != b.to(tl.int32, bitcast=True))


@triton.jit
def any_of(mask):
    return tl.max(mask.to(tl.int32), 0) != 0


@triton.jit
def stack(rows):
    """The rows of a stretch as columns of a tile (LANES). No data moves between threads."""
    tile = tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3]))
    return tl.reshape(tile, [rows[0].shape[0], STRETCH])


@triton.jit
def unstack(tile):
    """The rows of a tile that `stack` made."""
    even, odd = tl.split(tl.reshape(tile, [tile.shape[0], 2, 2]))
    row0, row2 = tl.split(even)
    row1, row3 = tl.split(odd)
    return (row0, row1, row2, row3)


@triton.jit
def store_rows(target, rows, row, t, T, c, lane, C: tl.constexpr):
    """The opposite of `load_rows`, rounded to the target's dtype."""
    first = target + row * C + c
    for i in tl.static_range(STRETCH):
        here = tl.where(t + i < T, lane, False)
        tl.store(first + i * C, rows[i].to(target.dtype.element_ty), mask=here)


@triton.jit
def mixed(x):
    """A bijection of 32-bit integers; `_mixed_int` of reference.py."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_factors(row, c, seed_low, seed_high, drop_below, scale, C: tl.constexpr):
    """A tile for the rows from `row` on: 0 where an element is dropped, `scale` elsewhere.

    `dropout_keep` of reference.py, bit for bit; the integers are the bits of unsigned 32-bit ones.
    """
    # The place in the tensor has 64 bits: its halves are summed apart, as 64-bit tiles fill the registers.
    first = row * C
    first_low = first.to(tl.uint32)
    low = first_low + (c[:, None] + tl.arange(0, STRETCH)[None, :] * C).to(tl.uint32)
    high = (first >> 32).to(tl.uint32) + (low < first_low).to(tl.uint32)
    low_key = mixed(seed_low.to(tl.uint32, bitcast=True))
    high_key = mixed(seed_high.to(tl.uint32, bitcast=True) ^ 0x9E3779B9)
    bits = mixed(low ^ low_key)
    bits = mixed(bits ^ high ^ high_key)
    return tl.where(bits >= drop_below.to(tl.uint32, bitcast=True), scale, 0.0)


@triton.jit
def write_rows(
    rows,  # x + spikes, one vector a token
    x_out,
    normed,
    mean,
    rstd,
    weight,
    bias,
    row,
    t,
    T,
    c,
    lane,
    eps,
    seed_low,
    seed_high,
    drop_below,
    scale,
    DROPOUT: tl.constexpr,
    C: tl.constexpr,
):
    """Store a stretch's rows of x_out, and their LayerNorm with its mean and 1 / standard deviation."""
    tile = stack(rows)
    if DROPOUT:
        tile *= dropout_factors(row, c, seed_low, seed_high, drop_below, scale, C)
    store_rows(x_out, unstack(tile), row, t, T, c, lane, C)
    if weight is not None:
        # Lanes past C may hold spikes: they must not enter the sums.
        inside = lane[:, None]
        means = tl.sum(tl.where(inside, tile, 0.0), 0) / C
        centred = tl.where(inside, tile - means[None, :], 0.0)
        rstds = 1 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
        tokens = tl.arange(0, STRETCH)
        tl.store(mean + row + tokens, means, mask=t + tokens < T)
        tl.store(rstd + row + tokens, rstds, mask=t + tokens < T)
        w = tl.load(weight + c, mask=lane, other=0.0)[:, None]
        b = tl.load(bias + c, mask=lane, other=0.0)[:, None]
        outputs = unstack(centred * rstds[None, :] * w + b)
        store_rows(normed, outputs, row, t, T, c, lane, C)


@triton.jit(do_not_specialize=["T", "chunks", "seed_low", "seed_high", "drop_below"])
def forward_kernel(
    x,  # (B, T, C) float32
    current,  # (B, T, C)
    v_in,  # (B, C) float32, like all that follows
    reset,  # (B, T) uint8, or None
    weight,  # (C,), or None
    bias,
    taus,  # (C,), or None: `tau` for all channels
    v_thresholds,
    x_out,  # (B, T, C)
    normed,  # (B, T, C)
    mean,  # (B, T)
    rstd,
    v_starts,  # (B, ceil(T / STRETCH), C): membrane before every stretch
    v_ends,  # (B, chunks, C): membrane after every chunk
    v_out,  # (B, C)
    T,
    chunks,
    tau,
    inverse_tau,
    v_threshold,
    v_reset,
    eps,
    seed_low,
    seed_high,
    drop_below,
    scale,
    SOFT_RESET: tl.constexpr,
    HALVING: tl.constexpr,
    DROPOUT: tl.constexpr,
    C: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    WARM_UP: tl.constexpr,
):
    """One chunk of one batch row: its neurons started WARM_UP tokens before it from v = 0, its outputs."""
    batch, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    base = batch.to(tl.int64) * T
    c = tl.arange(0, LANES)
    lane = c < C
    tau = channel_values(taus, tau, c, lane)
    v_threshold = channel_values(v_thresholds, v_threshold, c, lane)
    start = chunk * CHUNK
    warm = tl.maximum(start - WARM_UP, 0)
    # The first token's membrane is known: a chunk that reaches back to it starts exactly.
    v = tl.load(v_in + batch.to(tl.int64) * C + c, mask=tl.where(warm == 0, lane, False), other=0.0)
    for t in range(warm, start, STRETCH):
        drive = load_rows(current, base + t, t, T, c, lane, C)
        cuts = load_cuts(reset, base + t, t, T)
        for i in tl.static_range(STRETCH):
            _, _, _, v = neuron_step(
                drive[i], v, cuts[i], tau, inverse_tau, v_threshold, v_reset, HALVING, SOFT_RESET
            )
    groups = tl.cdiv(T, STRETCH)
    for t in range(start, tl.minimum(start + CHUNK, T), STRETCH):
        place = (batch.to(tl.int64) * groups + t // STRETCH) * C
        tl.store(v_starts + place + c, v, mask=lane)
        drive = load_rows(current, base + t, t, T, c, lane, C)
        stream = load_rows(x, base + t, t, T, c, lane, C)
        cuts = load_cuts(reset, base + t, t, T)
        sums = ()
        for i in tl.static_range(STRETCH):
            _, _, s, after = neuron_step(
                drive[i], v, cuts[i], tau, inverse_tau, v_threshold, v_reset, HALVING, SOFT_RESET
            )
            v = tl.where(t + i < T, after, v)
            sums += (stream[i] + s,)
        write_rows(
            sums, x_out, normed, mean, rstd, weight, bias, base + t, t, T, c, lane, eps,
            seed_low, seed_high, drop_below, scale, DROPOUT, C,
        )  # fmt: skip
    tl.store(v_ends + (batch.to(tl.int64) * chunks + chunk) * C + c, v, mask=lane)
    if chunk == chunks - 1:
        tl.store(v_out + batch.to(tl.int64) * C + c, v, mask=lane)


@triton.jit(do_not_specialize=["T", "chunks"])
def boundary_kernel(
    v_starts,
    v_ends,
    suspect,  # (B, chunks) int32
    T,
    chunks,
    C: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Whether a chunk started from another membrane than the one that the chunk before it ended with."""
    batch, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    c = tl.arange(0, LANES)
    lane = tl.where(chunk > 0, c < C, False)
    start = (batch.to(tl.int64) * tl.cdiv(T, STRETCH) + chunk * (CHUNK // STRETCH)) * C
    end = (batch.to(tl.int64) * chunks + chunk - 1) * C
    assumed = tl.load(v_starts + start + c, mask=lane, other=0.0)
    reached = tl.load(v_ends + end + c, mask=lane, other=0.0)
    differs = tl.max(bits_differ(assumed, reached, lane).to(tl.int32), 0)
    tl.store(suspect + batch.to(tl.int64) * chunks + chunk, differs)


@triton.jit(do_not_specialize=["T", "chunks", "seed_low", "seed_high", "drop_below"])
def fix_up_kernel(
    x,
    current,
    reset,
    weight,
    bias,
    taus,
    v_thresholds,
    x_out,
    normed,
    mean,
    rstd,
    v_starts,
    v_ends,
    v_out,
    suspect,
    T,
    chunks,
    tau,
    inverse_tau,
    v_threshold,
    v_reset,
    eps,
    seed_low,
    seed_high,
    drop_below,
    scale,
    SOFT_RESET: tl.constexpr,
    HALVING: tl.constexpr,
    DROPOUT: tl.constexpr,
    C: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BOUNDARIES: tl.constexpr,  # power of two, at least `chunks`
):
    """Walk one batch row's suspect boundaries, and run on from each until the membranes merge bit for bit.

    Arguments as for `forward_kernel`. Two membranes walk side by side: the sequential one, and the one that
    forward had, by which it is known when they are one again and which stretches fired otherwise.
    """
    batch = tl.program_id(0).to(tl.int64)
    base = batch * T
    c = tl.arange(0, LANES)
    lane = c < C
    tau = channel_values(taus, tau, c, lane)
    v_threshold = channel_values(v_thresholds, v_threshold, c, lane)
    groups = tl.cdiv(T, STRETCH)
    boundaries = tl.arange(0, BOUNDARIES)
    flags = tl.load(suspect + batch * chunks + boundaries, mask=boundaries < chunks, other=0)
    chunk = tl.min(tl.where(flags != 0, boundaries, chunks), 0)
    while chunk < chunks:
        v = tl.load(v_ends + (batch * chunks + chunk - 1) * C + c, mask=lane, other=0.0)
        assumed = v
        t = chunk * CHUNK
        walking = True
        while walking:
            place = (batch * groups + t // STRETCH) * C
            if t % CHUNK == 0:
                # Forward took up each chunk anew, so its membrane jumps here.
                tl.store(v_ends + (batch * chunks + t // CHUNK - 1) * C + c, v, mask=lane)
                assumed = tl.load(v_starts + place + c, mask=lane, other=0.0)
            chunk = t // CHUNK
            walking = any_of(bits_differ(v, assumed, lane))
            if walking:
                tl.store(v_starts + place + c, v, mask=lane)
                drive = load_rows(current, base + t, t, T, c, lane, C)
                cuts = load_cuts(reset, base + t, t, T)
                fired = ()
                changed = lane & (c < 0)
                for i in tl.static_range(STRETCH):
                    _, _, s, after = neuron_step(
                        drive[i], v, cuts[i], tau, inverse_tau, v_threshold, v_reset, HALVING, SOFT_RESET
                    )
                    _, _, assumed_s, assumed_after = neuron_step(
                        drive[i],
                        assumed,
                        cuts[i],
                        tau,
                        inverse_tau,
                        v_threshold,
                        v_reset,
                        HALVING,
                        SOFT_RESET,
                    )
                    v = tl.where(t + i < T, after, v)
                    assumed = tl.where(t + i < T, assumed_after, assumed)
                    fired += (s,)
                    changed |= bits_differ(s, assumed_s, lane)
                if any_of(changed):
                    stream = load_rows(x, base + t, t, T, c, lane, C)
                    sums = ()
                    for i in tl.static_range(STRETCH):
                        sums += (stream[i] + fired[i],)
                    write_rows(
                        sums, x_out, normed, mean, rstd, weight, bias, base + t, t, T, c, lane, eps,
                        seed_low, seed_high, drop_below, scale, DROPOUT, C,
                    )  # fmt: skip
                t += STRETCH
                if t >= T:
                    tl.store(v_out + batch * C + c, v, mask=lane)
                    walking = False
        chunk = tl.min(tl.where((flags != 0) & (boundaries > chunk), boundaries, chunks), 0)
