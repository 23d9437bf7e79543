# mypy: ignore-errors
"""WKV in Triton, chunked over time: backward, a scan like the forward one in triton_chunked.py.

    gather    each chunk, forwards in time: its gradients of w, u and the gate, what it says about the tokens
              before it, and the past before every SUB-th token
    carry     along the chunks, backwards: the future after each of them
    reverse   each chunk, backwards in time: its gradients of k and v

dw is differentiated forwards in time (each output's slope in w), so that the future, which goes backwards,
needs no moments; and a sum over later tokens may be gathered in either direction.
"""

import triton
import triton.language as tl

from spikescale.kernels.wkv.triton_token import (
    absorb,
    add_future,
    choose,
    denominator,
    difference,
    empty_future,
    empty_past,
    final_future,
    gated,
    lanes,
    load_keys,
    load_past,
    load_resets,
    load_rows,
    moved,
    older_future,
    read,
    reverse_tokens,
    slope_of_output,
    slope_of_state,
    store_grad_of_state,
    store_past,
)


@triton.jit
def wkv_gather(
    w, u, k, v, gate, reset, starts, state_out, grad_y, grad_state_out,
    marks, summaries, closed, grad_gate, partial,
    T, chunks, k_batch, v_batch, gate_batch, grad_batch, C: tl.constexpr,
    K_TIME: tl.constexpr, V_TIME: tl.constexpr, GATE_TIME: tl.constexpr, GRAD_TIME: tl.constexpr,
    CHUNK: tl.constexpr, SUB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B chunks, channel blocks).

    marks (B, ceil(T / SUB), 4, C): the past before every SUB-th token. summaries (B, chunks, 6, C): the
    future of the token before the chunk as far as this chunk goes, and how far the mean drifts in the chunk.
    closed: as in `wkv_summaries`. partial (B, chunks, 2, C): parts of dw and du.
    """
    program = tl.program_id(0)
    b, chunk = (program // chunks).to(tl.int64), program % chunks
    channels, inside = lanes(tl.program_id(1), C, BLOCK)
    k, v, gate, reset = k + b * k_batch, v + b * v_batch, moved(gate, b * gate_batch), moved(reset, b * T)
    grad_y, grad_gate = grad_y + b * grad_batch, moved(grad_gate, b * T * C)
    w = tl.load(w + channels, mask=inside, other=0.0)
    u = tl.load(u + channels, mask=inside, other=0.0)
    index = b * chunks + chunk
    past = load_past(starts + index * 6 * C, C, channels, inside, True)
    future = empty_future(w)
    drift, grad_w, grad_u = tl.zeros_like(w), tl.zeros_like(w), tl.zeros_like(w)
    emptied = chunk < 0
    first = chunk * CHUNK
    blocks = tl.cdiv(tl.minimum(CHUNK, T - first), SUB)
    marks += (b * tl.cdiv(T, SUB) + first // SUB) * 4 * C
    for block in range(blocks):
        t = first + block * SUB
        keys = load_keys(k, t, T, channels, inside, K_TIME, SUB)
        values = load_rows(v, t, T, channels, inside, V_TIME, 0.0, SUB)
        gates = load_rows(gate, t, T, channels, inside, GATE_TIME, 0.0, SUB)
        grads = load_rows(grad_y, t, T, channels, inside, GRAD_TIME, 0.0, SUB)
        resets = load_resets(reset, t, T, SUB)
        store_past(marks + block * 4 * C, past, C, channels, inside, False)
        for i in tl.static_range(SUB):
            if len(resets) > 0:
                past = choose(resets[i], empty_past(w), past)
                emptied = emptied | resets[i]
            above, low = difference(keys[i], past[2])
            news = values[i] - past[0]
            share, rest, _, inverse, taller = read(past, above, low, w, u)
            step = share * news
            grad, gate_factor = gated(grads[i], gates, i)
            if grad_gate is not None:
                mask = tl.where(t + i < T, inside, False)
                tl.store(
                    grad_gate + tl.cast(t, tl.int64) * C + channels + i * C,
                    gate_factor * (past[0] + step),
                    mask=mask,
                )
            grad_w += grad * slope_of_output(past, share, rest, news)
            grad_u += grad * share * (rest * news)
            # This output, as the token before the chunk sees it.
            high, extra, age = denominator(keys[i], past[2], past[3], u, taller)
            at = (high, extra, age + (block * SUB + i))
            part = grad * inverse
            seen = add_future(future, part, part * (drift + step), 0.0, at, w)
            if len(resets) > 0:
                future = choose(emptied, future, seen)
            else:
                future = seen
            past, share, _ = absorb(past, keys[i], above, low, news, w, t + i < T, True)
            drift = tl.fma(share, news, drift)
    for i in tl.static_range(5):
        tl.store(summaries + (index * 6 + i) * C + channels, future[i], mask=inside)
    tl.store(summaries + (index * 6 + 5) * C + channels, drift, mask=inside)
    if closed is not None:
        tl.store(closed + index, emptied.to(tl.uint8), mask=tl.program_id(1) == 0)
    if grad_state_out is not None:
        there = tl.where(chunk == chunks - 1, inside, False)
        grad_w += slope_of_state(grad_state_out + b * 3 * C, state_out + b * 3 * C, past, C, channels, there)
    tl.store(partial + index * 2 * C + channels, grad_w, mask=inside)
    tl.store(partial + (index * 2 + 1) * C + channels, grad_u, mask=inside)


@triton.jit
def wkv_carry_back(
    w, state_out, grad_state_out, summaries, closed, ends, T, chunks, C: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B, channel blocks). ends (B, chunks, 5, C): the future after every chunk."""
    b = tl.program_id(0).to(tl.int64)
    channels, inside = lanes(tl.program_id(1), C, BLOCK)
    w = tl.load(w + channels, mask=inside, other=0.0)
    grad_state_out = moved(grad_state_out, b * 3 * C)
    future = final_future(grad_state_out, state_out + b * 3 * C, C, channels, inside)
    summaries, ends, closed = (
        summaries + b * chunks * 6 * C,
        ends + b * chunks * 5 * C,
        moved(closed, b * chunks),
    )
    # The last chunk may be short; made this much younger, its future is as old after CHUNK tokens.
    future = older_future(future, T - chunks * CHUNK)
    for done in range(0, chunks, GROUP):
        own = ()
        for i in tl.static_range(GROUP):
            chunk = chunks - 1 - done - i
            there = tl.where(chunk > 0, inside, False)
            rows = ()
            for row in tl.static_range(6):
                rows += (tl.load(summaries + (chunk * 6 + row) * C + channels, mask=there, other=0.0),)
            own += (rows,)
        for i in tl.static_range(GROUP):
            chunk = chunks - 1 - done - i
            there = tl.where(chunk >= 0, inside, False)
            for row in tl.static_range(5):
                tl.store(ends + (chunk * 5 + row) * C + channels, future[row], mask=there)
            s, d, high, extra, age, drift = own[i]
            before = add_future(older_future(future, CHUNK), s, d, drift, (high, extra, age), w)
            if closed is not None:
                emptied = tl.load(closed + chunk, mask=chunk >= 0, other=0) != 0
                before = choose(emptied, (s, d, high, extra, age), before)
            future = before


@triton.jit
def wkv_reverse(
    w, u, k, v, gate, reset, starts, marks, ends, grad_y, grad_k, grad_v, grad_state,
    T, chunks, k_batch, v_batch, gate_batch, grad_batch, C: tl.constexpr,
    K_TIME: tl.constexpr, V_TIME: tl.constexpr, GATE_TIME: tl.constexpr, GRAD_TIME: tl.constexpr,
    CHUNK: tl.constexpr, SUB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B chunks, channel blocks). grad_k, grad_v, and from the first chunk of a sequence grad_state."""
    program = tl.program_id(0)
    b, chunk = (program // chunks).to(tl.int64), program % chunks
    channels, inside = lanes(tl.program_id(1), C, BLOCK)
    k, v, gate, reset = k + b * k_batch, v + b * v_batch, moved(gate, b * gate_batch), moved(reset, b * T)
    grad_y, grad_k, grad_v = grad_y + b * grad_batch, grad_k + b * T * C, grad_v + b * T * C
    w = tl.load(w + channels, mask=inside, other=0.0)
    u = tl.load(u + channels, mask=inside, other=0.0)
    future = ()
    for row in tl.static_range(5):
        future += (tl.load(ends + ((b * chunks + chunk) * 5 + row) * C + channels, mask=inside, other=0.0),)
    first = chunk * CHUNK
    blocks = tl.cdiv(tl.minimum(CHUNK, T - first), SUB)
    # In the last chunk the carry has counted tokens up to CHUNK, this loop counts whole blocks.
    future = older_future(future, CHUNK - blocks * SUB)
    marks += (b * tl.cdiv(T, SUB) + first // SUB) * 4 * C
    for step in range(blocks):
        block = blocks - 1 - step
        t = first + block * SUB
        past = load_past(marks + block * 4 * C, C, channels, inside, False)
        keys = load_keys(k, t, T, channels, inside, K_TIME, SUB)
        values = load_rows(v, t, T, channels, inside, V_TIME, 0.0, SUB)
        gates = load_rows(gate, t, T, channels, inside, GATE_TIME, 0.0, SUB)
        grads = load_rows(grad_y, t, T, channels, inside, GRAD_TIME, 0.0, SUB)
        resets = load_resets(reset, t, T, SUB)
        future, _, _, _ = reverse_tokens(
            past, future, keys, values, grads, gates, resets, w, u, grad_k, grad_v, None,
            t, T, channels, inside, C, False,
        )  # fmt: skip
    if chunk == 0:
        past = load_past(starts + b * chunks * 6 * C, C, channels, inside, False)
        store_grad_of_state(grad_state + b * 3 * C, future, past, w, C, channels, inside)
