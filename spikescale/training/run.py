"""One pretraining run, told as a story: prepare, restore, step, watch, save, report."""

import dataclasses
import math
import time
from pathlib import Path

import torch

from spikescale.config import ModelConfig, RunConfig
from spikescale.data_pipeline.manifest import Manifest
from spikescale.data_pipeline.stream import Loader, TokenStream, split_tokens
from spikescale.data_pipeline.tokenizers import Tokenizer, load_tokenizer
from spikescale.errors import UserError
from spikescale.evaluation.language_model import LanguageModelResult
from spikescale.kernels.backend import build_operators, choose_backend
from spikescale.model import SpikeGPT
from spikescale.model.loss import language_model_loss
from spikescale.training.agreement import AgreedError
from spikescale.training.bootstrap import Process
from spikescale.training.checkpoint import Checkpoint, CheckpointFolder, seed_everything
from spikescale.training.console import TrainingConsole
from spikescale.training.engine import (
    build_engine,
    gradient_norm,
    local_gradient_norm,
    micro_batching,
    uses_fused_loss,
)
from spikescale.training.flops import measured_peak, training_flops_per_token
from spikescale.training.records import RunRecords
from spikescale.training.report import final_report, sample_texts
from spikescale.training.schedule import learning_rate
from spikescale.training.validation import validate

SLOW = " (the plain definition, slow; no compiled kernel serves this device)"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a rank reads from."""

    manifest: Manifest
    tokenizer: Tokenizer
    loader: Loader

    @classmethod
    def open(cls, config: RunConfig, process: Process, manifest: Manifest) -> "Inputs":
        """Open the tokenizer and this rank's part of the batches. Raises UserError."""
        data = config.data
        tokenizer = load_tokenizer(manifest.tokenizer_folder)
        stream = TokenStream(manifest, "train", config.model.context_length, data.seed, data.shuffle_window)
        micro, _ = micro_batching(config, process.world_size)
        loader = Loader(stream, config.train.batch_size, process.rank, process.world_size, micro)
        return cls(manifest, tokenizer, loader)


class Pretraining:
    """One run: the model, its engine, its data and everything that watches it."""

    def __init__(self, config: RunConfig, process: Process, inputs: Inputs) -> None:
        self.config, self.process = config, process
        self.manifest, self.tokenizer, self.loader = inputs.manifest, inputs.tokenizer, inputs.loader
        train, model = config.train, config.model
        self.model = SpikeGPT(model, seed=train.seed)
        self.model.activation_checkpointing = train.activation_checkpointing
        self.model.compact_activations = train.compact_activations
        self.fused_loss = uses_fused_loss(config, process.device)
        seed_everything(train.seed, process.rank)
        self.engine = build_engine(self.model, config, process)
        self.tokens_per_step = train.batch_size * model.context_length
        self.validation: LanguageModelResult | None = None
        self.step = 0

        self.checkpoints = CheckpointFolder(config.folder / "checkpoints", process)
        restored = self._restore()
        self.records = RunRecords(config, process, self.manifest, restored.state if restored else None)
        # Only now: compiled modules and restored weights must be the same objects.
        if train.compile:
            self.engine.compile()
        speaks = config.folder / "log.txt" if process.is_main else None
        self.console = TrainingConsole(train.steps, self.step, speaks)

    def _restore(self) -> Checkpoint | None:
        checkpoint = None if self.config.resume == "never" else self.checkpoints.newest_valid()
        if checkpoint is None:
            if self.config.resume == "must":
                raise UserError(f"resume = must: no usable checkpoint in {self.checkpoints.folder}")
            return None
        written_for = ModelConfig.model_validate_json(checkpoint.state["model_json"])
        _require_same_model(written_for, self.config.model, checkpoint.folder)
        self.loader.load_state_dict(checkpoint.state["data"])
        self.checkpoints.load(checkpoint, self.engine, self.config)
        self.step = checkpoint.step
        return checkpoint

    def run(self) -> None:
        """Train to the last step, then evaluate whole splits, sample, and report."""
        train, console = self.config.train, self.console
        status = "FAILED"
        try:
            self._introduce()
            self._watch_start()
            batches = iter(self.loader)
            while self.step < train.steps:
                started = time.perf_counter()
                logged = self._is_due(train.log_every, self.step + 1)
                loss, norm = self._train_step(next(batches), measure=logged)
                self.step += 1
                self._count_time(time.perf_counter() - started, logged)
                console.step(self.step)
                if logged:
                    self._log(loss, norm)
                saving = self._is_due(train.save_every, self.step)
                if saving or self._is_due(train.evaluate_every, self.step):
                    self._validate()
                if saving:
                    self._save()
                if train.sample_count and train.sample_every and self.step % train.sample_every == 0:
                    self._sample()
            console.end_progress()
            final_report(self)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self.loader.close()
            console.close()
            self.records.close(status)

    def _train_step(self, micro_batches: list[torch.Tensor], measure: bool) -> tuple[float, float | None]:
        """One optimizer step. With `measure`, the mean loss over all ranks and the gradient norm."""
        train, engine = self.config.train, self.engine
        rate = learning_rate(self.step, train)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        losses = torch.zeros((), device=self.process.device)
        norm = None
        for index, tokens in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            tokens = tokens.to(self.process.device, non_blocking=True)
            if measure and last:
                self._monitor_neurons(True)
            total, loss = self._losses(tokens[:, :-1], tokens[:, 1:])
            engine.backward(total)
            losses += loss.detach()
            if measure and last and self.config.zero.stage == 0:
                norm = local_gradient_norm(self.model)
            engine.step()
        if not measure:
            return 0.0, None
        self._monitor_neurons(False)
        losses /= len(micro_batches)
        if self.process.world_size > 1:
            torch.distributed.all_reduce(losses)
            losses /= self.process.world_size
        return float(losses), norm if norm is not None else gradient_norm(engine)

    def _losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss to minimise and the cross-entropy to report."""
        regulariser = self.config.train.logit_regulariser
        if self.fused_loss:
            losses, _ = self.engine(tokens, targets=targets, regulariser=regulariser)
            return losses[0], losses[1].detach()
        logits, _ = self.engine(tokens)
        return language_model_loss(logits, targets, regulariser)

    def _monitor_neurons(self, on: bool) -> None:
        for _, neuron in self.model.neurons():
            neuron.monitor = on

    def firing_rates(self) -> dict[str, float]:
        """Share of tokens at which a neuron of each layer fired, in the last monitored pass."""
        named = self.model.neurons()
        if not named:
            return {}
        rates = torch.stack([neuron.firing_rate.to(self.process.device) for _, neuron in named])
        if self.process.world_size > 1:
            torch.distributed.all_reduce(rates)
            rates /= self.process.world_size
        return {name: rate for (name, _), rate in zip(named, rates.tolist(), strict=True)}

    def _watch_start(self) -> None:
        self.seconds, self.timed_steps, self.waited = 0.0, 0, self.loader.wait_seconds
        self.total_seconds, self.total_steps = 0.0, 0
        self.warm = False
        self.mean_firing_rate: float | None = None

    def _count_time(self, seconds: float, logged: bool) -> None:
        # The first step builds kernels and allocates; it counts only where it is the only one to report.
        if self.warm or logged:
            self.seconds += seconds
            self.timed_steps += 1
        if self.warm:
            self.total_seconds += seconds
            self.total_steps += 1
        else:
            self.warm, self.waited = True, self.loader.wait_seconds if not logged else self.waited

    def _log(self, loss: float, norm: float | None) -> None:
        rates = self.firing_rates()
        self.mean_firing_rate = mean_of_blocks(rates)
        per_second = self.tokens_per_step * self.timed_steps / self.seconds
        flops = per_second * training_flops_per_token(self.config.model)
        record = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loss": loss,
            "lr": learning_rate(self.step - 1, self.config.train),
            "gradient_norm": norm,
            "tokens_per_second": per_second,
            "flops_per_second": flops,
            "peak_share": flops / (self.peak * self.process.world_size),
            "data_wait_share": (self.loader.wait_seconds - self.waited) / self.seconds,
            "firing_rate": self.mean_firing_rate,
            "firing_rates": rates,
        }
        average = self.total_seconds / self.total_steps if self.total_steps else self.seconds
        self.console.log(record, (self.config.train.steps - self.step) * average)
        self.records.write(record)
        if not math.isfinite(loss):
            raise AgreedError(
                f"step {self.step}: the loss is {loss}; lower train.lr or raise train.warmup_steps: it goes"
                f" on from its last checkpoint in {self.checkpoints.folder}"
            )
        self.seconds, self.timed_steps, self.waited = 0.0, 0, self.loader.wait_seconds

    def evaluate(self, split: str, limit: int | None = None) -> LanguageModelResult:
        """Loss over a split (its first `limit` tokens); every rank calls it."""
        micro, _ = micro_batching(self.config, self.process.world_size)
        return validate(
            self.engine,
            split_tokens(self.manifest, split),
            context_length=self.config.model.context_length,
            batch_size=micro,
            eos_id=self.manifest.tokenizer.eos_id,
            process=self.process,
            totals=self.manifest.totals(split),
            limit=limit,
        )

    def _validate(self) -> None:
        if not self.manifest.totals("valid").tokens:
            return
        result = self.evaluate("valid", self.config.train.evaluate_tokens)
        self.validation = result
        self.console.say(
            f"step {self.step:>{len(str(self.config.train.steps))}}  valid loss {result.loss:.4f}"
            f"  ppl {result.perplexity:.2f}  bits/byte {result.bits_per_byte:.4f}"
            f"  bits/char {result.bits_per_character:.4f}  ({result.tokens} tokens)"
        )
        figures = {f"valid_{key}": value for key, value in dataclasses.asdict(result).items()}
        self.records.write({"step": self.step, **figures})
        if not math.isfinite(result.loss):
            raise AgreedError(
                f"step {self.step}: the validation loss is {result.loss}; nothing was saved, the run goes on"
                f" from its last checkpoint in {self.checkpoints.folder}"
            )

    def _save(self) -> None:
        state = {
            "step": self.step,
            "data": self.loader.state_dict(),
            "model_json": self.config.model.model_dump_json(),
        }
        metrics = {}
        if self.validation:
            metrics = {
                "valid_loss": self.validation.loss,
                "valid_bits_per_byte": self.validation.bits_per_byte,
            }
        folder = self.checkpoints.save(self.engine, self.config, self.tokenizer, state, metrics)
        self.console.say(f"saved {folder}")

    def _sample(self) -> None:
        texts = sample_texts(self)
        self.records.write_samples(self.step, texts)
        for text in texts:
            self.console.say(f"--- sample at step {self.step}\n{text}")

    def _is_due(self, every: int, step: int) -> bool:
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def _introduce(self) -> None:
        config, model = self.config, self.config.model
        dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
        self.peak = measured_peak(self.process.device, dtype)
        totals = self.manifest.totals("train")
        micro, accumulation = micro_batching(config, self.process.world_size)
        self.console.say(
            f"{config.name}: {model.variant}, {model.layers} layers, width {model.width},"
            f" {self.model.count_parameters(embeddings=True) / 1e6:.2f}M parameters"
            f" ({self.model.count_parameters(embeddings=False) / 1e6:.2f}M without embeddings)"
        )
        self.console.say(
            f"data {self.manifest.folder}: {totals.tokens} tokens, {totals.documents} documents to train on,"
            f" {config.train.steps * self.tokens_per_step / totals.tokens:.2f} epochs planned"
        )
        self.console.say(
            f"{self.process.world_size} rank(s) on {self.process.device.type}, {torch.get_num_threads()}"
            f" threads each, ZeRO {config.zero.stage}, {config.train.precision}, {micro} x {accumulation}"
            f" sequences a rank and step, peak {self.peak / 1e12:.3f} TFLOP/s a rank (measured)"
        )
        if self.process.device.type == "cpu":
            build_operators(model.backend)
        kernels = choose_backend("wkv", model.backend, self.process.device.type, dtype)
        loss = ", loss fused with the head" if self.fused_loss else ""
        self.console.say(f"kernels: {kernels}{SLOW if kernels == 'reference' else ''}{loss}")
        if not self.manifest.totals("valid").tokens:
            self.console.say("no validation split: nothing is validated, and no checkpoint is the best")
        if self.step:
            self.console.say(f"resumed at step {self.step}")
        if self.step >= config.train.steps:
            self.console.say(f"train.steps = {config.train.steps} are done already; only the report is left")


def mean_of_blocks(rates: dict[str, float]) -> float | None:
    """Mean over the layers' neurons without the binary embedding; None when there are none."""
    inner = [rate for name, rate in rates.items() if not name.startswith("embedding")]
    return sum(inner) / len(inner) if inner else None


def _require_same_model(saved: ModelConfig, wanted: ModelConfig, folder: Path) -> None:
    for key in type(saved).model_fields:
        if key not in ("preset", "backend", "dropout", "context_length"):
            before, now = getattr(saved, key), getattr(wanted, key)
            if before != now:
                raise UserError(f"{folder}: was trained with model.{key} = {before}, this run has {now}")
