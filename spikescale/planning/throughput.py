"""Seconds of a step from a roofline: arithmetic, memory traffic and communication, one after the other."""

from dataclasses import dataclass

from spikescale.planning import parameters as of_model
from spikescale.planning.activations import FLOAT, traffic_of_block, traffic_of_loss
from spikescale.planning.devices import Device
from spikescale.planning.memory import Workload

FORWARD, BACKWARD = 2, 4  # operations of a projection's weight and token
OPTIMIZER_BYTES = 40  # an element: norm, clipping, and Adam's reads (4 numbers) and writes (3)
HOST_BANDWIDTH = 50e9  # bytes a second of host memory for one rank's Adam; assumed
CAST_BYTES = 6  # a projection's weight and forward pass under autocast: float32 read, bfloat16 written


@dataclass(frozen=True)
class Throughput:
    """One optimizer step of all ranks. Times in seconds, volumes in bytes a rank."""

    tokens: int
    matrices: float
    traffic: float
    communication: float
    offload: float
    link_bytes: float

    @property
    def seconds(self) -> float:
        """One step. Nothing is taken to overlap: DeepSpeed's stages 0 to 2 do not overlap here."""
        return self.matrices + self.traffic + self.communication + self.offload

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.seconds

    def days(self, tokens: float) -> float:
        """Days until `tokens` are read."""
        return tokens / self.tokens_per_second / 86400


def plan_throughput(workload: Workload, device: Device) -> Throughput:
    """The rate of a run on `device`, at the stated share of its peak and at its memory's bandwidth."""
    precision = "bfloat16" if workload.compute == 2 else "float32"
    rate = device.matrix_peaks[precision] * device.efficiency
    passes = workload.accumulation
    operations = passes * workload.tokens * _operations_per_token(workload)
    moved = passes * _bytes_of_pass(workload) + _bytes_of_update(workload)
    sent = passes * _sent_in_pass(workload) + _sent_in_update(workload)
    host = 0.0
    if _updates_on_host(workload):
        mine = of_model.count(workload.model, workload.parallel.tensor) / workload.replicas
        # Gradients go, weights come back, and between them Adam reads and writes host memory.
        host = mine * (2 * FLOAT / device.host_link + OPTIMIZER_BYTES / HOST_BANDWIDTH)
    # Ranks of one sequence start one after the other, a block apart.
    layers, context = workload.model.layers, workload.parallel.context
    waiting = (layers + context - 1) / layers
    return Throughput(
        tokens=workload.train.batch_size * workload.model.context_length,
        matrices=waiting * operations / rate,
        traffic=waiting * moved / device.bandwidth,
        communication=sent / device.link,
        offload=host,
        link_bytes=sent,
    )


def _operations_per_token(workload: Workload) -> int:
    projections = of_model.count_projections(workload.model, workload.parallel.tensor)
    again = 0
    if workload.train.activation_checkpointing:
        symbols = -(-of_model.vocabulary(workload.model) // workload.parallel.tensor)
        again = FORWARD * (projections - symbols * workload.model.width)
    return (FORWARD + BACKWARD) * projections + again


def _bytes_of_pass(workload: Workload) -> float:
    """Bytes that operators between matrix products move in one forward and backward of one rank."""
    model, tensor = workload.model, workload.parallel.tensor
    forward, backward = traffic_of_block(model, workload.compute)
    if workload.train.activation_checkpointing:
        forward *= 2
    blocks = (forward + backward) * model.layers * workload.tokens * model.width
    symbols = -(-of_model.vocabulary(model) // tensor)
    logits = traffic_of_loss(workload.compute, workload.fused_loss) * workload.tokens * symbols
    casts = CAST_BYTES * of_model.count_projections(model, tensor) if workload.compute < FLOAT else 0
    return blocks + logits + casts


def _bytes_of_update(workload: Workload) -> float:
    shared = workload.replicas if workload.zero.stage else 1
    elements = of_model.count(workload.model, workload.parallel.tensor) / shared
    return 0.0 if _updates_on_host(workload) else OPTIMIZER_BYTES * elements


def _updates_on_host(workload: Workload) -> bool:
    return workload.zero.offload_optimizer != "none" and not workload.on_cpu


def _ring(size: int) -> float:
    """Share of a buffer that each of `size` ranks sends to reduce-scatter or gather it."""
    return (size - 1) / size


def _sent_in_pass(workload: Workload) -> float:
    """Bytes that one rank sends in one forward and backward."""
    weights = FLOAT * of_model.count(workload.model, workload.parallel.tensor)
    share = _ring(workload.replicas)
    sent = 0.0
    if workload.zero.stage == 2:
        sent += 2 * share * weights  # DeepSpeed averages in all ranks and keeps a part
    elif workload.zero.stage == 3:
        gathers = 3 if workload.train.activation_checkpointing else 2
        sent += (gathers + 1) * share * weights
    if workload.parallel.tensor > 1:
        # Two sums of (tokens, width) a block in forward, two in backward, and again in recomputation.
        sums = 6 if workload.train.activation_checkpointing else 4
        stream = workload.compute * workload.tokens * workload.model.width
        sent += sums * workload.model.layers * 2 * _ring(workload.parallel.tensor) * stream
    return sent


def _sent_in_update(workload: Workload) -> float:
    """Bytes that one rank sends once a step."""
    weights = FLOAT * of_model.count(workload.model, workload.parallel.tensor)
    share = _ring(workload.replicas)
    reduced = 2 * share * weights if workload.zero.stage < 2 else 0.0
    gathered = share * weights if workload.zero.stage in (1, 2) else 0.0
    return reduced + gathered
