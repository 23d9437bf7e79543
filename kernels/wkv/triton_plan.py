"""Which form of the Triton kernels of WKV a shape is given, from a small model of a GPU.

    time of a pass = max( bytes moved / (multiprocessors * BANDWIDTH), rounds * LATENCY + tokens * CHAIN )
    time of a form = the sum over its passes of that and LAUNCH

A pass moves its bytes at full bandwidth when it has programs enough; otherwise it takes as long as one of its
programs, which makes `rounds` trips to memory one after another and a dependent chain of arithmetic for each
of `tokens` tokens. The constants are round figures for large GPUs of the last years, not measurements: they
decide between forms that compute the same, and predict no timing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from spikescale.kernels.gpu import MULTIPROCESSORS

SUB = 8  # tokens loaded together, and between two marks of the sequential form
BACK_SUB = 4  # the same in the chunked form's backward: more tokens need too many registers
GROUP = 4  # chunks that a carry loads together
CHUNKS = (32, 64, 128, 256)
BANDWIDTH = 20.0  # bytes a nanosecond and multiprocessor
LATENCY = 800.0  # ns of one trip to memory
CHAIN = 40.0  # ns of the arithmetic that one token has to wait for
LAUNCH = 3000.0  # ns between two kernels


@dataclass(frozen=True)
class Pass:
    """One kernel: float32 or narrower bytes moved an element, and its sequential depth."""

    name: str
    bytes_per_element: float
    rounds: int
    tokens: int


@dataclass(frozen=True)
class Form:
    """`chunk` tokens go one after another; 0: all of them, the sequential form."""

    chunk: int

    @property
    def name(self) -> str:
        return "chunked" if self.chunk else "sequential"


def passes(
    form: Form, length: int, element_size: int, gated: bool = False, gradients: bool = True
) -> Iterator[Pass]:
    """The kernels of a form, forward and then (with `gradients`) backward, for sequences of `length` tokens.

    `element_size` is that of k, v, y and their gradients, in bytes; pasts and futures are float32.
    """
    e, gate = element_size, element_size * gated
    if not form.chunk:
        depth = -(-length // SUB)
        marks = 6 * 4 / SUB  # bytes an element of six float32 rows for every SUB-th token
        yield Pass("wkv_sequential_forward", 3 * e + gate + marks * gradients, depth, length)
        if gradients:
            yield Pass("wkv_sequential_backward", 5 * e + 2 * gate + marks, depth, 2 * length)
        return
    chunk, chunks = min(form.chunk, length), -(-length // form.chunk)
    row = 4 * chunks / length  # bytes an element of one float32 row for every chunk
    depth, carry_depth, rows = -(-chunk // SUB), -(-chunks // GROUP), 6 if gradients else 4
    yield Pass("wkv_summaries", 2 * e + rows * row, depth, chunk)
    yield Pass("wkv_carry", 2 * rows * row, carry_depth, chunks)
    yield Pass("wkv_outputs", 3 * e + gate + 4 * row, depth, chunk)
    if gradients:
        depth, marks = -(-chunk // BACK_SUB), 4 * 4 / BACK_SUB
        # The past before the chunk, its summary, its parts of dw and du; marks for the reverse pass.
        yield Pass("wkv_gather", 3 * e + 2 * gate + (6 + 6 + 2) * row + marks, depth, 2 * chunk)
        yield Pass("wkv_carry_back", (6 + 5) * row, carry_depth, chunks)
        yield Pass("wkv_reverse", 5 * e + gate + 5 * row + marks, depth, 2 * chunk)


def bytes_per_element(
    form: Form, length: int, element_size: int, gated: bool = False, gradients: bool = True
) -> float:
    """Bytes moved to and from memory for every element of (B, T, C), all passes together."""
    return sum(step.bytes_per_element for step in passes(form, length, element_size, gated, gradients))


def modelled_time(
    form: Form,
    batch: int,
    length: int,
    channels: int,
    element_size: int = 4,
    multiprocessors: int = MULTIPROCESSORS,
    gated: bool = False,
    gradients: bool = True,
) -> float:
    """Nanoseconds by the formula above. For comparing forms only."""
    elements, bandwidth = batch * length * channels, multiprocessors * BANDWIDTH
    return sum(
        LAUNCH
        + max(step.bytes_per_element * elements / bandwidth, step.rounds * LATENCY + step.tokens * CHAIN)
        for step in passes(form, length, element_size, gated, gradients)
    )


def choose_form(
    batch: int,
    length: int,
    channels: int,
    element_size: int = 4,
    multiprocessors: int = MULTIPROCESSORS,
    gated: bool = False,
    gradients: bool = True,
    name: str = "auto",
) -> Form:
    """The form of least `modelled_time` for k of (batch, length, channels).

    Args:
        element_size: bytes of one number of k.
        multiprocessors: of the GPU.
        gated: whether a gate is fused.
        gradients: whether backward will follow.
        name: "sequential" or "chunked" to have that form, the latter at its best chunk.

    Raises:
        ValueError: `name` is neither of them nor "auto".
    """
    if name not in ("auto", "sequential", "chunked"):
        raise ValueError(f"form {name!r}: unknown; there are auto, chunked and sequential")
    forms = [Form(0)] if name != "chunked" else []
    forms += [Form(chunk) for chunk in CHUNKS] if name != "sequential" else []
    shape = (batch, length, channels, element_size, multiprocessors, gated, gradients)
    return min(forms, key=lambda form: modelled_time(form, *shape))
