"""Dead and saturated neurons, counted from known rates."""

from types import SimpleNamespace

import pytest
import torch

from spikescale.config import FaultConfig
from spikescale.faults.neuron_health import PASSES, NeuronHealth
from spikescale.parallel import Layout


def test_shares_are_those_of_the_last_passes_and_each_crossing_is_said_once():
    neuron = SimpleNamespace(channel_rates=None)
    config = FaultConfig(silent_share=0.5, saturated_share=0.5, saturated_rate=0.9)
    health = NeuronHealth(config, [("layer", neuron)], Layout(0, 1), torch.device("cpu"))

    def observe(*rates):
        neuron.channel_rates = torch.tensor(rates)
        found = health.observe()
        return found, [(change.event, change.share) for change in health.changes(found)]

    said = [observe(0.0, 0.0, 0.0, 0.4)[1] for _ in range(PASSES)]
    assert said == [[]] * (PASSES - 1) + [[("silent", 0.75)]]
    found, said = observe(0.0, 0.0, 0.0, 0.4)
    assert said == []
    assert (found.rates["layer"], found.dead["layer"], found.saturated["layer"]) == pytest.approx(
        (0.1, 0.75, 0)
    )
    # One spike in a while is enough not to be dead.
    found, said = observe(0.1, 0.1, 0.0, 0.4)
    assert (found.dead["layer"], said) == (0.25, [("recovered", 0.25)])
    for _ in range(PASSES):
        found, said = observe(1.0, 0.95, 0.95, 0.4)
    assert (found.saturated["layer"], found.mean_rate) == pytest.approx((0.75, 0.825))
    assert said == [("saturated", 0.75)]
    assert health.state_dict() == {"layer": "saturated"}
