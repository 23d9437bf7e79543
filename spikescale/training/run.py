"""One pretraining run, told as a story: prepare, restore, step, watch, save, report."""

import contextlib
import dataclasses
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch

from spikescale.config import ModelConfig, RunConfig
from spikescale.data_pipeline.stream import Loader, split_tokens
from spikescale.data_pipeline.tokenizers import Tokenizer, load_tokenizer
from spikescale.errors import UserError
from spikescale.evaluation.language_model import LanguageModelResult
from spikescale.faults.anomalies import Judge, Verdict
from spikescale.faults.discard import discarded, was_dropped
from spikescale.faults.exits import RequeueError
from spikescale.faults.guard import Agreement, Guard
from spikescale.faults.inject import Injector
from spikescale.faults.neuron_health import NeuronHealth
from spikescale.model import SpikeGPT, language_model_loss
from spikescale.parallel import Layout
from spikescale.parallel.context import ContextRelay, part_of
from spikescale.parallel.tensor import tensor_parts
from spikescale.training import recovery
from spikescale.training.bootstrap import Process
from spikescale.training.checkpoint import Checkpoint, CheckpointFolder, seed_everything
from spikescale.training.checkpoint_files import read_checkpoint
from spikescale.training.clock import StepClock
from spikescale.training.console import TrainingConsole
from spikescale.training.dataset import Dataset
from spikescale.training.distillation import Teacher
from spikescale.training.engine import (
    build_engine,
    gradient_norm,
    local_gradient_norm,
    micro_batching,
    uses_fused_loss,
)
from spikescale.training.feed import Feed
from spikescale.training.flops import training_flops_per_token
from spikescale.training.introduction import introduce
from spikescale.training.records import RunRecords
from spikescale.training.report import final_report, sample_texts
from spikescale.training.samples import (
    context_length_at,
    document_starts,
    shortened,
    without_document_starts,
)
from spikescale.training.schedule import learning_rate
from spikescale.training.source_losses import SourceLosses
from spikescale.training.validation import validate
from spikescale.training.waiting import DataWaits

WAIT_ROUND_SECONDS = 1.0
WAIT_TOLD_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a rank reads from."""

    data: Dataset
    tokenizer: Tokenizer
    loader: Loader

    @classmethod
    def open(cls, config: RunConfig, layout: Layout, data: Dataset) -> "Inputs":
        """Open the tokenizer and this rank's part of the batches. Raises UserError."""
        tokenizer = load_tokenizer(data.tokenizer_folder)
        stream = data.stream(config.data, config.model.context_length)
        micro, _ = micro_batching(config, layout.data)
        loader = Loader(stream, config.train.batch_size, layout.data_rank, layout.data, micro)
        return cls(data, tokenizer, loader)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one step."""

    agreement: Agreement
    verdict: Verdict
    norm: float | None  # of the whole gradient, where the step was measured
    source_losses: dict[str, float]  # of a mixture, where the step was measured


class Pretraining:
    """One run: the model, its engine, its data and everything that watches it."""

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        layout: Layout,
        inputs: Inputs,
        guard: Guard | None = None,
    ) -> None:
        self.config, self.process, self.layout = config, process, layout
        self.data, self.tokenizer, self.loader = inputs.data, inputs.tokenizer, inputs.loader
        self.feed, self.guard, self.judge = Feed(inputs.loader), guard or Guard(), Judge(config.faults)
        train, model = config.train, config.model
        self.parts = tensor_parts(layout, model)
        self.model = SpikeGPT(model, seed=train.seed, parts=self.parts)
        self.model.activation_checkpointing = train.activation_checkpointing
        self.model.compact_activations = train.compact_activations
        self.fused_loss = uses_fused_loss(config, process.device)
        # Ranks of a tensor group must draw alike: they compute parts of one model.
        seed_everything(train.seed, process.rank // layout.tensor)
        self.engine = build_engine(self.model, config, process, layout)
        self.relay = ContextRelay.of(layout)
        self.teacher = Teacher.of(config, inputs.tokenizer, process.device)
        names = [part.name for part in self.data.parts]
        self.source_losses = SourceLosses(names, self.parts.token_losses, process.device)
        self.waits = DataWaits(self.data, process)
        self.tokens_per_step = train.batch_size * model.context_length
        self.validation: LanguageModelResult | None = None
        self.validated_step = 0
        self.step = self.saved_step = 0
        self.mean_firing_rate: float | None = None
        self.health = NeuronHealth(config.faults, self.model.neurons(), layout, process.device)
        self.injector = Injector(config.faults.inject, process.rank, config.folder, self.model)
        self.restore_note: str | None = None  # what a resume in another layout could not bring back

        self.checkpoints = CheckpointFolder(config.folder / "checkpoints", process, layout, self.parts.group)
        restored = self._restore()
        self.records = RunRecords(config, process, self.data, restored.state if restored else None)
        # Only now: compiled modules and restored weights must be the same objects.
        if train.compile:
            self.engine.compile()
        speaks = config.folder / "log.txt" if process.is_main else None
        self.console = TrainingConsole(train.steps, self.step, speaks)
        self.checkpoints.say = self.console.say

    def _restore(self) -> Checkpoint | None:
        checkpoint = None if self.config.resume == "never" else self.checkpoints.newest_valid()
        if checkpoint is None and self.config.resume == "must":
            raise UserError(f"resume = must: no usable checkpoint in {self.checkpoints.folder}")
        if checkpoint is None and self.config.branch_from is not None:
            checkpoint = self.checkpoints.of_another_run(self.config.branch_from)
        if checkpoint is None:
            return None
        written_for = ModelConfig.model_validate_json(checkpoint.state["model_json"])
        _require_same_model(written_for, self.config.model, checkpoint.folder)
        self.feed.load_state_dict(checkpoint.state["data"])
        self.restore_note = self.checkpoints.load(checkpoint, self.engine, self.config)
        self.judge.load_state_dict(checkpoint.state.get("faults", {}))
        self.health.load_state_dict(checkpoint.state.get("neurons", {}))
        self.step = self.saved_step = checkpoint.step
        return checkpoint

    def run(self) -> None:
        """Train to the last step, then evaluate whole splits, sample, and report."""
        config, console = self.config, self.console
        status = "FAILED"
        try:
            on_hang = functools.partial(recovery.note_hang, self)
            self.guard.begin(config.faults, self.process, config.folder, on_hang)
            self.peak = introduce(self)
            self.clock = StepClock(self.loader)
            self.records.event("start", self.step, ranks=self.process.world_size)
            recovery.require_data(self)
            while self.step < config.train.steps:
                self._advance()
            console.end_progress()
            with self.guard.patience("finishing"):
                self.checkpoints.finish()
                self.guard.stop.release()
                final_report(self)
                self._register_model()
            self.records.event("end", self.step)
            status = "FINISHED"
        except (KeyboardInterrupt, RequeueError):
            status = "KILLED"
            raise
        finally:
            self.feed.close()
            self.checkpoints.close()
            console.close()
            with self.guard.patience("closing the records"):
                self.records.close(status)
            self.guard.end()

    def _advance(self) -> None:
        """One step, and whatever is due after it. Raises RequeueError when any rank was asked to stop."""
        train = self.config.train
        started = time.perf_counter()
        logged = self._is_due(train.log_every, self.step + 1)
        outcome = self._train_step(self.feed.take(), measure=logged)
        self.step += 1
        self.guard.step_done()
        self.clock.count(time.perf_counter() - started, logged)
        self.console.step(self.step)
        if logged:
            self._log(outcome)
        if outcome.verdict.reason:
            recovery.note(self, outcome)
        if outcome.verdict.action == "roll-back":
            recovery.roll_back(self, outcome.verdict.reason)
        else:
            self._do_what_is_due()
        if outcome.agreement.unreadable:
            recovery.end_without_data(self)
        if outcome.agreement.stop:
            recovery.stop(self, outcome.agreement.stop)
        if outcome.agreement.unsaved:
            self.checkpoints.finish()
        self.checkpoints.poll()

    def _do_what_is_due(self) -> None:
        train = self.config.train
        saving = self._is_due(train.save_every, self.step) or self.step in train.save_at
        if (saving or self._is_due(train.evaluate_every, self.step)) and not self._validate():
            assert self.validation is not None
            recovery.roll_back(self, f"the validation loss is {self.validation.loss}")
            return
        # A checkpoint is good to go back to: none is made amid steps that had to be dropped.
        if saving and (not self.judge.bad_in_a_row or self.step == train.steps):
            self.save()
        if train.sample_count and train.sample_every and self.step % train.sample_every == 0:
            self._sample()

    def _train_step(self, micro_batches: list[torch.Tensor], measure: bool) -> Outcome:
        """One optimizer step, dropped where loss or gradient will not do. `measure`: neurons and norm."""
        train, engine = self.config.train, self.engine
        rate = learning_rate(self.step, train)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.injector.begin_step(self.step + 1)
        losses = torch.zeros((), device=self.process.device)
        sources = self._sources_of_rows(micro_batches) if measure else None
        length = context_length_at(self.step + 1, self.config.data, self.config.model.context_length)
        for index, tokens in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            tokens = shortened(tokens.to(self.process.device, non_blocking=True), length)
            tokens = part_of(tokens, self.layout)
            if measure and last:
                self._monitor_neurons(True)
            total, loss = self._losses(
                tokens[:, :-1], tokens[:, 1:], None if sources is None else sources[index]
            )
            engine.backward(self.injector.change_loss(total, self.feed.number))
            losses += self.injector.change_loss(loss.detach(), self.feed.number)
            if not last:
                engine.step()
        if measure:
            self._monitor_neurons(False)
        self.injector.within_step(self.step + 1)
        self.read_ahead()
        losses /= len(micro_batches)
        agreement = self.guard.agree(self.process, losses, self.feed.failed, self.checkpoints.failed)
        # At other stages DeepSpeed computes the norm within the step, and drops what is not finite.
        norm = local_gradient_norm(self.model, self.parts.group) if self.config.zero.stage == 0 else None
        verdict = self.judge.look_at(agreement.loss, norm)
        with contextlib.nullcontext() if verdict.action == "use" else discarded(engine):
            engine.step()
        if verdict.action == "use" and was_dropped(engine):
            verdict = Verdict("drop", "the gradient is not finite")
        if measure and norm is None:
            norm = gradient_norm(engine)
        by_source = self.source_losses.read() if sources is not None else {}
        return Outcome(agreement, self.judge.take(agreement.loss, verdict), norm, by_source)

    def _losses(
        self, tokens: torch.Tensor, targets: torch.Tensor, sources: np.ndarray | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss to minimise and the cross-entropy to report; `sources` of the rows: counted by source."""
        regulariser, eos = self.config.train.logit_regulariser, self.data.tokenizer.eos_id
        reset = document_starts(tokens, eos) if self.config.model.reset_at_documents else None
        if self.config.train.loss_mask == "document-start":
            targets = without_document_starts(tokens, targets, eos)
        if self.fused_loss:
            losses, _ = self.engine(
                tokens, reset=reset, targets=targets, regulariser=regulariser, relay=self.relay
            )
            return losses[0], losses[1].detach()
        logits, _ = self.engine(tokens, reset=reset, relay=self.relay)
        if sources is not None:
            self.source_losses.add(logits, targets, sources)
        if self.teacher is not None:
            return self.teacher.loss(logits, tokens, targets, reset, regulariser)
        if self.config.train.loss_mask != "none":
            return language_model_loss(logits, targets, regulariser, masked=True)
        return self.parts.loss(logits, targets, regulariser)

    def _sources_of_rows(self, micro_batches: list[torch.Tensor]) -> list[np.ndarray] | None:
        """The source of each row of each micro-batch, where they are mixed and their logits can be seen."""
        sources = self.loader.sources(self.feed.first)
        if sources is None or self.fused_loss:
            return None
        length = context_length_at(self.step + 1, self.config.data, self.config.model.context_length)
        rows = np.repeat(sources, self.config.model.context_length // length)
        return np.array_split(rows, len(micro_batches))

    def _monitor_neurons(self, on: bool) -> None:
        for _, neuron in self.model.neurons():
            neuron.monitor = on

    def _log(self, outcome: Outcome) -> None:
        health = self.health.observe()
        self.mean_firing_rate = health.mean_rate
        speed = self.clock.read()
        wait_share, told = self.waits.look(speed.wait_share)
        per_second = self.tokens_per_step / speed.seconds_per_step
        flops = per_second * training_flops_per_token(self.config.model)
        record = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loss": outcome.agreement.loss,
            "lr": learning_rate(self.step - 1, self.config.train),
            "gradient_norm": outcome.norm,
            "tokens_per_second": per_second,
            "flops_per_second": flops,
            "peak_share": flops / (self.peak * self.process.world_size),
            "data_wait_share": wait_share,
            "firing_rate": self.mean_firing_rate,
            "firing_rates": health.rates,
            "dead_neurons": health.dead,
            "saturated_neurons": health.saturated,
        }
        if outcome.source_losses:
            record["source_losses"] = outcome.source_losses
        if told:
            self.console.say(f"step {self.step}: {told}")
        self.console.log(record, (self.config.train.steps - self.step) * self.clock.seconds_per_step(speed))
        self.records.write(record)
        if self.step >= self.config.train.warmup_steps:
            for change in self.health.changes(health):
                self.console.say(f"step {self.step}: {change.sentence}")
                self.records.event(change.event, self.step, layer=change.layer, share=change.share)

    def read_ahead(self) -> str | None:
        """Have the next batch, or know that it cannot be had; or stop waiting for it: why the run is to stop.

        Data that are being made are waited for in rounds, in which ranks tell each other that they are alive.
        """
        began, told = time.monotonic(), 0.0
        while self.data.live:
            ready = self.feed.ready(WAIT_ROUND_SECONDS)
            if ready:
                self.feed.read_ahead()
            over, stop = self.guard.agree_on_waiting(
                self.process, self.process.device, ready, self.feed.failed
            )
            if over or stop:
                return None if over else stop
            waited = time.monotonic() - began
            if waited - told >= WAIT_TOLD_SECONDS:
                told = waited
                whose = self.waits.waited_for()
                self.console.say(f"step {self.step}: waiting for data{whose}, {waited:.0f} s so far")
        self.feed.read_ahead()
        return None

    def evaluate(self, split: str, limit: int | None = None) -> dict[str, LanguageModelResult]:
        """Loss over a split of each data set, of about `limit` tokens in all; every rank calls it.

        Of a mixture, each part has its share of the limit, and `combined` results weigh as the training
        tokens do.
        """
        micro, _ = micro_batching(self.config, self.layout.data)
        results = {}
        for part, share in self.data.shares(split):
            results[part.name] = validate(
                self.engine,
                split_tokens(part.manifest, split),
                context_length=self.config.model.context_length,
                batch_size=micro,
                eos_id=self.data.tokenizer.eos_id,
                layout=self.layout,
                device=self.process.device,
                token_losses=self.parts.token_losses,
                totals=part.manifest.totals(split),
                limit=None if limit is None else max(1, round(limit * share)),
                progress=self.guard.beat,
            )
        return results

    def combined(self, split: str, results: dict[str, LanguageModelResult]) -> LanguageModelResult:
        """One result over the parts of a split, each weighing as much as in training."""
        shares = {part.name: share for part, share in self.data.shares(split)}
        return LanguageModelResult.weighted([(results[name], share) for name, share in shares.items()])

    def _validate(self) -> bool:
        """Evaluate a part of the valid split; whether the loss is a number."""
        if not self.data.totals("valid").tokens:
            return True
        with self.guard.patience("evaluating"):
            results = self.evaluate("valid", self.config.train.evaluate_tokens)
        result = self.combined("valid", results)
        self.validation, self.validated_step = result, self.step
        self.console.say(
            f"step {self.step:>{len(str(self.config.train.steps))}}  valid loss {result.loss:.4f}"
            f"  ppl {result.perplexity:.2f}  bits/byte {result.bits_per_byte:.4f}"
            f"  bits/char {result.bits_per_character:.4f}  ({result.tokens} tokens)"
        )
        figures = {f"valid_{key}": value for key, value in dataclasses.asdict(result).items()}
        if self.data.mixed:
            figures["valid_source_losses"] = {name: part.loss for name, part in results.items()}
        self.records.write({"step": self.step, **figures})
        return math.isfinite(result.loss)

    def save(self) -> None:
        """Write a checkpoint of the state as it is."""
        state = {
            "step": self.step,
            "data": self.feed.state_dict(),
            "model_json": self.config.model.model_dump_json(),
            "faults": self.judge.state_dict(),
            "neurons": self.health.state_dict(),
        }
        metrics = {}
        if self.validation and self.validated_step == self.step:
            metrics = {
                "valid_loss": self.validation.loss,
                "valid_bits_per_byte": self.validation.bits_per_byte,
            }
        self.injector.begin_save(self.step, self.checkpoints.folder)
        with self.guard.patience("saving"):
            self.checkpoints.save(self.engine, self.config, self.tokenizer, state, metrics)
        self.saved_step = self.step

    def _register_model(self) -> None:
        """Hand the best checkpoint's model, or else the last one's, to the registry."""
        if self.process.is_main:
            name = self.checkpoints.best() or self.checkpoints.names()[-1]
            checkpoint = read_checkpoint(self.checkpoints.folder / name)
            self.records.register_model(checkpoint.folder, checkpoint.step, checkpoint.state["metrics"])

    def _sample(self) -> None:
        with self.guard.patience("sampling"):
            texts = sample_texts(self)
        self.records.write_samples(self.step, texts)
        for text in texts:
            self.console.say(f"--- sample at step {self.step}\n{text}")

    def _is_due(self, every: int, step: int) -> bool:
        return step == self.config.train.steps or (every > 0 and step % every == 0)


def _require_same_model(saved: ModelConfig, wanted: ModelConfig, folder: Path) -> None:
    for key in type(saved).model_fields:
        if key not in ("preset", "backend", "dropout", "context_length"):
            before, now = getattr(saved, key), getattr(wanted, key)
            if before != now:
                raise UserError(f"{folder}: was trained with model.{key} = {before}, this run has {now}")
