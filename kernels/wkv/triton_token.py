# mypy: ignore-errors
"""What both Triton forms of WKV are made of: the recurrence of README.md on one block of channels.

Device functions only. A lane holds one channel; every value is float32. Two tuples go through time:

    past    (mean, weight, base, age, slope, mean_age): the sums over the tokens so far. Their weights add
            up to weight e^(base + age w), and mean is the average of the values under them; slope is
            d mean / dw, and mean_age is d log(sum of weights) / dw, the average age under the same weights.
    future  (s, d, high, extra, age): what the tokens from here on say about those before: S and D of
            README.md, both times e^(high + extra - age w).

base and high are keys exactly, and ages are whole numbers: no exponent is ever rounded on its way through
time, so neither a constant offset of the keys nor the number of tokens costs accuracy.
"""

import triton
import triton.language as tl

EMPTY = tl.constexpr(-1e38)  # exponent of a sum that has seen nothing
LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


@triton.jit
def lanes(block, C: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of a program, and which of its lanes have one."""
    channels = block * BLOCK + tl.arange(0, BLOCK)
    inside = channels < C
    if C % BLOCK == 0:
        inside = channels >= 0
    return channels, inside


@triton.jit
def load_rows(
    rows, t, length, channels, inside, STRIDE: tl.constexpr, OTHER: tl.constexpr, COUNT: tl.constexpr
):
    """Tokens t .. t + COUNT - 1 of a (T, C) array as a tuple of float32 rows, OTHER past the end; () of None.

    All loads of a block of tokens are made before its stores: behind a store they would have to wait for it.
    """
    loaded = ()
    if rows is not None:
        first = rows + tl.cast(t, tl.int64) * STRIDE + channels
        for i in tl.static_range(COUNT):
            mask = tl.where(t + i < length, inside, False)
            loaded += (tl.load(first + i * STRIDE, mask=mask, other=OTHER).to(tl.float32),)
    return loaded


@triton.jit
def load_keys(rows, t, length, channels, inside, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """Keys of COUNT tokens. One past the end weighs nothing: it only makes the past a token older.

    A key of +inf has no defined weight; as a NaN it cannot pass unseen.
    """
    loaded = load_rows(rows, t, length, channels, inside, STRIDE, float("-inf"), COUNT)
    keys = ()
    for i in tl.static_range(COUNT):
        key = tl.where(loaded[i] < -LARGEST, -LARGEST, loaded[i])
        keys += (tl.where(key > LARGEST, float("nan"), key),)
    return keys


@triton.jit
def load_resets(reset, t, length, COUNT: tl.constexpr):
    """Whether each of COUNT tokens empties the state before it; () without resets."""
    resets = ()
    if reset is not None:
        for i in tl.static_range(COUNT):
            resets += (tl.load(reset + t + i, mask=t + i < length, other=0) != 0,)
    return resets


@triton.jit
def load_state(state, C, channels, inside):
    """The past that a state (3, C) of rows a, b, m stands for."""
    a = tl.load(state + channels, mask=inside, other=0.0)
    b = tl.load(state + C + channels, mask=inside, other=0.0)
    m = tl.load(state + 2 * C + channels, mask=inside, other=0.0)
    none = tl.zeros_like(a)
    return tl.where(b == 0.0, 0.0, a / b), b, m, none, none, none


@triton.jit
def store_state(state, past, w, C, channels, inside):
    """The past as a state: its exponent is rounded once, here, and the rounding made good in a and b."""
    mean, weight, base, age, _, _ = past
    m = tl.fma(age, w, base)
    apart, low = difference(base, m)
    b = weight * exp(tl.fma(age, w, apart) + low)
    tl.store(state + channels, mean * b, mask=inside)
    tl.store(state + C + channels, b, mask=inside)
    tl.store(state + 2 * C + channels, m, mask=inside)


@triton.jit
def load_past(rows, C, channels, inside, SLOPE: tl.constexpr):
    """A past stored as rows of C: four of them, six with SLOPE."""
    mean = tl.load(rows + channels, mask=inside, other=0.0)
    weight = tl.load(rows + C + channels, mask=inside, other=0.0)
    base = tl.load(rows + 2 * C + channels, mask=inside, other=0.0)
    age = tl.load(rows + 3 * C + channels, mask=inside, other=0.0)
    if SLOPE:
        slope = tl.load(rows + 4 * C + channels, mask=inside, other=0.0)
        mean_age = tl.load(rows + 5 * C + channels, mask=inside, other=0.0)
    else:
        slope, mean_age = tl.zeros_like(mean), tl.zeros_like(mean)
    return mean, weight, base, age, slope, mean_age


@triton.jit
def store_past(rows, past, C, channels, inside, SLOPE: tl.constexpr):
    for i in tl.static_range(6 if SLOPE else 4):
        tl.store(rows + i * C + channels, past[i], mask=inside)


@triton.jit
def empty_past(like):
    none = tl.zeros_like(like)
    return none, none, none + EMPTY, none, none, none


@triton.jit
def empty_future(like):
    none = tl.zeros_like(like)
    return none, none, none - EMPTY, none, none


@triton.jit
def moved(pointer, offset):
    """pointer + offset; None stays None."""
    if pointer is not None:
        pointer += offset
    return pointer


@triton.jit
def choose(condition, one, other):
    """The tuple `one` where the condition holds, else `other`."""
    chosen = ()
    for i in tl.static_range(len(one)):
        chosen += (tl.where(condition, one[i], other[i]),)
    return chosen


@triton.jit
def difference(a, b):
    """a - b, and what its rounding lost (Knuth's two-sum)."""
    rounded = a - b
    back = rounded - a
    return rounded, (a - (rounded - back)) - (b + back)


@triton.jit
def add_exactly(total, lost, part):
    """A running sum with one more part, and what its rounding has lost (Kahan)."""
    part -= lost
    wider = total + part
    return wider, (wider - total) - part


@triton.jit
def exp(x):
    """e^x for x <= 0, as GPUs have it: one multiplication and one instruction, what underflows is 0.

    `tl.exp` takes three more for subnormal results, which no sum here could feel.
    """
    return tl.exp2(x * LOG2_E)


@triton.jit
def reciprocal(x):
    """1 / x for x >= 0 to about 2^-22, in two instructions; a division takes eight."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def shares(lead, now, past):
    """Two weights, now e^lead and past: the share of each in their sum, the sum relative to the taller
    exponent, its inverse, and whether `now` has the taller one.

    1 - share would not give the other share accurately when it is small.
    """
    smaller = exp(-tl.abs(lead))
    taller = lead > 0.0
    now = tl.where(taller, now, smaller * now)
    past = tl.where(taller, smaller * past, past)
    total = now + past
    inverse = reciprocal(total)
    return now * inverse, past * inverse, total, inverse, taller


@triton.jit
def read(past, above, low, w, u):
    """The output's denominator: see `shares`, of the current token, with its bonus, and the past."""
    return shares(tl.fma(-past[3], w, above) + (u + low), 1.0, past[1])


@triton.jit
def absorb(past, key, above, low, news, w, here, SLOPE: tl.constexpr):
    """The past with one more token, and the shares of that token and of the older ones in it.

    `above` and `low` are key - base as `difference` gives it, `news` the value less the mean. slope is the
    covariance of value and age under the weights, and is updated as such (Welford): nothing cancels. `here`
    is false for padding past the end, which must leave mean_age alone: it may be far below 1.
    """
    mean, weight, base, age, slope, mean_age = past
    older = age + 1.0
    share, rest, total, _, taller = shares(tl.fma(-older, w, above) + low, 1.0, weight)
    if SLOPE:
        mean_age += tl.where(here, 1.0, 0.0)
        slope = rest * (slope - share * mean_age * news)
        mean_age = rest * mean_age
    base, age = tl.where(taller, key, base), tl.where(taller, 0.0, older)
    return (tl.fma(share, news, mean), total, base, age, slope, mean_age), share, rest


@triton.jit
def sigmoid(x):
    """sigmoid(x) and 1 - sigmoid(x), each accurate."""
    smaller = exp(-tl.abs(x))
    big = reciprocal(1.0 + smaller)
    small = smaller * big
    positive = x > 0.0
    return tl.where(positive, big, small), tl.where(positive, small, big)


@triton.jit
def forward_tokens(
    past,
    keys,
    values,
    gates,
    resets,
    w,
    u,
    y,
    t,
    length,
    channels,
    inside,
    C: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Outputs of a block of tokens from t on, stored into the (T, C) array y, and the past after them."""
    y += tl.cast(t, tl.int64) * C + channels
    for i in tl.static_range(len(keys)):
        if len(resets) > 0:
            past = choose(resets[i], empty_past(w), past)
        above, low = difference(keys[i], past[2])
        news = values[i] - past[0]
        share, _, _, _, _ = read(past, above, low, w, u)
        out = tl.fma(share, news, past[0])
        if len(gates) > 0:
            out *= sigmoid(gates[i])[0]
        tl.store(y + i * C, out, mask=tl.where(t + i < length, inside, False))
        past, _, _ = absorb(past, keys[i], above, low, news, w, True, SLOPE)
    return past


@triton.jit
def slope_of_output(past, share, rest, news):
    """d y / dw of a token whose output gives it `share` and the past `rest`."""
    return rest * (past[4] - share * past[5] * news)


@triton.jit
def denominator(key, base, age, u, taller):
    """(high, extra, age) to which `read` gave the inverse of a token's denominator relative."""
    return tl.where(taller, key, base), tl.where(taller, u, 0.0), tl.where(taller, 0.0, -age)


@triton.jit
def older_past(past, tokens):
    """The past so many tokens later, without those tokens; also back, with a negative number."""
    return past[0], past[1], past[2], past[3] + tokens, past[4], past[5] + tokens


@triton.jit
def older_future(future, tokens):
    return future[0], future[1], future[2], future[3], future[4] + tokens


@triton.jit
def add_future(future, near_s, near_d, step, at, w):
    """`future` with a nearer part of it added, whose S and D are given relative to `at`, (high, extra, age).

    `step` is how far the mean on which D is centred moves. What is in `future` must be as old as the part.
    """
    s, d, high, extra, age = future
    lead = tl.fma(at[2] - age, w, (high - at[0]) + (extra - at[1]))
    smaller = exp(-tl.abs(lead))
    taller = lead > 0.0
    far, near = tl.where(taller, smaller, 1.0), tl.where(taller, 1.0, smaller)
    d = tl.fma(far, tl.fma(step, s, d), near * near_d)
    s = tl.fma(far, s, near * near_s)
    high, extra, age = choose(taller, at, (high, extra, age))
    return s, d, high, extra, age


@triton.jit
def weight_in_future(future, key, w):
    """e^key times the scale of a future: at most 1, as the key is in every denominator after it."""
    return exp(tl.fma(future[4], w, (key - future[2]) - future[3]))


@triton.jit
def final_future(grad_state, state, C, channels, inside):
    """The future of the last token: the final state is one more output, of exponent m, linear in a and b."""
    mean, _, m, none, _, _ = load_state(state, C, channels, inside)
    future = empty_future(none)
    if grad_state is not None:
        grad_a = tl.load(grad_state + channels, mask=inside, other=0.0)
        grad_b = tl.load(grad_state + C + channels, mask=inside, other=0.0)
        future = (grad_a, -tl.fma(mean, grad_a, grad_b), m, none, none)
    return future


@triton.jit
def slope_of_state(grad_state, state, past, C, channels, inside):
    """The final state's part of dw; `past` is the one after the last token."""
    grad_a = tl.load(grad_state + channels, mask=inside, other=0.0)
    grad_b = tl.load(grad_state + C + channels, mask=inside, other=0.0)
    b = tl.load(state + C + channels, mask=inside, other=0.0)
    return b * tl.fma(grad_a, past[4], tl.fma(grad_a, past[0], grad_b) * past[5])


@triton.jit
def store_grad_of_state(grad_state, future, past, w, C, channels, inside):
    """Gradient of the initial state, one more token before the first: the state as a past, its future."""
    scale = weight_in_future(future, past[2], w)
    tl.store(grad_state + channels, scale * future[0], mask=inside)
    tl.store(grad_state + C + channels, -scale * tl.fma(past[0], future[0], future[1]), mask=inside)
    tl.store(grad_state + 2 * C + channels, tl.zeros_like(scale), mask=inside)


@triton.jit
def gated(grad, gates, i: tl.constexpr):
    """Gradient of the output before the gate, and what y is multiplied by in the gate's gradient."""
    factor = grad
    if len(gates) > 0:
        opened, shut = sigmoid(gates[i])
        factor = grad * opened * shut
        grad *= opened
    return grad, factor


@triton.jit
def reverse_tokens(
    past, future, keys, values, grads, gates, resets, w, u, grad_k, grad_v, grad_gate, t, length, channels,
    inside, C: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of tokens from t on, stored into (T, C) arrays; grad_gate may be None.

    `past` is the one before the block, `future` what the tokens after it say. Returns the future with the
    block in it, the past after it, and with SLOPE the block's parts of dw and du.
    """
    grad_w, grad_u = tl.zeros_like(w), tl.zeros_like(w)
    start = tl.cast(t, tl.int64) * C + channels
    grad_k, grad_v, grad_gate = grad_k + start, grad_v + start, moved(grad_gate, start)
    # Forward again: what every token needs on the way back.
    tokens = ()
    for i in tl.static_range(len(keys)):
        if len(resets) > 0:
            past = choose(resets[i], empty_past(w), past)
        above, low = difference(keys[i], past[2])
        news = values[i] - past[0]
        out_share, out_rest, _, inverse, taller = read(past, above, low, w, u)
        grad, gate_factor = gated(grads[i], gates, i)
        out_step = out_share * news
        direct = grad * out_share * (out_rest * news)
        if grad_gate is not None:
            grad_of_gate = gate_factor * (past[0] + out_step)
            mask = tl.where(t + i < length, inside, False)
            tl.store(grad_gate + i * C, grad_of_gate, mask=mask)
        if SLOPE:
            grad_w += grad * slope_of_output(past, out_share, out_rest, news)
            grad_u += direct
        before = past
        past, share, rest = absorb(past, keys[i], above, low, news, w, t + i < length, SLOPE)
        tokens += (
            (
                grad * out_share,
                direct,
                rest * news,
                share * news,
                grad * inverse,
                out_step,
                before[2],
                before[3],
                taller,
            ),
        )
    for i in tl.static_range(len(keys) - 1, -1, -1):
        own, direct, apart, step, near, out_step, base, age, taller = tokens[i]
        later = weight_in_future(future, keys[i], w)
        mask = tl.where(t + i < length, inside, False)
        tl.store(grad_v + i * C, tl.fma(later, future[0], own), mask=mask)
        grad_key = tl.fma(later, tl.fma(apart, future[0], -future[1]), direct)
        tl.store(grad_k + i * C, grad_key, mask=mask)
        at = denominator(keys[i], base, age, u, taller)
        future = add_future(older_future(future, 1.0), near, near * out_step, step, at, w)
        if len(resets) > 0:
            future = choose(resets[i], empty_future(w), future)
    return future, past, grad_w, grad_u
