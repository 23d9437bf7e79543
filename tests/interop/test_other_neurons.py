"""Our LIF fires where SpikingJelly's and snnTorch's do, with the same membranes and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spikescale.kernels.lif import lif

BACKENDS = ("reference", "auto")


def currents(time: int = 200, channels: int = 33, seed: int = 0) -> Tensor:
    """(B, T, C) around the threshold, slowly changing as text's are; its gradient is asked for."""
    noise = torch.randn(3, time, channels, generator=torch.Generator().manual_seed(seed))
    drift = torch.sin(torch.arange(time)[None, :, None] / 7)
    return (1.2 * noise + drift).requires_grad_()


def weights(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(9))


def gradient(spikes: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Of a sum in which every spike and every last membrane has a weight of its own."""
    ((spikes * weights(spikes)).sum() + (v * weights(v)).sum()).backward()
    assert x.grad is not None
    return x.grad


def assert_same_gradient(mine: Tensor, theirs: Tensor) -> None:
    assert theirs.norm() > 1
    assert (mine - theirs).norm() < 1e-5 * theirs.norm()


class TestSpikingJelly:
    @pytest.fixture(autouse=True)
    def library(self) -> None:
        pytest.importorskip("spikingjelly")

    def node(self, **options: Any) -> Any:
        from spikingjelly.activation_based import neuron, surrogate

        alpha = options.pop("alpha", 2.0)
        return neuron.LIFNode(surrogate_function=surrogate.ATan(alpha=alpha), step_mode="m", **options)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("detach", [False, True])
    @pytest.mark.parametrize("v_reset", [0.0, -0.25, None], ids=["hard", "hard-below-0", "soft"])
    @pytest.mark.parametrize(("tau", "threshold", "alpha"), [(2.0, 1.0, 2.0), (3.5, 0.7, 4.0)])
    def test_spikes_membranes_and_gradients(self, backend, detach, v_reset, tau, threshold, alpha):
        node = self.node(tau=tau, v_threshold=threshold, v_reset=v_reset, detach_reset=detach, alpha=alpha)
        x, y = currents(), currents()
        theirs = node(y.transpose(0, 1)).transpose(0, 1)
        start = torch.full((3, 33), v_reset or 0.0)  # a new node of theirs is at rest at v_reset, ours at 0
        mine, v = lif(
            x,
            start,
            tau=tau,
            v_threshold=threshold,
            v_reset=v_reset or 0.0,
            soft_reset=v_reset is None,
            detach_reset=detach,
            surrogate_alpha=alpha,
            backend=backend,
        )
        assert 0.02 < theirs.mean() < 0.6
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(v, node.v, rtol=1e-6, atol=1e-6)
        assert_same_gradient(gradient(mine, v, x), gradient(theirs, node.v, y))

    def test_membranes_are_carried_from_call_to_call(self):
        node = self.node()
        x = currents().detach()
        v = None
        for chunk in x.split(37, dim=1):
            mine, v = lif(chunk, v, tau=2.0, v_threshold=1.0)
            assert torch.equal(mine, node(chunk.transpose(0, 1)).transpose(0, 1))

    def test_at_the_threshold_itself_only_the_soft_reset_differs(self):
        """SpikeGPT's Eq. 20 fires above the threshold, SpikingJelly's neurons at it in both modes."""
        x = torch.full((1, 1, 1), 2.0)  # half of it is the threshold
        assert lif(x, None, tau=2.0, v_threshold=1.0)[0].item() == self.node()(x).item() == 1
        assert lif(x, None, tau=2.0, v_threshold=1.0, soft_reset=True)[0].item() == 0
        assert self.node(v_reset=None)(x).item() == 1


class TestSnnTorch:
    """snnTorch's membrane is U[t] = beta U[t-1] + I[t]: ours with beta = 1 - 1/tau and I = x / tau."""

    @pytest.fixture(autouse=True)
    def library(self) -> None:
        pytest.importorskip("snntorch")

    def run(self, x: Tensor, tau: float, threshold: float, **options: Any) -> tuple[Tensor, Tensor]:
        import snntorch
        from snntorch import surrogate

        leaky = snntorch.Leaky(
            1 - 1 / tau, threshold=threshold, spike_grad=surrogate.atan(alpha=2.0), **options
        )
        spikes, v = [], torch.zeros(x.shape[0], x.shape[2])
        for current in (x / tau).unbind(1):
            spike, v = leaky(current, v)
            spikes.append(spike)
        return torch.stack(spikes, 1), v

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(("tau", "threshold"), [(2.0, 1.0), (4.0, 0.75)])
    @pytest.mark.parametrize(
        ("options", "ours"),
        [
            # With the delay, their default, the reset happens a step later, out of the gradient's sight.
            ({"reset_mechanism": "zero"}, {"detach_reset": True}),
            ({"reset_mechanism": "zero", "reset_delay": False}, {}),
            ({"reset_mechanism": "subtract", "reset_delay": False}, {"soft_reset": True}),
        ],
        ids=["zero-delayed", "zero", "subtract"],
    )
    def test_spikes_membranes_and_gradients(self, backend, tau, threshold, options, ours):
        # Below twice the threshold: above it, their subtraction without delay happens twice.
        x, y = (currents().detach().clamp(max=1.2 * threshold * tau / 2 + 0.5).requires_grad_() for _ in "xy")
        theirs, u = self.run(y, tau, threshold, **options)
        mine, v = lif(x, None, tau=tau, v_threshold=threshold, backend=backend, **ours)
        assert 0.02 < theirs.mean() < 0.6
        assert torch.equal(mine, theirs)
        if options.get("reset_delay", True):  # their membrane has not been reset yet
            u = u * (1 - theirs[:, -1].detach())
        torch.testing.assert_close(v, u, rtol=1e-5, atol=1e-6)
        assert_same_gradient(gradient(mine, v, x), gradient(theirs, u, y))

    def test_subtraction_with_their_delay_is_another_neuron(self):
        """They take the threshold off after the membrane has leaked, we before."""
        x = torch.tensor([[[3.0], [0.0], [3.0]]])
        _, delayed = self.run(x[:, :2], 2.0, 1.0, reset_mechanism="subtract")
        _, ours = lif(x[:, :2], None, tau=2.0, v_threshold=1.0, soft_reset=True)
        assert delayed.item() == 0.5 * 1.5 - 1 and ours.item() == 0.5 * (1.5 - 1)

    def test_at_the_threshold_itself_only_the_hard_reset_differs(self):
        """They fire above the threshold in all modes; SpikeGPT's hard reset at it, its soft one above."""
        x = torch.full((1, 1, 1), 2.0)
        assert self.run(x, 2.0, 1.0, reset_mechanism="zero")[0].item() == 0
        assert lif(x, None, tau=2.0, v_threshold=1.0)[0].item() == 1
        assert self.run(x, 2.0, 1.0, reset_mechanism="subtract", reset_delay=False)[0].item() == 0
        assert lif(x, None, tau=2.0, v_threshold=1.0, soft_reset=True)[0].item() == 0
