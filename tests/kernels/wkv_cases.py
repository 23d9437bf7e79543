"""Inputs for WKV tests, the formulas written out as sums, and the comparison of all outputs by name."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ORDER = ("w", "u", "k", "v", "state", "gate")


def make_inputs(
    batch: int,
    length: int,
    channels: int,
    spread: float = 1.0,
    offset: float = 0.0,
    with_state: bool = True,
    with_gate: bool = False,
) -> dict[str, Tensor]:
    """w, u, k, v, state, and a gate if asked for; |k - offset| <= spread; decays from e^-5 to e^3."""
    generator = torch.Generator().manual_seed(length * 1000 + channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    k = (torch.rand(batch, length, channels, generator=generator) * 2 - 1) * spread + offset
    decay = torch.linspace(-5, 3, channels) if channels > 1 else torch.tensor([-3.0])
    state = torch.stack([torch.zeros(batch, channels), torch.zeros(batch, channels)], dim=1)
    state = torch.cat([state, torch.full((batch, 1, channels), -1e38)], dim=1)
    if with_state:
        state[:, 0] = normal(batch, channels)
        state[:, 1] = torch.rand(batch, channels, generator=generator) + 0.5
        state[:, 2] = normal(batch, channels) * spread / 3 + offset
    inputs = {
        "w": -torch.exp(decay),
        "u": normal(channels),
        "k": k,
        "v": normal(batch, length, channels),
        "state": state,
    }
    if with_gate:
        inputs["gate"] = 3 * normal(batch, length, channels)
    return inputs


def add_levels(inputs: dict[str, Tensor], levels: Sequence[float], length: int = 16) -> dict[str, Tensor]:
    """The same with `levels` added to the keys, each to `length` tokens, over and over."""
    tokens = torch.arange(inputs["k"].shape[1])
    added = torch.tensor(levels)[tokens // length % len(levels)]
    return {**inputs, "k": inputs["k"] + added[:, None]}


def make_reset(batch: int, length: int, share: float = 0.1) -> Tensor:
    """A document starts at this share of the tokens, at random."""
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(5)) < share


def written_out(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, reset: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y, and the final state as (log-scale-free) sums: model.md's fraction, term by term, in float64.

    Sequences one by one, every token's two sums over everything since the last reset. The final state is
    returned with a scale of its own: only a e^m and b e^m mean something.
    """
    w, u, k, v, state = (x.double() for x in (w, u, k, v, state))
    length = k.shape[1]
    all_outputs, all_states = [], []
    for row in range(k.shape[0]):
        outputs = []
        start, a0, b0, m0 = 0, state[row, 0], state[row, 1], state[row, 2].detach()
        for t in range(length + 1):
            if t < length and reset is not None and bool(reset[row, t]):
                start, a0, b0, m0 = t, torch.zeros_like(a0), torch.zeros_like(b0), torch.full_like(m0, -1e38)
            age = torch.arange(t - 1 - start, -1, -1, dtype=torch.float64)[:, None]
            exponents = [m0[None] + (t - start) * w, age * w + k[row, start:t]]
            values, weights = [a0[None], v[row, start:t]], [b0[None], torch.ones_like(v[row, start:t])]
            if t < length:
                exponents.append((u + k[row, t])[None])
                values.append(v[row, t][None])
                weights.append(torch.ones_like(values[-1]))
            exponent = torch.cat(exponents)
            scale = exponent.max(dim=0).values.detach()
            term = torch.exp(exponent - scale)
            a, b = (term * torch.cat(values)).sum(0), (term * torch.cat(weights)).sum(0)
            outputs.append(a / b if t < length else torch.stack([a, b, scale]))
        all_outputs.append(torch.stack(outputs[:-1]))
        all_states.append(outputs[-1])
    y = torch.stack(all_outputs)
    return y if gate is None else y / (1 + torch.exp(-gate.double())), torch.stack(all_states)


def evaluate(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    reset: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Outputs and gradients by name, of a fixed random combination of y and the final sums.

    `function` takes w, u, k, v, state, reset, gate.
    """
    leaves = {name: x.detach().to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}
    w, u, k, v, state, gate = (leaves.get(name) for name in ORDER)
    y, state = function(w, u, k, v, state, reset, gate)
    generator = torch.Generator().manual_seed(9)
    weight_y = torch.randn(y.shape, generator=generator).to(y.dtype)
    weight_sums = torch.randn(state[:, :2].shape, generator=generator)
    # The sums on a scale that every implementation agrees on: that of the last key, to whole numbers.
    common = inputs["k"].double()[:, -1:].round()
    sums = (state[:, :2].double() * torch.exp(state[:, 2:].detach().double() - common)).clamp(-1e30, 1e30)
    # Weighed by the sum of weights, which cannot cancel as the sum with v can.
    loss = (y * weight_y).sum().double() + (sums * weight_sums / (1 + sums[:, 1:].detach())).sum()
    loss.backward()
    # "state" is the outcome, "d state" the gradient of the initial one.
    grads = {f"d {name}": leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), "state": sums.detach(), **grads}


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """||actual - expected|| / ||expected|| by name; the plain norm where nothing is expected."""
    errors = {}
    for name, reference in expected.items():
        norm = reference.double().norm()
        difference = (actual[name].double() - reference.double()).norm()
        errors[name] = float(difference / norm if norm > 1e-30 else difference)
    return errors
