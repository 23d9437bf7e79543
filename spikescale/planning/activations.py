"""What a forward pass keeps for backward, and what passes through memory, operator by operator.

Follows `spikescale/model` and the operators of `kernels`: `kept_by_block` is the list of tensors that their
autograd formulas save. Elements are counted a token, in units of the model's width; "compute" is the dtype of
projections (bfloat16 under autocast, else float32), everything else is what its name says.
"""

from dataclasses import dataclass
from typing import Literal

from spikescale.config.schema import ModelConfig
from spikescale.planning.parameters import EXPANSION, vocabulary

Kind = Literal["compute", "float32", "byte", "bit"]
FLOAT = 4  # bytes of a float32
MARK = 16  # tokens between two saved states of WKV and of a membrane
WKV_STATE = 4  # float32 numbers a channel in a mark of WKV
CHUNK_LOGITS = 2**26  # logits in memory at once where head and loss are one


@dataclass(frozen=True)
class Kept:
    """A tensor that waits for backward: `size` elements a token and channel of the model's width."""

    operator: str
    what: str
    size: float
    kind: Kind
    split: bool = False  # each tensor rank holds its part


@dataclass(frozen=True)
class Shape:
    """The tensors of one forward pass on one rank."""

    tokens: int  # sequences times their length here
    width: int
    compute: int  # bytes of a number that a projection reads
    tensor: int = 1

    def bytes_of(self, kept: list[Kept]) -> int:
        """Bytes of tensors in a list."""
        sizes = {"compute": self.compute, "float32": FLOAT, "byte": 1, "bit": 1 / 8}
        share = {True: 1 / self.tensor, False: 1.0}
        each = sum(item.size * sizes[item.kind] * share[item.split] for item in kept)
        return round(each * self.tokens * self.width)


def kept_by_block(model: ModelConfig, compact: bool) -> list[Kept]:
    """All that one block keeps for backward, without recomputation."""
    driven = model.variant == "spikegpt-driven"
    kept = _time_mix(driven, compact)
    kept += _after_sub_block(model, "time_mix")
    kept += _channel_mix(model, driven, compact)
    kept += _after_sub_block(model, "channel_mix")
    return kept


def _spikes(operator: str, size: float, compact: bool, split: bool) -> Kept:
    return Kept(operator, "spikes read by a projection", size, "bit" if compact else "compute", split)


def _lif(operator: str, size: float, kind: Kind, split: bool) -> list[Kept]:
    return [
        Kept(operator, "currents", size, kind, split),
        Kept(operator, "membranes at marks", size / MARK, "float32", split),
    ]


def _time_mix(driven: bool, compact: bool) -> list[Kept]:
    # The normed stream that token_mix keeps is counted with the norm that made it.
    kept: list[Kept] = []
    if driven:
        kept += _lif("time_mix neurons", 3, "float32", False)
        kept.append(_spikes("time_mix key, value, receptance", 3, compact, False))
    else:
        kept.append(Kept("time_mix key, value, receptance", "mixtures", 3, "compute"))
    kept.append(Kept("wkv", "keys, values, receptances", 3, "compute", split=True))
    kept.append(Kept("wkv", "states at marks", WKV_STATE / MARK, "float32", split=True))
    if driven:
        kept += _lif("time_mix output neurons", 1, "compute", True)
        kept.append(_spikes("time_mix output", 1, compact, True))
    else:
        kept.append(Kept("time_mix output", "gated averages", 1, "compute", split=True))
    return kept


def _channel_mix(model: ModelConfig, driven: bool, compact: bool) -> list[Kept]:
    kept: list[Kept] = []
    if driven:
        kept += _lif("channel_mix neurons", 2, "float32", False)
        kept.append(_spikes("channel_mix key, receptance", 2, compact, False))
    else:
        kept.append(Kept("channel_mix key, receptance", "mixtures", 2, "compute"))
    if model.variant == "spikegpt-b":
        kept += _lif("channel_mix activation", EXPANSION, "compute", True)
        kept.append(_spikes("channel_mix value", EXPANSION, compact, True))
    else:
        kept.append(Kept("squared_relu", "keys", EXPANSION, "compute", split=True))
        if driven:
            kept += _lif("channel_mix value neurons", EXPANSION, "compute", True)
            kept.append(_spikes("channel_mix value", EXPANSION, compact, True))
        else:
            kept.append(Kept("channel_mix value", "squared keys", EXPANSION, "compute", split=True))
    kept.append(Kept("sigmoid_gate", "receptances, values", 2, "compute"))
    return kept


def _after_sub_block(model: ModelConfig, name: str) -> list[Kept]:
    kept = [
        Kept(f"after {name}", "the residual stream", 1, "float32"),
        Kept(f"after {name}", "it normalised", 1, "float32"),
    ]
    if model.variant in ("spikegpt", "spikegpt-b"):
        # One operator with the neurons, whose dropout needs no mask.
        return [*kept, *_lif(f"after {name}", 1, "compute", False)]
    if model.variant == "heaviside-rwkv":
        kept.append(Kept(f"after {name}", "currents", 1, "compute"))
    if model.dropout and name == "channel_mix":
        kept.append(Kept(f"after {name}", "dropout mask", 1, "byte"))
    return kept


def kept_at_start(model: ModelConfig) -> list[Kept]:
    """What the embedding and the first norms keep."""
    kept = [
        Kept("ln0", "embeddings", 1, "float32"),
        Kept("ln1 of block 0", "the residual stream", 1, "float32"),
        Kept("ln1 of block 0", "it normalised", 1, "float32"),
    ]
    if model.binary_embedding:
        kept.append(Kept("binary embedding", "embeddings before the step", 1, "float32"))
    return kept


def kept_at_end(compute: int) -> list[Kept]:
    """What the head keeps beside the last block's normed stream, of which autocast makes a copy."""
    return [Kept("head", "the normed stream, cast", 1, "compute")] if compute != FLOAT else []


def is_counted(model: ModelConfig, compact: bool) -> bool:
    """Whether the inputs of recomputed blocks are kept as one byte an element: counts of spikes."""
    return compact and not model.dropout and model.variant not in ("rwkv", "spikegpt-driven")


def kept_of_recomputed_block(model: ModelConfig, compact: bool) -> list[Kept]:
    """What a block that is recomputed in backward keeps until then."""
    kind: Kind = "byte" if is_counted(model, compact) else "float32"
    return [Kept("recomputation", "the residual stream", 1, kind)]


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank, of one forward pass and its backward."""

    block: int  # one block's, kept for its backward
    blocks: int  # those of all blocks at the end of forward (with recomputation: their inputs)
    ends: int  # embedding, first and last norm
    backward: int  # gradients on the way through one block
    loss: int  # logits, their probabilities and gradients, at the most
    recomputed: bool

    @property
    def kept(self) -> int:
        """Bytes that wait for backward when the loss is computed, logits aside."""
        return self.blocks + self.ends


def activations(
    model: ModelConfig,
    tokens: int,
    compute: int,
    *,
    tensor: int = 1,
    recompute: bool = False,
    compact: bool = True,
    fused_loss: bool = False,
    regulariser: bool = True,
) -> Activations:
    """The activations of `tokens` tokens on one rank, whose projections read numbers of `compute` bytes."""
    shape = Shape(tokens, model.width, compute, tensor)
    block = shape.bytes_of(kept_by_block(model, compact))
    waiting = shape.bytes_of(kept_of_recomputed_block(model, compact)) if recompute else block
    start = kept_at_start(model)
    if recompute:
        # The first block's norm and its output belong to what is recomputed; ln_out's are still kept.
        start = [*start[:1], *start[3:], Kept("spike counts", "the start of the stream", 1, "float32")]
        start += [Kept("ln_out", "the residual stream, and it normalised", 2, "float32")]
    ends = shape.bytes_of(start + kept_at_end(compute))
    return Activations(
        block=block,
        blocks=model.layers * waiting,
        ends=ends,
        backward=shape.bytes_of(_gradients_in_block()),
        loss=loss_bytes(model, tokens, compute, tensor, fused_loss, regulariser),
        recomputed=recompute,
    )


def _gradients_in_block() -> list[Kept]:
    """Gradients alive while the squared keys' is computed: the widest moment of a block's backward."""
    return [
        Kept("residual stream", "gradients", 1, "float32"),
        Kept("sigmoid_gate", "gradients", 2, "compute"),
        Kept("channel_mix value", "gradient", EXPANSION, "compute", split=True),
        Kept("squared_relu", "gradient", EXPANSION, "compute", split=True),
    ]


def loss_bytes(
    model: ModelConfig, tokens: int, compute: int, tensor: int, fused: bool, regulariser: bool
) -> int:
    """Bytes of logits and what follows from them, at the most.

    In backward of the cross-entropy four float32 tensors of all logits exist: probabilities, the gradient
    that reaches them, its product, and the regulariser's. Fused with the head there is one chunk of logits,
    the gradients of the hidden states, and that of the head, once made and once scaled.
    """
    symbols = -(-vocabulary(model) // tensor)
    if fused:
        chunk = min(CHUNK_LOGITS, tokens * symbols)
        return compute * chunk + 2 * FLOAT * (tokens + symbols) * model.width
    return (4 if regulariser else 3) * FLOAT * tokens * symbols


def traffic_of_block(model: ModelConfig, compute: int) -> tuple[float, float]:
    """Bytes that the operators between projections move in (forward, backward), a token and channel.

    Each operator reads and writes its tensors once. Neurons elsewhere than in the default variant move as
    much, to a few per cent.
    """
    c, f, inner = compute, FLOAT, EXPANSION
    marks = f / MARK
    forward = 2 * (3 * f + c + marks)  # neurons, residual sum and norm, twice
    forward += 2 * f + 5 * c  # token mixes
    forward += 4 * c + WKV_STATE * marks  # wkv
    forward += 2 * inner * c + 3 * c  # squared relu, gate
    backward = 2 * (4 * f + 2 * c + marks)
    backward += 4 * f + 5 * c
    backward += 7 * c + WKV_STATE * marks
    backward += 3 * inner * c + 5 * c
    return forward, backward


def traffic_of_loss(compute: int, fused: bool) -> float:
    """Bytes that head and loss move for one logit, matrix products aside."""
    if fused:
        return 7 * compute
    cast = 0 if compute == FLOAT else 2 * (compute + FLOAT)
    return cast + 2 * compute + 10 * FLOAT
