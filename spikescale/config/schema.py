"""The settings of a run as one tree of pydantic models.

Unknown keys, wrong types and values out of range are refused here, once, so that no other module
checks its settings. Units: lengths in tokens, batch sizes in sequences, times in optimizer steps
unless a name says otherwise.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
MomentDecay = Annotated[float, Field(ge=0, lt=1)]

# Text, because a path would make one slash of a URL's two.
Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]

Variant = Literal["rwkv", "heaviside-rwkv", "spikegpt-b", "spikegpt", "spikegpt-driven"]


class Strict(BaseModel):
    """A group of settings: no unknown keys, no silent conversion, unchanging once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class NeuronConfig(Strict):
    """Leaky integrate-and-fire neuron along the token axis (SpikeGPT, Sec. 3.2)."""

    tau: Annotated[float, Field(ge=1)] = 2.0
    v_threshold: Annotated[float, Field(gt=0)] = 1.0
    v_reset: float = 0.0
    soft_reset: bool = False
    detach_reset: bool = False
    surrogate_alpha: Annotated[float, Field(gt=0)] = 2.0
    learn_tau: bool = False  # a time constant for each channel, learnt, from tau on (Fang et al. 2021)
    learn_threshold: bool = False  # a threshold for each channel, learnt, from v_threshold on
    bits: Annotated[int, Field(ge=1, le=8)] = 1  # graded spikes: whole numbers from 0 to 2^bits - 1
    signed: bool = False  # spikes have a sign: from -(2^bits - 1) to 2^bits - 1
    normalise_current: bool = False  # divide each token's currents by their root mean square over channels

    @property
    def levels(self) -> int:
        """The largest spike."""
        return int(2**self.bits - 1)

    @property
    def learned(self) -> bool:
        """Whether neurons have parameters."""
        return self.learn_tau or self.learn_threshold

    @property
    def plain(self) -> bool:
        """Whether all is as in SpikeGPT: fixed constants, spikes of 0 and 1, currents as they come."""
        return not (self.learned or self.bits > 1 or self.signed or self.normalise_current)

    @model_validator(mode="after")
    def _learnable(self) -> "NeuronConfig":
        if self.learn_tau and self.tau == 1:
            raise ValueError("learn_tau needs tau > 1: it learns a number from 1 on, and 1 is its border")
        return self


class ModelConfig(Strict):
    """Shape and kind of a SpikeGPT model."""

    preset: str | None = None
    variant: Variant = "spikegpt"
    layers: Positive = 4
    width: Positive = 128
    vocab_size: Annotated[int, Field(ge=2)] | None = None  # None: the tokenizer's
    context_length: Positive = 256
    binary_embedding: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    neuron: NeuronConfig = NeuronConfig()
    width_transfer: Positive | None = None  # muP: the width that the learning rate was tuned at; None: off
    reset_at_documents: bool = False  # the end of a document clears the state: the next one starts afresh
    backend: Literal["auto", "reference", "cpu", "cpu-avx512", "cpu-avx2", "cpu-plain", "triton"] = "auto"

    @model_validator(mode="after")
    def _float_embedding_without_neurons(self) -> "ModelConfig":
        if self.variant == "rwkv" and self.binary_embedding:
            raise ValueError("variant rwkv has no neurons: binary_embedding must be false")
        return self

    @model_validator(mode="after")
    def _neurons_to_change(self) -> "ModelConfig":
        if self.variant in ("rwkv", "heaviside-rwkv") and not self.neuron.plain:
            changed = ", ".join(sorted(self.neuron.model_dump(exclude_defaults=True)))
            raise ValueError(f"variant {self.variant} has no membranes, for which neuron.{changed} are meant")
        return self


class StreamConfig(Strict):
    """Text that is tokenised while the run trains on it; see `spikescale data prepare` for the meanings."""

    source: tuple[str, ...]  # a name, or files, globs, folders
    catalogs: tuple[Path, ...] = ()
    tokenizer: str = "byte"
    eos: str | None = None
    workers: Positive = 1  # processes that tokenise
    ray: Literal["local", "cluster", "none"] = "local"  # a fresh Ray, a running one, or one plain process
    ray_address: str | None = None  # of the running cluster: auto, host:port or ray://host:port
    look_ahead_shards: Positive = 16  # made beyond those that are being read
    look_ahead_mib: Positive = 4096  # of their token files
    text_key: str | None = None
    split_on: str | None = None
    format: Literal["text", "jsonl", "parquet"] | None = None
    encoding: str | None = None
    partition_mib: Annotated[float, Field(gt=0)] | None = None
    limit_documents: Positive | None = None
    valid_fraction: Fraction = 0.05
    test_fraction: Fraction = 0.05
    tokenizer_sample_mchars: Annotated[float, Field(gt=0)] = 10.0
    condition_on: tuple[str, ...] = ()
    condition_dropout: Fraction = 0.1
    bad_records: Literal["refuse", "quarantine"] = "refuse"
    max_bad_share: Fraction = 0.01
    clean: dict[str, Any] = {}  # stages of `CleanSettings`; the whole corpus is cleaned before the first step

    @model_validator(mode="after")
    def _cluster_has_an_address(self) -> "StreamConfig":
        if not self.source:
            raise ValueError("source is empty: name a source, or files")
        if (self.ray == "cluster") != (self.ray_address is not None):
            raise ValueError("ray_address goes with ray = cluster, and only with it")
        return self


class SourceConfig(Strict):
    """One data set of a mixture."""

    path: Location  # a folder, or a URL of what `spikescale data push` wrote
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None  # None: the folder's
    weight: Annotated[float, Field(gt=0)] | None = None  # share of the tokens, relative to the others'
    epochs: Annotated[float, Field(gt=0)] | None = None  # passes over it while the others make theirs
    stream: StreamConfig | None = None  # with data.mode = streaming: it is prepared in path meanwhile

    @property
    def label(self) -> str:
        """How the source is called in metrics."""
        return self.name or Path(self.path).name

    @property
    def place(self) -> str:
        """The same for two sources exactly if their data are in one place."""
        return self.path if "://" in self.path else str(Path(self.path).resolve())


class CurriculumStage(Strict):
    """Steps in which samples are cut into shorter ones."""

    until_step: Positive  # the last step of this stage
    context_length: Positive  # divides model.context_length


class DataConfig(Strict):
    """Prepared data and the order in which it is read: one data set (path), or a mixture (sources)."""

    path: Location | None = None  # a folder, or a URL of what `spikescale data push` wrote
    mode: Literal["prepared", "streaming"] = "prepared"  # streaming: prepared while the run reads it
    stream: StreamConfig | None = None  # what is prepared in path; in a mixture each source has its own
    sources: tuple[SourceConfig, ...] = ()
    curriculum: tuple[CurriculumStage, ...] = ()  # after its last stage: model.context_length
    shuffle_window: Positive = 8  # shards whose samples are mixed with one another
    seed: Count = 0
    verify: Literal["full", "size"] = "full"  # checksum every shard at start, or compare sizes only

    @model_validator(mode="after")
    def _one_way(self) -> "DataConfig":
        if self.path is None and not self.sources:
            raise ValueError("data.path is missing (or data.sources, for a mixture)")
        if self.path is not None and self.sources:
            raise ValueError("data.path and data.sources are both given: a mixture has no path of its own")
        if self.sources:
            self._require_mixture()
        if self.mode == "prepared" and self.stream is not None:
            raise ValueError("data.stream is given, but data.mode is prepared: set it to streaming")
        if self.mode == "streaming":
            self._require_streams()
        ends = [stage.until_step for stage in self.curriculum]
        if ends != sorted(set(ends)):
            raise ValueError(f"data.curriculum: until_step must grow from stage to stage, not {ends}")
        return self

    def _require_mixture(self) -> None:
        kinds = {(source.weight is not None, source.epochs is not None) for source in self.sources}
        if kinds not in ({(True, False)}, {(False, True)}):
            raise ValueError("data.sources: give every source a weight, or every source its epochs")
        labels = [source.label for source in self.sources]
        if len(set(labels)) < len(labels):
            raise ValueError(f"data.sources: names must differ, not {', '.join(labels)}; set name")
        places: dict[str, str] = {}
        for source in self.sources:
            other = places.setdefault(source.place, source.label)
            if other != source.label:
                raise ValueError(f"data.sources: {other} and {source.label} have the same path")
            if source.stream is not None and self.mode == "prepared":
                raise ValueError(
                    f"data.sources: {source.label} has a stream, but data.mode is prepared: set it to"
                    " streaming"
                )

    def _require_streams(self) -> None:
        if not self.sources and (self.path is None or self.stream is None):
            raise ValueError("data.mode = streaming needs data.path (a folder to write to) and data.stream")
        if self.sources and self.stream is not None:
            raise ValueError("data.stream goes with data.path: in a mixture each of data.sources has its own")
        streamed = [part for part in self.parts if part.stream is not None]
        if not streamed:
            raise ValueError("data.mode = streaming needs a stream in at least one of data.sources")
        for part in streamed:
            if part.epochs is not None:
                raise ValueError(
                    f"data.sources: {part.label} is streamed, so its tokens are not known yet: give every"
                    " source a weight in place of epochs"
                )
            if "://" in part.path:
                where = f"the path of {part.label} in data.sources" if self.sources else "data.path"
                raise ValueError(f"data.mode = streaming needs a folder in {where}, not a URL")

    @property
    def parts(self) -> tuple[SourceConfig, ...]:
        """The data sets: the sources, or the single one as a mixture of itself alone."""
        if self.path is None:
            return self.sources
        return (SourceConfig(path=self.path, weight=1.0, stream=self.stream),)


class ZeroConfig(Strict):
    """How DeepSpeed shards the training state over ranks."""

    preset: str | None = None
    stage: Annotated[int, Field(ge=0, le=3)] = 1
    reduce_bucket_size: Positive = 20_000_000  # elements
    allgather_bucket_size: Positive = 20_000_000  # elements
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"  # where the optimizer's state lives
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"  # where sharded weights wait (stage 3)
    nvme_path: Path | None = None  # folder on a fast local disk, for nvme

    @model_validator(mode="after")
    def _possible(self) -> "ZeroConfig":
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError("offload_optimizer needs a stage from 1 to 3: at stage 0 nothing is sharded")
        if self.offload_optimizer == "nvme" and self.stage != 3:
            raise ValueError("offload_optimizer = nvme needs stage 3")
        if self.offload_parameters != "none" and self.stage != 3:
            raise ValueError("offload_parameters needs stage 3, where weights are sharded")
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and self.nvme_path is None:
            raise ValueError("nvme_path is missing: offloading to nvme needs a folder on a local disk")
        return self


class ParallelConfig(Strict):
    """How one model and one sequence are divided over ranks; the ranks left over share the batch.

    Ranks are numbered with the tensor index fastest, then the context index, then the data index.
    """

    tensor: Positive = 1  # ranks that each hold a part of the channels and of the vocabulary
    context: Positive = 1  # ranks that each read a part of every sequence

    @model_validator(mode="after")
    def _possible(self) -> "ParallelConfig":
        if self.tensor > 1 and self.context > 1:
            raise ValueError("tensor and context do not go together: set one of them to 1")
        return self


class FaultConfig(Strict):
    """What a run does when something goes wrong while it trains."""

    nonfinite_limit: Positive = 3  # steps in a row with a loss or gradient that is not finite, then roll back
    spike_window: Annotated[int, Field(ge=8)] = 64  # steps whose losses a new one is compared with
    spike_z: Annotated[float, Field(gt=0)] = 8.0  # robust z-score from which a loss counts as a spike
    spike_action: Literal["off", "warn", "skip", "roll-back"] = "warn"
    rollback_limit: Count = 3  # roll-backs of one run, then it ends
    hang_seconds: Annotated[float, Field(ge=0)] = 1800.0  # without a step, then stacks are dumped; 0: never
    dead_rate: Fraction = 0.0  # a neuron that fires at no more of its tokens is dead
    saturated_rate: Fraction = 0.95  # one that fires at no less is saturated
    silent_share: Fraction = 0.9  # dead neurons in a layer from which on it is warned of
    saturated_share: Fraction = 0.5  # saturated neurons in a layer from which on it is warned of
    inject: str = ""  # faults on purpose, for tests: see docs/faults.md

    @field_validator("inject")
    @classmethod
    def _known_faults(cls, text: str) -> str:
        from spikescale.faults.plan import parse_faults

        parse_faults(text)
        return text


class TrainConfig(Strict):
    """The training recipe."""

    steps: Positive = 1000
    batch_size: Positive = 16  # sequences an optimizer step, over all ranks
    micro_batch_size: Positive | None = None  # sequences a rank and a forward pass; None: all at once
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    min_lr: Annotated[float, Field(ge=0)] = 1e-4
    warmup_steps: Count = 100
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_fraction: Fraction = 0.2  # wsd: the share of the steps over which the rate decays
    decay_shape: Literal["linear", "1-sqrt"] = "linear"  # wsd: how it decays
    betas: tuple[MomentDecay, MomentDecay] = (0.9, 0.99)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 1.0  # norm of the whole gradient; 0: no clipping
    logit_regulariser: Annotated[float, Field(ge=0)] = 1e-4
    loss_mask: Literal["none", "document-start"] = "none"  # do not learn to guess how a document begins
    distill_from: Path | None = None  # a trained model whose predictions are learnt beside the text
    distill_weight: Fraction = 0.5  # of the divergence from them; the text's loss has the rest
    distill_temperature: Annotated[float, Field(gt=0)] = 1.0  # both logits are divided by it
    precision: Literal["auto", "float32", "bfloat16"] = "float32"  # auto: bfloat16 where the hardware has it
    activation_checkpointing: bool = False  # recompute blocks in backward instead of keeping activations
    compact_activations: bool = True  # keep spikes as bits and recomputed blocks' inputs as counts of spikes
    fused_loss: Literal["auto", "on", "off"] = "auto"  # head and loss without all logits at once (GPUs)
    compile: bool = False
    threads: Positive | None = None  # CPU threads a rank; None: the cores divided by the ranks
    log_every: Positive = 10
    evaluate_every: Count = 200  # 0: only when a checkpoint is saved
    evaluate_tokens: Positive = 65536  # tokens of the valid split read in each such evaluation
    final_evaluation_tokens: Positive = 10_000_000  # read at most of each split for the final table
    sample_every: Count = 0  # 0: only at the end
    sample_tokens: Positive = 256
    sample_count: Count = 3
    sample_prompt: str = ""
    temperature: Annotated[float, Field(gt=0)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    trigram_baseline: bool = False  # fit a byte trigram model on the training text, for the final table
    save_every: Count = 200  # 0: only at the end
    save_at: tuple[Positive, ...] = ()  # steps whose checkpoints are written besides, and stay
    save_async: bool = False  # copy the state and go on; write it in the background
    keep_last: Positive = 2
    seed: Count = 0

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not exceed lr ({self.lr})")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must not exceed steps ({self.steps})")
        return self


class MlflowConfig(Strict):
    """Where the run is tracked."""

    enabled: bool = True
    uri: str | None = None  # None: sqlite:///<output>/mlflow.db
    experiment: str = "spikescale"
    parent_run: str | None = None  # id of the run that this one is shown under
    tags: dict[str, str] = {}  # of the run, besides what is always recorded
    register_model: bool = True  # store a finished run's best model, and make a version in the registry of it
    model_name: str | None = None  # in the registry; None: the run's name


class RunConfig(Strict):
    """Everything one pretraining run is defined by."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    output: Path = Path("runs")  # the run's files go to <output>/<name>
    resume: Literal["auto", "never", "must"] = "auto"
    branch_from: Path | None = None  # a checkpoint of another run, which this one continues while it has none
    model: ModelConfig = ModelConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    parallel: ParallelConfig = ParallelConfig()
    faults: FaultConfig = FaultConfig()
    mlflow: MlflowConfig = MlflowConfig()

    @model_validator(mode="after")
    def _supported_together(self) -> "RunConfig":
        if self.zero.stage == 3 and self.train.compile:
            raise ValueError("train.compile does not work with zero.stage 3: use a stage up to 2")
        tensor, context = self.parallel.tensor, self.parallel.context
        if tensor > 1 and self.zero.stage == 3:
            raise ValueError("parallel.tensor does not work with zero.stage 3: use a stage up to 2")
        if context > 1 and self.zero.stage > 1:
            # Stage 2 would save nothing: a rank needs its whole gradient until backward is through.
            raise ValueError(
                f"parallel.context does not work with zero.stage {self.zero.stage}, in which ranks wait for"
                " one another while backward runs: use stage 1"
            )
        neuron = self.model.neuron
        if tensor > 1 and (neuron.learned or neuron.normalise_current):
            raise ValueError(
                "parallel.tensor does not work with model.neuron.learn_tau, learn_threshold or"
                " normalise_current"
            )
        if self.train.distill_from is not None:
            if max(tensor, context) > 1:
                raise ValueError("train.distill_from does not work with parallel.tensor or parallel.context")
            if self.train.loss_mask != "none" or self.train.fused_loss == "on":
                raise ValueError(
                    "train.distill_from does not work with train.loss_mask or train.fused_loss = on"
                )
        if self.model.width % tensor:
            raise ValueError(f"parallel.tensor = {tensor} does not divide model.width = {self.model.width}")
        if self.model.context_length % context:
            raise ValueError(
                f"parallel.context = {context} does not divide"
                f" model.context_length = {self.model.context_length}"
            )
        for stage in self.data.curriculum:
            if self.model.context_length % stage.context_length or stage.context_length % context:
                raise ValueError(
                    f"data.curriculum: context_length {stage.context_length} must divide model.context_length"
                    f" = {self.model.context_length} and be divisible by parallel.context = {context}"
                )
        if self.train.compile and self.data.curriculum:
            raise ValueError("train.compile does not work with data.curriculum: shapes change")
        if self.train.loss_mask != "none" and (tensor > 1 or self.train.fused_loss == "on"):
            raise ValueError("train.loss_mask does not work with parallel.tensor or train.fused_loss = on")
        if self.train.compile and max(tensor, context) > 1:
            raise ValueError("train.compile does not work with parallel.tensor or parallel.context")
        return self

    @property
    def folder(self) -> Path:
        """The folder that holds everything this run writes."""
        return self.output / self.name
