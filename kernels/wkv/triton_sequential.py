# mypy: ignore-errors
"""WKV in Triton, sequential: one program takes a block of channels of one sequence through all tokens.

It moves the fewest bytes and needs no second pass, but has only batch x channel blocks programs.
Forward can leave `marks` (B, ceil(T / SUB), 6, C), the past before every SUB-th token, with which backward
recomputes a block of tokens in registers before it goes through it in reverse.
"""

import triton
import triton.language as tl

from spikescale.kernels.wkv.triton_token import (
    add_exactly,
    empty_past,
    final_future,
    forward_tokens,
    lanes,
    load_keys,
    load_past,
    load_resets,
    load_rows,
    load_state,
    moved,
    older_future,
    older_past,
    reverse_tokens,
    slope_of_state,
    store_grad_of_state,
    store_past,
    store_state,
)


@triton.jit
def wkv_sequential_forward(
    w, u, k, v, gate, state, reset, y, state_out, marks,
    T, k_batch, v_batch, gate_batch, C: tl.constexpr,
    K_TIME: tl.constexpr, V_TIME: tl.constexpr, GATE_TIME: tl.constexpr,
    SUB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B, channel blocks). y and state_out, and marks unless None."""
    b = tl.program_id(0).to(tl.int64)
    channels, inside = lanes(tl.program_id(1), C, BLOCK)
    k, v, gate, reset = k + b * k_batch, v + b * v_batch, moved(gate, b * gate_batch), moved(reset, b * T)
    w = tl.load(w + channels, mask=inside, other=0.0)
    u = tl.load(u + channels, mask=inside, other=0.0)
    past = load_state(state + b * 3 * C, C, channels, inside)
    blocks = tl.cdiv(T, SUB)
    for block in range(blocks):
        t = block * SUB
        keys = load_keys(k, t, T, channels, inside, K_TIME, SUB)
        values = load_rows(v, t, T, channels, inside, V_TIME, 0.0, SUB)
        gates = load_rows(gate, t, T, channels, inside, GATE_TIME, 0.0, SUB)
        resets = load_resets(reset, t, T, SUB)
        if marks is not None:
            store_past(marks + (b * blocks + block) * 6 * C, past, C, channels, inside, True)
        past = forward_tokens(
            past, keys, values, gates, resets, w, u, y + b * T * C, t, T, channels, inside, C,
            marks is not None,
        )  # fmt: skip
    past = older_past(past, T - blocks * SUB)
    store_state(state_out + b * 3 * C, past, w, C, channels, inside)


@triton.jit
def wkv_sequential_backward(
    w, u, k, v, gate, reset, marks, state_out, grad_y, grad_state_out,
    grad_k, grad_v, grad_gate, grad_state, partial,
    T, k_batch, v_batch, gate_batch, grad_batch, C: tl.constexpr,
    K_TIME: tl.constexpr, V_TIME: tl.constexpr, GATE_TIME: tl.constexpr, GRAD_TIME: tl.constexpr,
    SUB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B, channel blocks). All gradients; `partial` (B, 1, 2, C) holds each sequence's dw and du."""
    b = tl.program_id(0).to(tl.int64)
    channels, inside = lanes(tl.program_id(1), C, BLOCK)
    k, v, gate, reset = k + b * k_batch, v + b * v_batch, moved(gate, b * gate_batch), moved(reset, b * T)
    grad_y, grad_state_out = grad_y + b * grad_batch, moved(grad_state_out, b * 3 * C)
    grad_k, grad_v, grad_gate = grad_k + b * T * C, grad_v + b * T * C, moved(grad_gate, b * T * C)
    state_out += b * 3 * C
    w = tl.load(w + channels, mask=inside, other=0.0)
    u = tl.load(u + channels, mask=inside, other=0.0)
    blocks = tl.cdiv(T, SUB)
    padding = blocks * SUB - T
    future = older_future(final_future(grad_state_out, state_out, C, channels, inside), -padding)
    past = empty_past(w)
    sum_w, lost_w = tl.zeros_like(w), tl.zeros_like(w)
    sum_u, lost_u = tl.zeros_like(w), tl.zeros_like(w)
    for step in range(blocks):
        block = blocks - 1 - step
        t = block * SUB
        keys = load_keys(k, t, T, channels, inside, K_TIME, SUB)
        values = load_rows(v, t, T, channels, inside, V_TIME, 0.0, SUB)
        gates = load_rows(gate, t, T, channels, inside, GATE_TIME, 0.0, SUB)
        grads = load_rows(grad_y, t, T, channels, inside, GRAD_TIME, 0.0, SUB)
        resets = load_resets(reset, t, T, SUB)
        past = load_past(marks + (b * blocks + block) * 6 * C, C, channels, inside, True)
        future, end, grad_w, grad_u = reverse_tokens(
            past, future, keys, values, grads, gates, resets, w, u, grad_k, grad_v, grad_gate,
            t, T, channels, inside, C, True,
        )  # fmt: skip
        if grad_state_out is not None:
            part = slope_of_state(grad_state_out, state_out, end, C, channels, inside)
            grad_w += tl.where(step == 0, part, 0.0)
        sum_w, lost_w = add_exactly(sum_w, lost_w, grad_w)
        sum_u, lost_u = add_exactly(sum_u, lost_u, grad_u)
    store_grad_of_state(grad_state + b * 3 * C, future, past, w, C, channels, inside)
    tl.store(partial + b * 2 * C + channels, sum_w, mask=inside)
    tl.store(partial + (b * 2 + 1) * C + channels, sum_u, mask=inside)
