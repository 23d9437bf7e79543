"""Bytes of one rank, phase by phase, as DeepSpeed's stages and this model's training loop allocate them.

A plan has two places: the device (a GPU, or on CPUs the process) and the host's memory, to which offload
moves what it moves; on CPUs both are the same memory. The peak of a place is its largest phase.

Weights, their masters, gradients and moments are float32 everywhere (bfloat16 is autocast). What DeepSpeed
holds, by stage, with R ranks that hold the same weights:

    0   weights, gradients, moments
    1   weights, 1/R of (masters, moments); whole gradients at the end of backward, copied into 1/R
    2   as 1, but gradients are reduced into 1/R while backward runs
    3   1/R of (weights, masters, gradients, moments); weights are gathered where they are used
"""

from dataclasses import dataclass, field

from spikescale.config.schema import ModelConfig, ParallelConfig, TrainConfig, ZeroConfig
from spikescale.errors import UserError
from spikescale.parallel.layout import Layout
from spikescale.planning import parameters as of_model
from spikescale.planning.activations import FLOAT, Activations, activations

DOUBLE = 8  # bytes of a number while DeepSpeed computes norms
GATHERED_BUCKETS = 5  # all-gather buckets of weights that stage 3 keeps gathered (training/offload.py)
ALLREDUCE_ELEMENTS = 500_000_000  # of one all-reduce at stage 0, DeepSpeed's constant
SWAPPED_TENSORS = 8  # weight, gradient and two moments of a group that is updated; twice that is measured
LARGE = 160 << 20  # bytes of a block that a process on a CPU gives back at stage 3, as measured


@dataclass(frozen=True)
class Workload:
    """One run as the planner sees it. `baseline`: bytes a process (device) takes before there is a model."""

    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ranks: int = 1
    on_cpu: bool = False
    baseline: int = 0
    host_baseline: int = 0

    def __post_init__(self) -> None:
        """Refuse what a run would refuse. Raises UserError."""
        if self.train.batch_size % self.data_parts:
            raise UserError(
                f"batch size {self.train.batch_size}: must be a multiple of the {self.data_parts} parts it is"
                " divided into (ranks / tensor / context)"
            )
        if self.sequences % self.micro_batch:
            raise UserError(
                f"micro-batch size {self.micro_batch}: must divide the {self.sequences} sequences a rank"
                f" (batch size {self.train.batch_size} over {self.data_parts})"
            )
        if self.parallel.tensor > 1 and self.zero.stage == 3:
            raise UserError("tensor parallelism does not work with stage 3: use a stage up to 2")
        if self.parallel.context > 1 and self.zero.stage > 1:
            raise UserError(f"context ranks do not work with stage {self.zero.stage}: use stage 0 or 1")
        if self.model.width % self.parallel.tensor:
            raise UserError(f"--tensor {self.parallel.tensor}: does not divide the width {self.model.width}")
        if self.model.context_length % self.parallel.context:
            raise UserError(
                f"--context-ranks {self.parallel.context}: does not divide the context of"
                f" {self.model.context_length} tokens"
            )

    @property
    def data_parts(self) -> int:
        """Parts the batch is divided into."""
        return Layout.of(self.parallel, 0, self.ranks).data

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, over which ZeRO shards: R."""
        return self.ranks // self.parallel.tensor

    @property
    def sequences(self) -> int:
        """Sequences a rank and optimizer step."""
        return self.train.batch_size // self.data_parts

    @property
    def micro_batch(self) -> int:
        """Sequences a rank and forward pass."""
        return self.train.micro_batch_size or self.sequences

    @property
    def accumulation(self) -> int:
        """Forward passes an optimizer step."""
        return self.sequences // self.micro_batch

    @property
    def tokens(self) -> int:
        """Tokens a rank and forward pass."""
        return self.micro_batch * self.model.context_length // self.parallel.context

    @property
    def compute(self) -> int:
        """Bytes of a number that a projection reads."""
        return 2 if self.train.precision == "bfloat16" else FLOAT

    @property
    def fused_loss(self) -> bool:
        """Whether head and loss are one computation, without all logits at once."""
        plain_head = self.zero.stage < 3 and self.parallel.tensor == 1
        return self.train.fused_loss != "off" and not self.on_cpu and plain_head

    def activations(self) -> Activations:
        """The activations of one rank's forward pass."""
        return activations(
            self.model,
            self.tokens,
            self.compute,
            tensor=self.parallel.tensor,
            recompute=self.train.activation_checkpointing,
            compact=self.train.compact_activations,
            fused_loss=self.fused_loss,
            regulariser=self.train.logit_regulariser > 0,
        )


@dataclass(frozen=True)
class Phase:
    """One moment of a step: bytes by what they are for, on the device and on the host."""

    name: str
    device: dict[str, int]
    host: dict[str, int]
    given_back: dict[str, int] = field(default_factory=dict)  # of each part, bytes in blocks that are

    @property
    def device_bytes(self) -> int:
        """All on the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All in the host's memory, of this rank."""
        return sum(self.host.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The phases of a step on one rank."""

    phases: tuple[Phase, ...]
    on_cpu: bool
    disk: int = 0  # bytes of this rank's files on the NVMe
    gaps: int = 0  # bytes of a CPU's heap that nothing fits into

    @property
    def peak(self) -> Phase:
        """The phase that takes most of the device (on CPUs: of the process)."""
        return max(self.phases, key=self._bytes)

    @property
    def device_bytes(self) -> int:
        """Peak of the device; on CPUs that of the process, offloaded or not."""
        return self._kept_apart() if self.on_cpu else self._bytes(self.peak)

    @property
    def host_bytes(self) -> int:
        """Peak of the host's memory; on CPUs that is part of `device_bytes` already."""
        return max(phase.host_bytes for phase in self.phases)

    def _bytes(self, phase: Phase) -> int:
        return phase.device_bytes + (phase.host_bytes if self.on_cpu else 0)

    def _kept_apart(self) -> int:
        """What a process on a CPU grows to: of each part the largest that it ever is, in sum.

        It keeps what a step frees for the next (`training/allocator.py`), and a part seldom fits the gaps
        that another has left: gradients are made between dying activations, where flat buffers would lie.
        Large blocks that it gives back count while they live.
        """
        largest: dict[str, int] = {}
        most = 0
        for phase in self.phases:
            parts: dict[str, int] = {}
            for place in (phase.device, phase.host):
                for name, size in place.items():
                    # What the logits leave is large enough for gradients.
                    key = "gradients" if name == "logits" else name
                    parts[key] = parts.get(key, 0) + size - (phase.given_back.get(name, 0))
            most = max(most, sum(phase.given_back.values()))
            for key, size in parts.items():
                largest[key] = max(largest.get(key, 0), size)
        return most + sum(largest.values()) + self.gaps


def plan_memory(workload: Workload) -> MemoryPlan:
    """The bytes of one rank of a run."""
    states = _States(workload)
    phases = (
        states.building(),
        states.sharding(),
        states.loss(),
        states.backward_begins(),
        states.backward_ends(),
        states.reduction(),
        states.step(),
        states.gathering(),
    )
    kept = tuple(phase for phase in phases if phase is not None)
    return MemoryPlan(kept, workload.on_cpu, states.disk(), states.gaps())


class _States:
    """What is held throughout, and what each phase adds."""

    def __init__(self, workload: Workload) -> None:
        self.workload, zero, model = workload, workload.zero, workload.model
        tensor = workload.parallel.tensor
        self.stage, self.replicas = zero.stage, workload.replicas
        self.elements = of_model.count(model, tensor)
        self.weights = FLOAT * self.elements
        self.shard = -(-self.weights // self.replicas)
        self.matrices = FLOAT * of_model.count_matrices(model, tensor)
        self.projections = of_model.count_projections(model, tensor)
        self.largest = of_model.largest(model, tensor)
        self.head = FLOAT * of_model.vocabulary(model) * model.width // tensor
        self.reduce_bucket = FLOAT * min(zero.reduce_bucket_size, self.elements)
        self.gather_bucket = FLOAT * min(zero.allgather_bucket_size, self.elements)
        self.offloaded = zero.offload_optimizer
        self.activations = workload.activations()
        self.accumulates = workload.accumulation > 1

    def _phase(self, name: str, device: dict[str, int], host: dict[str, int] | None = None) -> Phase:
        static, away = self._static()
        merged = dict(static)
        for key, value in device.items():
            merged[key] = merged.get(key, 0) + value
        all_host = dict(away)
        for key, value in (host or {}).items():
            all_host[key] = all_host.get(key, 0) + value
        return self._of_blocks(name, merged, all_host)

    def _of_blocks(self, name: str, device: dict[str, int], host: dict[str, int]) -> Phase:
        """The phase, with what of its parts lies in blocks that a process gives back when it frees them."""
        blocks = {"weights": self.head, "gradients": self.head, "casts": self.head // 2, "activations": 0}
        back: dict[str, int] = {}
        for part in {**device, **host} if self.stage == 3 and self.workload.on_cpu else ():
            # Parts that consist of layers have two large blocks: those of the embedding and of the head.
            size, layered = device.get(part, 0) + host.get(part, 0), part in blocks
            block = blocks.get(part, size)
            if block >= LARGE:
                back[part] = min(size, block * min(2, size // block)) if layered else size
        found = [{part: size for part, size in place.items() if size} for place in (device, host)]
        return Phase(name, found[0], found[1], back)

    def _static(self) -> tuple[dict[str, int], dict[str, int]]:
        """What the device and the host hold throughout."""
        shard, device = self.shard, {"baseline": self.workload.baseline}
        host = {"baseline": self.workload.host_baseline}
        if self.stage == 0:
            return {**device, "weights": self.weights, "optimizer": 2 * self.weights}, host
        if self.stage < 3:
            device["weights"] = self.weights
            if self.offloaded == "none":
                device["optimizer"] = 3 * shard
                return device, host
            scratch = FLOAT * self.largest
            device["buffers"] = scratch
            # Masters and moments; a gradient, and a copy of the masters on their way back.
            host |= {"optimizer": 3 * shard, "partition": shard, "buffers": shard + scratch}
            if self.accumulates:
                host["partition"] += shard
            return device, host
        return self._static_of_stage_3(device, host)

    def _static_of_stage_3(
        self, device: dict[str, int], host: dict[str, int]
    ) -> tuple[dict[str, int], dict[str, int]]:
        zero, shard = self.workload.zero, self.shard
        device["buffers"] = FLOAT * zero.reduce_bucket_size
        if zero.offload_parameters == "none":
            device["weights"] = shard
        elif zero.offload_parameters == "cpu":
            host["weights"] = shard
        else:
            host["weights"] = self._parameter_buffers()
        if self.offloaded == "none":
            device |= {"optimizer": 3 * shard, "partition": shard}
        elif self.offloaded == "cpu":
            host |= {"optimizer": 3 * shard, "partition": 2 * shard}
        else:
            host |= {"partition": shard, "buffers": SWAPPED_TENSORS * self._swapped_group()}
        return device, host

    def _swapped_group(self) -> int:
        """Bytes of the largest group of weights that is updated at once from an NVMe."""
        group = self.workload.zero.reduce_bucket_size + -(-self.largest // self.replicas)
        return min(FLOAT * group, self.shard)

    def _parameter_buffers(self) -> int:
        return 5 * FLOAT * -(-self.largest // self.replicas)

    def disk(self) -> int:
        """Bytes of this rank on the NVMe."""
        zero = self.workload.zero
        optimizer = 4 * self.shard if zero.offload_optimizer == "nvme" else 0
        return optimizer + (self.shard if zero.offload_parameters == "nvme" else 0)

    def building(self) -> Phase:
        """Every rank first makes the whole model in the host's memory, one orthogonal matrix at a time."""
        scratch = {"weights": self.weights, "temporary": 4 * FLOAT * self.largest}
        if self.workload.on_cpu:
            return self._of_blocks("building", {"baseline": self.workload.baseline, **scratch}, {})
        host = {"baseline": self.workload.host_baseline, **scratch}
        return self._of_blocks("building", {"baseline": self.workload.baseline}, host)

    def sharding(self) -> Phase | None:
        """The whole weights beside what DeepSpeed makes of them."""
        if self.stage == 0:
            return None
        # Up to stage 2 all matrices are copied into one buffer; at stage 3 each is cut up, and the parts are
        # gathered. Then a gradient is made for the optimizer, and dropped.
        device = {"baseline": self.workload.baseline, "weights": self.weights}
        if self.workload.on_cpu:
            dropped = self.shard if self.offloaded == "none" else 0
            device["temporary"] = dropped + (self.matrices if self.stage < 3 else self.shard)
        else:
            device["temporary"] = self.matrices if self.stage < 3 else self.shard + FLOAT * self.largest
        return self._of_blocks("sharding", device, {"baseline": self.workload.host_baseline})

    def _earlier_gradients(self) -> dict[str, int]:
        """Those of earlier forward passes of the same step, on the device; stage 3 holds them always."""
        if not self.accumulates or self.stage == 3:
            return {}
        if self.stage < 2:
            return {"gradients": self.weights}
        return {} if self.offloaded != "none" else {"partition": self.shard}

    def _gathered(self) -> int:
        """Weights that stage 3 holds gathered, with what it takes to gather the next."""
        if self.stage < 3 or self.replicas == 1:
            return 0  # a single rank uses its shards as they are
        live = GATHERED_BUCKETS * self.gather_bucket + FLOAT * self.largest
        return min(live, self.weights) + 2 * max(self.gather_bucket, FLOAT * self.largest)

    def _casts(self, forward_is_over: bool) -> int:
        """Copies of weights in autocast's dtype."""
        if self.workload.compute == FLOAT:
            return 0
        recomputed = self.activations.recomputed
        alive = self.head // FLOAT if recomputed and forward_is_over else self.projections
        return self.workload.compute * alive

    def loss(self) -> Phase:
        """The gradient of the logits: every activation is kept, and no gradient of a weight is there yet."""
        return self._phase(
            "loss",
            {
                "weights": self._gathered(),
                "casts": self._casts(forward_is_over=True),
                "activations": self.activations.kept,
                "logits": self.activations.loss,
                **self._earlier_gradients(),
            },
        )

    def _reducing(self) -> int:
        """Buckets in which gradients are averaged over ranks while backward runs."""
        if self.stage == 2:
            return 2 * self.reduce_bucket
        return self.reduce_bucket if self.stage == 3 else 0

    def backward_begins(self) -> Phase:
        """The last block's backward: all other blocks wait, the head's gradient is there."""
        own = self.activations.block if self.activations.recomputed else 0
        return self._phase(
            "backward begins",
            {
                "weights": self._gathered(),
                "casts": self._casts(forward_is_over=True),
                "activations": self.activations.kept + own + self.activations.backward,
                "buffers": self._reducing(),
                **self._added(self._earlier_gradients(), self._new_gradients(self.head)),
            },
        )

    def backward_ends(self) -> Phase:
        """The first block's backward: its activations and the gradients of all weights."""
        last = FLOAT * self.largest
        if self.stage < 2:
            last = 0 if self.accumulates else self.weights
        return self._phase(
            "backward ends",
            {
                "weights": self._gathered(),
                "activations": self.activations.block + self.activations.ends + self.activations.backward,
                "buffers": self._reducing(),
                **self._added(self._earlier_gradients(), self._new_gradients(last)),
            },
        )

    def _new_gradients(self, whole: int) -> dict[str, int]:
        """Bytes of `whole` gradients, and this rank's part where they are reduced while backward runs."""
        partitioned = self.stage == 2 and self.offloaded == "none"
        return {"gradients": whole, "partition": self.shard if partitioned else 0}

    @staticmethod
    def _added(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
        return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}

    def reduction(self) -> Phase | None:
        """Whole gradients, and what they are averaged in; only where that is not done during backward."""
        partition = 0 if self.offloaded != "none" else self.shard
        if self.stage == 0:
            bucket = min(self.weights, FLOAT * (ALLREDUCE_ELEMENTS + self.largest))
            return self._phase("reduction", {"gradients": self.weights, "buffers": bucket})
        if self.stage == 1:
            buffers = {"partition": partition, "buffers": 2 * self.reduce_bucket}
            return self._phase("reduction", {"gradients": self.weights, **buffers})
        return None

    def step(self) -> Phase:
        """The update: gradients flattened into one buffer, after their norm was taken in double precision."""
        if self.stage == 0:
            return self._phase("step", {"gradients": self.weights, "temporary": FLOAT * self.largest})
        norm = DOUBLE * self.largest
        if self.offloaded != "none":
            return self._phase("step", {}, {"temporary": FLOAT * self.largest})
        if self.stage == 3:
            return self._phase("step", {"temporary": max(self.shard, norm // self.replicas)})
        flat = max(min(self.shard, -(-self.matrices // self.replicas)), norm)
        return self._phase("step", {"partition": self.shard, "temporary": flat})

    def gaps(self) -> int:
        """What a process on a CPU grows by at stage 3, over the first eight steps, beside its parts.

        Measured, not derived: activations, between which weights are gathered and let go, do not fit where
        those of the step before lay; where few wait, as blocks are recomputed, it is the room that the whole
        weights left when they were cut up, and that of gathered ones.
        """
        if not self.workload.on_cpu or self.stage < 3:
            return 0
        return max(self.activations.kept, self.weights + self._gathered())

    def gathering(self) -> Phase | None:
        """Weights are gathered; gloo, on CPUs, does it in a copy, and stage 3 also reduces in one."""
        if self.stage == 0 or self.replicas == 1 or not self.workload.on_cpu:
            return None
        if self.stage < 3:
            return self._phase("gathering", {"gloo": self.matrices})
        least = FLOAT * self.largest
        copies = max(self.gather_bucket, least) + max(self.reduce_bucket, least)
        return self._phase("gathering", {"gloo": copies})
