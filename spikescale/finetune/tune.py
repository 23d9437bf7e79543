"""Fine-tuning in one process: from a loaded model and new text to a merged model and what it cost."""

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikescale.config import TrainConfig
from spikescale.errors import UserError
from spikescale.evaluation.language_model import (
    LanguageModelResult,
    count_conditions,
    document_resets,
    evaluate_tokens,
)
from spikescale.evaluation.texts import EvaluatedText
from spikescale.finetune.methods import Tuning
from spikescale.finetune.progress import Figures, load_progress, save_progress
from spikescale.finetune.texts import TuningText
from spikescale.model import language_model_loss
from spikescale.training.parameter_groups import parameter_groups
from spikescale.training.schedule import learning_rate

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer
    from spikescale.model import SpikeGPT


@dataclass(frozen=True)
class TuneSettings:
    """How long and how fast; `train` holds steps, batch, rates and the optimizer's settings."""

    train: TrainConfig
    context_length: int
    test_tokens: int | None = None  # at most so many of the test text; None: all of it


@dataclass(frozen=True)
class TuneResult:
    """What came of it.

    Attributes:
        before, after: on the test text; kept_before, kept_after: on text that the model knew, if any.
        best_step: of the lowest validation loss; its weights are the result. 0: the model as it was.
        best_valid_loss: that loss, in nats a token.
        trainable, total: parameters.
        state_bytes: of all weights, and of gradients and Adam's moments of those that are trained.
        peak_bytes: of the process at most so far (CPU) or of tensors on the GPU.
        seconds, cpu_seconds: of the training steps, evaluations left out; CPU time is that of all threads.
    """

    before: LanguageModelResult
    after: LanguageModelResult
    kept_before: LanguageModelResult | None
    kept_after: LanguageModelResult | None
    best_step: int
    best_valid_loss: float
    trainable: int
    total: int
    state_bytes: int
    peak_bytes: int
    seconds: float
    cpu_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


class Tuner:
    """One tuning: trains what `tuning` says, keeps the weights of the best validation loss, judges them.

    Args:
        tuning: the model and what is trained of it.
        text: what it is tuned and judged on; kept: text that it knew.
        record: is given the figures of logged steps and evaluations.
        folder: where progress is saved after each evaluation, and found by a tuning of the same `identity`
            (settings, data, base); None: nowhere.
        adapter: a folder for adapters alone.

    Raises UserError when nothing is left to train, and for progress of other settings.
    """

    def __init__(
        self,
        tuning: Tuning,
        tokenizer: "Tokenizer",
        text: TuningText,
        settings: TuneSettings,
        *,
        kept: EvaluatedText | None = None,
        record: Callable[[dict[str, Any]], None] | None = None,
        folder: Path | None = None,
        identity: dict[str, Any] | None = None,
        adapter: Path | None = None,
    ) -> None:
        self.tuning, self.model, self.tokenizer = tuning, tuning.model, tokenizer
        self.text, self.kept, self.settings, self.train = text, kept, settings, settings.train
        self._record, self._folder, self._identity, self._adapter = record, folder, identity or {}, adapter
        self.device = next(self.model.parameters()).device
        self.autocast = torch.bfloat16 if self.train.precision == "bfloat16" else None
        torch.manual_seed(self.train.seed)
        self.parameters = tuning.trainable()
        if not self.parameters:
            raise UserError("nothing is left to train: freeze fewer layers")
        train = self.train
        groups = parameter_groups(self.parameters.items(), self.model.config, train.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps)
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        found = None
        if folder is not None:
            found = load_progress(folder, self._identity, self.parameters, self.best, self.optimizer)
        self.resumed, self.figures = found is not None, found or Figures()

    def run(self) -> TuneResult:
        """To the last step and the final figures. Raises UserError when the loss is not finite."""
        figures, limit = self.figures, self.settings.test_tokens
        if not self.resumed:
            figures.before = self._judge(self.text.test, limit).as_dict()
            if self.kept is not None:
                figures.kept_before = self._judge(self.kept, limit).as_dict()
            self._evaluate()
        while figures.step < self.train.steps:
            self._step()
            every = self.train.evaluate_every
            if figures.step == self.train.steps or (every and figures.step % every == 0):
                self._evaluate()
                if self._folder is not None:
                    save_progress(
                        self._folder, self._identity, figures, self.parameters, self.best, self.optimizer
                    )
        return self._finish()

    def _step(self) -> None:
        """One optimizer step."""
        train, figures = self.train, self.figures
        began, cpu_began = time.perf_counter(), time.process_time()
        rate = learning_rate(figures.step, train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.model.train()
        rows = self.text.samples.rows(figures.step * train.batch_size, train.batch_size).to(self.device)
        loss = 0.0
        self.optimizer.zero_grad(set_to_none=False)
        for part in rows.split(train.micro_batch_size or train.batch_size):
            inputs, targets = part[:, :-1], part[:, 1:]
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                logits, _ = self.model(inputs, **document_resets(self.model, inputs, self.tokenizer.eos_id))
            total, reported = language_model_loss(logits, targets, train.logit_regulariser)
            share = len(part) / len(rows)
            (total * share).backward()
            loss += float(reported) * share
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), train.clip or math.inf))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(f"step {figures.step + 1}: the loss or its gradient is not finite; lower --lr")
        self.optimizer.step()
        figures.step += 1
        figures.seconds += time.perf_counter() - began
        figures.cpu_seconds += time.process_time() - cpu_began
        if figures.step % train.log_every == 0 or figures.step == train.steps:
            tokens = figures.step * train.batch_size * self.settings.context_length
            per_second = tokens / figures.seconds
            self._note(loss=loss, lr=rate, gradient_norm=norm, tokens=tokens, tokens_per_second=per_second)

    def _evaluate(self) -> None:
        """The validation loss; the weights are kept when it is the lowest so far."""
        result = self._judge(self.text.valid, self.train.evaluate_tokens)
        self._note(**{f"valid_{name}": value for name, value in result.as_dict().items()})
        if result.loss < self.figures.best_loss:
            self.figures.best_loss, self.figures.best_step = result.loss, self.figures.step
            for name, p in self.parameters.items():
                self.best[name].copy_(p.detach())

    def _finish(self) -> TuneResult:
        figures, limit = self.figures, self.settings.test_tokens
        held = state_bytes(self.model, self.optimizer)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.best[name])
        if self._adapter is not None:
            self.tuning.save_adapter(self._adapter)
        # Only now: the figures are those of the model that is saved.
        self.tuning.merged_weights()
        assert figures.before is not None
        kept_before = figures.kept_before
        return TuneResult(
            before=LanguageModelResult(**figures.before),
            after=self._judge(self.text.test, limit),
            kept_before=None if kept_before is None else LanguageModelResult(**kept_before),
            kept_after=None if self.kept is None else self._judge(self.kept, limit),
            best_step=figures.best_step,
            best_valid_loss=figures.best_loss,
            trainable=sum(p.numel() for p in self.parameters.values()),
            total=self.tuning.total,
            state_bytes=held,
            peak_bytes=peak_bytes(self.device),
            seconds=figures.seconds,
            cpu_seconds=figures.cpu_seconds,
        )

    def _judge(self, text: EvaluatedText, limit: int | None) -> LanguageModelResult:
        length, batch = self.settings.context_length, self.train.batch_size
        return evaluated(self.model, text, self.tokenizer, length, batch, limit, self.autocast)

    def _note(self, **figures: Any) -> None:
        if self._record is not None:
            self._record({"step": self.figures.step, **figures})


def evaluated(
    model: "SpikeGPT",
    text: EvaluatedText,
    tokenizer: "Tokenizer",
    context_length: int,
    batch_size: int,
    limit: int | None,
    autocast: torch.dtype | None,
) -> LanguageModelResult:
    """The model's loss on a text, in disjoint windows."""
    text_ids = tokenizer.text_vocab_size
    conditions = 0
    if text_ids < tokenizer.vocab_size:
        conditions = count_conditions(text.tokens, text_ids, limit)
    nats, scored = evaluate_tokens(
        model,
        text.tokens,
        context_length=context_length,
        batch_size=batch_size,
        eos_id=tokenizer.eos_id,
        limit=limit,
        autocast=autocast,
        text_ids=text_ids if conditions else None,
    )
    return LanguageModelResult.from_sum(
        nats,
        scored,
        split_tokens=len(text.tokens),
        split_bytes=text.bytes,
        split_characters=text.characters,
        conditions=conditions,
    )


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, gradients and the optimizer's moments that are held now."""
    tensors: list[torch.Tensor] = [*model.parameters()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
