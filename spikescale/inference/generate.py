"""Generation in recurrent form: each token costs the same, and the state never grows."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor, nn

from spikescale.errors import UserError
from spikescale.inference.decoder import Decoder, Weights, obstacle_to_decoding
from spikescale.inference.sampling import SamplingSettings, choose

if TYPE_CHECKING:
    from spikescale.model import SpikeGPT
    from spikescale.model.state import State

PROMPT_CHUNK = 256
Engine = Literal["auto", "native", "torch"]

logger = logging.getLogger("spikescale.inference")


@torch.no_grad()
def generate(
    model: "SpikeGPT",
    prompts: Tensor,
    *,
    eos_id: int,
    settings: SamplingSettings,
    vocab_size: int | None = None,
    prompt_chunk: int = PROMPT_CHUNK,
    engine: Engine = "auto",
    weights: Weights = "float32",
) -> Iterator[Tensor]:
    """Continue `prompts` (B, T), int64, and yield one token (B,), int64, of every sample at a time.

    The prompt is read in parallel form, `prompt_chunk` tokens at a time; from then on each token is one
    step from the state that the last one left. Ids from `vocab_size` on, which pad a
    model beyond its tokenizer, are never drawn. An empty prompt (T = 0) stands for
    `eos_id`, which is what precedes a document. At most `settings.max_tokens` are produced; with
    `settings.stop_at_eos`, a sample that has ended goes on as `eos_id` and the iteration stops when all
    have ended. The model is in evaluation mode while the iteration lasts, then as it was.

    `engine` is what runs the steps: "native" a `Decoder`, whose matrices are kept in `weights`; "torch" the
    model itself; "auto" a decoder where there can be one and nothing observes the model. It says why not.

    Raises UserError for an engine or weights that are unknown or that this model cannot have.
    """
    # Chosen outside of the iterator, so that a refusal comes at once.
    decoder = choose_decoder(model, engine, weights)
    return _generate(model, prompts, eos_id, settings, vocab_size, prompt_chunk, decoder)


@torch.no_grad()
def _generate(
    model: "SpikeGPT",
    prompts: Tensor,
    eos_id: int,
    settings: SamplingSettings,
    vocab_size: int | None,
    prompt_chunk: int,
    decoder: Decoder | None,
) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    prompts = prompts.to(device)
    batch = prompts.shape[0]
    was_training = model.training
    model.eval()
    try:
        seen: Tensor | None = None
        start = prompts if prompts.shape[1] else prompts.new_full((batch, 1), eos_id)
        state: State = []
        for chunk in start.split(prompt_chunk, dim=1):
            logits, state = model(chunk, state or None)
        last = logits[:, -1]
        step = stepper(model, state, decoder)
        ended = torch.zeros(batch, dtype=torch.bool, device=device)
        for position in range(settings.max_tokens):
            last = last[:, :vocab_size]
            if settings.repetition_penalty != 1 and seen is None:
                seen = torch.zeros_like(last, dtype=torch.bool).scatter(1, prompts, True)
            tokens = choose(last, settings, generator, seen)
            if settings.stop_at_eos:
                tokens = torch.where(ended, eos_id, tokens)
                ended = ended | (tokens == eos_id)
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            yield tokens
            if position + 1 == settings.max_tokens or bool(ended.all()):
                return
            last = step(tokens)
    finally:
        model.train(was_training)


def choose_decoder(model: nn.Module, engine: Engine, weights: Weights) -> Decoder | None:
    """The decoder that `engine`, as for `generate`, stands for with this model; None: the model itself."""
    if engine not in get_args(Engine):
        raise UserError(f"engine {engine!r}: must be one of {', '.join(get_args(Engine))}")
    if weights not in get_args(Weights):
        raise UserError(f"weights {weights!r}: must be one of {', '.join(get_args(Weights))}")
    obstacle = "as asked" if engine == "torch" else _obstacle(model, engine)
    if not obstacle:
        backend = cast("SpikeGPT", model).config.backend
        # A name is used or refused, with the compiler's words; `auto` warns and leaves it to the reference.
        named = "cpu" if backend == "auto" and (engine == "native" or weights != "float32") else backend
        decoder = Decoder(cast("SpikeGPT", model), weights, named)
        return None if decoder.backend == "reference" else decoder
    if engine == "native":
        raise UserError(f"engine native: {obstacle}")
    if weights != "float32":
        raise UserError(
            f"weights {weights}: only the native engine has them, and torch runs here: {obstacle}"
        )
    _announce(obstacle)
    return None


def _obstacle(model: nn.Module, engine: Engine) -> str:
    if obstacle := obstacle_to_decoding(model):
        return obstacle
    backend = cast("SpikeGPT", model).config.backend
    if backend in ("reference", "triton"):
        return f"the operators' backend is {backend}"
    if engine == "auto" and _observed(model):
        return "the model is observed by hooks or monitors, which only torch serves"
    return ""


def _observed(model: nn.Module) -> bool:
    return any(
        module._forward_hooks or module._forward_pre_hooks or getattr(module, "monitor", False)
        for module in model.modules()
    )


@functools.cache
def _announce(reason: str) -> None:
    logger.info("generation: torch runs the steps (%s)", reason)


def stepper(model: "SpikeGPT", state: "State", decoder: Decoder | None) -> Callable[[Tensor], Tensor]:
    """A function from tokens (B,) to the logits (B, V) of what follows, going on from `state`."""
    if decoder is not None:
        decoder.load_state(state)
        return decoder.step

    def step(tokens: Tensor) -> Tensor:
        nonlocal state
        logits, state = model(tokens[:, None], state)
        return logits[:, -1]

    return step
