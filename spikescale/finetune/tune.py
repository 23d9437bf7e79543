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
from spikescale.finetune.texts import TuningText
from spikescale.model import language_model_loss
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


def tune(
    tuning: Tuning,
    tokenizer: "Tokenizer",
    text: TuningText,
    settings: TuneSettings,
    *,
    kept: EvaluatedText | None = None,
    record: Callable[[dict[str, Any]], None] | None = None,
    adapter: Path | None = None,
) -> TuneResult:
    """Train what `tuning` says, keep the weights of the best validation loss, and judge them.

    `record` is given the figures of logged steps and evaluations; `adapter`: a folder for adapters alone.
    Raises UserError when the loss is not finite.
    """
    train, model = settings.train, tuning.model
    device = next(model.parameters()).device
    autocast = torch.bfloat16 if train.precision == "bfloat16" else None
    torch.manual_seed(train.seed)
    parameters = tuning.trainable()
    if not parameters:
        raise UserError("nothing is left to train: freeze fewer layers")

    def judge(wanted: EvaluatedText, limit: int | None) -> LanguageModelResult:
        return evaluated(model, wanted, tokenizer, settings.context_length, train.batch_size, limit, autocast)

    def note(**figures: Any) -> None:
        if record is not None:
            record(figures)

    before = judge(text.test, settings.test_tokens)
    kept_before = None if kept is None else judge(kept, settings.test_tokens)
    optimizer = torch.optim.AdamW(
        groups(parameters, train.weight_decay), lr=train.lr, betas=train.betas, eps=train.eps
    )
    valid = judge(text.valid, train.evaluate_tokens)
    note(step=0, **{f"valid_{name}": value for name, value in valid.as_dict().items()})
    best, best_step = valid.loss, 0
    best_weights = {name: p.detach().clone() for name, p in parameters.items()}
    seconds = cpu_seconds = 0.0
    micro = train.micro_batch_size or train.batch_size
    for step in range(train.steps):
        began, cpu_began = time.perf_counter(), time.process_time()
        rate = learning_rate(step, train)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        rows = text.samples.rows(step * train.batch_size, train.batch_size).to(device)
        loss_sum = 0.0
        for part in rows.split(micro):
            inputs, targets = part[:, :-1], part[:, 1:]
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                logits, _ = model(inputs, **document_resets(model, inputs, tokenizer.eos_id))
            total, reported = language_model_loss(logits, targets, train.logit_regulariser)
            share = len(part) / len(rows)
            (total * share).backward()
            loss_sum += float(reported) * share
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), train.clip or math.inf)
        if not math.isfinite(loss_sum) or not torch.isfinite(norm):
            raise UserError(f"step {step + 1}: the loss or its gradient is not finite; lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seconds += time.perf_counter() - began
        cpu_seconds += time.process_time() - cpu_began
        done = step + 1
        if done % train.log_every == 0 or done == train.steps:
            tokens = done * train.batch_size * settings.context_length
            note(step=done, loss=loss_sum, lr=rate, gradient_norm=float(norm), tokens=tokens,
                 tokens_per_second=tokens / seconds)  # fmt: skip
        if done == train.steps or (train.evaluate_every and done % train.evaluate_every == 0):
            valid = judge(text.valid, train.evaluate_tokens)
            note(step=done, **{f"valid_{name}": value for name, value in valid.as_dict().items()})
            if valid.loss < best:
                best, best_step = valid.loss, done
                for name, p in parameters.items():
                    best_weights[name].copy_(p.detach())
    held = state_bytes(model, optimizer)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(best_weights[name])
    trainable = sum(p.numel() for p in parameters.values())
    if adapter is not None:
        tuning.save_adapter(adapter)
    # Only now: the figures are those of the model that is saved.
    tuning.merged_weights()
    return TuneResult(
        before=before,
        after=judge(text.test, settings.test_tokens),
        kept_before=kept_before,
        kept_after=None if kept is None else judge(kept, settings.test_tokens),
        best_step=best_step,
        best_valid_loss=best,
        trainable=trainable,
        total=tuning.total,
        state_bytes=held,
        peak_bytes=peak_bytes(device),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
    )


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


def groups(parameters: dict[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of the optimizer: weight decay reaches matrices only."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    others = [p for p in parameters.values() if p.dim() <= 1]
    decays = ((matrices, weight_decay), (others, 0.0))
    return [{"params": members, "weight_decay": decay} for members, decay in decays if members]


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
