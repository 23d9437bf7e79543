"""Streaming generation on the CPU: the decoder beside torch, GPT-2, RWKV and the machine's limits.

    python benchmarks/streaming.py

Every contender reads a prompt of 16 tokens, untimed, and then 64 tokens of each row one at a time, the most
probable one after the other, in interleaved rounds. All weights are random; the peers (Hugging Face's GPT-2
with its cache, the package rwkv) have the same depth, width and vocabulary. Two limits are measured in the
same rounds: memory, the bytes of all matrices once a step at the bandwidth of a copy (bytes read and
written), and arithmetic, the multiply-adds of all matrices for all rows at the speed of a large matrix
product. The nearer of the two is the one that takes longer, which no step can pass: memory with few rows,
arithmetic with many. The table names it in every row. Weights that zeros would be multiplied with are read as
well, except in the rows "zeros skipped", which must not be held against the limit: a trained model of 4
layers and width 192 had 72 to 81% zeros after relu^2, and the random ones are given as many.
"""

import argparse
import contextlib
import gc
import importlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Timing, arguments, positive, resident_bytes, show, write_results
from long_context import check_streaming, read_prefixes
from torch import Tensor

from spikescale.config import ModelConfig, load_model_preset
from spikescale.errors import UserError
from spikescale.inference import SamplingSettings, generate
from spikescale.inference.decoder import Decoder, Weights
from spikescale.model import SpikeGPT, State

PROMPT = 16  # tokens read before the clock starts
COPY_FLOATS = 1 << 26  # 256 MiB, beyond every cache
PRODUCT = 2048  # rows and columns of the matrices whose product gives the speed of arithmetic
EXPANSION = 4


@dataclass
class Contender:
    """A generator of text: `start` reads prompts (B, T), then `step` maps tokens (B,) to logits (B, V)."""

    name: str
    dtype: torch.dtype  # of the matrices
    matrix_elements: int  # read for every step
    start: Callable[[Tensor], None]
    step: Callable[[Tensor], Tensor]
    run: Callable[[Tensor, int], None] | None = None  # replaces the loop over `step`

    @property
    def matrix_bytes(self) -> int:
        return self.matrix_elements * self.dtype.itemsize


def matrix_elements(model: torch.nn.Module, embeddings: tuple[str, ...]) -> int:
    """Elements of all matrices but the embeddings, of which a step reads single rows."""
    return sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name not in embeddings)


@torch.no_grad()
def random_model(config: ModelConfig, zeros: float) -> SpikeGPT:
    """A SpikeGPT with random weights; its own initial ones are mostly zeros, and slow to draw.

    `zeros`, at least 0.5, is the share of the inner activations that are zero: half of the random ones are,
    and of the rest so many have no weights.
    """
    with torch.device("meta"):
        model = SpikeGPT(config)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 2 * parameter.shape[1] ** -0.5, generator=generator)
            if name.endswith("channel_mix.key.weight"):
                parameter[torch.rand(parameter.shape[0], generator=generator) < 2 * zeros - 1] = 0
        elif name.endswith("weight"):
            parameter.fill_(1)
        else:
            parameter.uniform_(0, 1, generator=generator)
    return model


def decoder_contender(model: SpikeGPT, dtype: torch.dtype, skip_zeros: bool = False) -> Contender:
    """This project's decoder."""
    kind: Weights = "float32" if dtype == torch.float32 else "bfloat16"
    decoder = Decoder(model, kind, skip_zeros=skip_zeros)
    elements = matrix_elements(model, ("embedding.weight",))
    name = "spikescale, zeros skipped" if skip_zeros else "spikescale"
    return Contender(
        name, dtype, elements, lambda prompts: decoder.load_state(model(prompts)[1]), decoder.step
    )


def generate_contender(model: SpikeGPT) -> Contender:
    """The same through `generate`, which skips zeros, with sampling at temperature 0.8 and top-p 0.95."""
    drawn: Iterator[Tensor] = iter(())

    def start(prompts: Tensor) -> None:
        nonlocal drawn
        settings = SamplingSettings(temperature=0.8, top_p=0.95, max_tokens=1 << 30, stop_at_eos=False)
        drawn = generate(model, prompts, eos_id=0, settings=settings, engine="native")
        next(drawn)

    def run(last: Tensor, tokens: int) -> None:
        for _ in range(tokens):
            next(drawn)

    elements = matrix_elements(model, ("embedding.weight",))
    return Contender("spikescale, generate(), top-p 0.95", torch.float32, elements, start, _unused, run)


def _unused(tokens: Tensor) -> Tensor:
    raise AssertionError("this contender has a loop of its own")


def torch_contender(model: SpikeGPT) -> Contender:
    """The model itself, a forward pass of length 1 a token."""
    state: State | None = None

    def start(prompts: Tensor) -> None:
        nonlocal state
        _, state = model(prompts)

    def step(tokens: Tensor) -> Tensor:
        nonlocal state
        logits, state = model(tokens[:, None], state)
        return logits[:, -1]

    elements = matrix_elements(model, ("embedding.weight",))
    return Contender("spikescale, torch engine", torch.float32, elements, start, step)


def gpt2_contender(config: ModelConfig, dtype: torch.dtype, tokens: int) -> Contender:
    """Hugging Face's GPT-2 with its cache of keys and values."""
    transformers = peer("transformers")
    settings = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=PROMPT + tokens,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=max(config.width // 64, 1),
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(settings).to(dtype).eval()
    cache: Any = None

    def start(prompts: Tensor) -> None:
        nonlocal cache
        cache = model(prompts, use_cache=True).past_key_values

    def step(tokens: Tensor) -> Tensor:
        nonlocal cache
        out = model(tokens[:, None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        return out.logits[:, -1]

    # The table of embeddings is also the head, and as such read whole.
    return Contender(
        "GPT-2 (transformers)", dtype, matrix_elements(model, ("transformer.wpe.weight",)), start, step
    )


def rwkv_contender(config: ModelConfig, dtype: torch.dtype, batch: int) -> Contender:
    """RWKV-4 by the package rwkv, which reads one row at a time."""
    if batch > 1:
        raise UserError("the package rwkv has no batches")
    package = peer("rwkv.model")
    weights = rwkv_weights(config)
    elements = sum(x.numel() for name, x in weights.items() if x.dim() == 2 and name != "emb.weight")
    strategy = "cpu fp32" if dtype == torch.float32 else "cpu bf16"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder) / "random.pth"
        torch.save(weights, file)
        model = package.RWKV(model=str(file.with_suffix("")), strategy=strategy)
    state: Any = None

    def start(prompts: Tensor) -> None:
        nonlocal state
        _, state = model.forward(prompts[0].tolist(), None)

    def step(tokens: Tensor) -> Tensor:
        nonlocal state
        logits, state = model.forward(tokens.tolist(), state)
        return logits[None]

    return Contender("RWKV-4 (package rwkv)", dtype, elements, start, step)


def rwkv_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Random weights under the names that RWKV-4's files have."""
    generator = torch.Generator().manual_seed(0)
    width, inner, vocabulary = config.width, EXPANSION * config.width, config.vocab_size or 0

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    weights = {"emb.weight": matrix(vocabulary, width), "head.weight": matrix(vocabulary, width)}
    norms = ["ln_out", "blocks.0.ln0"]
    for index in range(config.layers):
        block = f"blocks.{index}."
        norms += [f"{block}ln1", f"{block}ln2"]
        for name in ("time_decay", "time_first"):
            weights[f"{block}att.{name}"] = torch.randn(width, generator=generator)
        for name in (
            "att.time_mix_k",
            "att.time_mix_v",
            "att.time_mix_r",
            "ffn.time_mix_k",
            "ffn.time_mix_r",
        ):
            weights[block + name] = torch.rand(1, 1, width, generator=generator)
        for name in ("att.key", "att.value", "att.receptance", "att.output", "ffn.receptance"):
            weights[f"{block}{name}.weight"] = matrix(width, width)
        weights[f"{block}ffn.key.weight"] = matrix(inner, width)
        weights[f"{block}ffn.value.weight"] = matrix(width, inner)
    for norm in norms:
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = torch.ones(width), torch.zeros(width)
    return weights


def peer(name: str) -> Any:
    """A peer's module. Raises UserError, with the reason, where it does not import."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(" ".join(str(error).split())) from None


def contenders(
    config: ModelConfig, batch: int, tokens: int, zeros: float
) -> Iterator[Contender | tuple[str, str]]:
    """Those that run here; of the others name and reason."""
    model = random_model(config, zeros)
    check(model)
    full, half = torch.float32, torch.bfloat16
    makers: list[tuple[str, Callable[[], Contender]]] = [
        ("spikescale", lambda: decoder_contender(model, full)),
        ("spikescale bfloat16", lambda: decoder_contender(model, half)),
        ("with top-p", lambda: generate_contender(model)),
        ("torch engine", lambda: torch_contender(model)),
        ("GPT-2", lambda: gpt2_contender(config, full, tokens)),
        ("GPT-2 bfloat16", lambda: gpt2_contender(config, half, tokens)),
        ("RWKV-4", lambda: rwkv_contender(config, full, batch)),
        ("RWKV-4 bfloat16", lambda: rwkv_contender(config, half, batch)),
    ]
    if batch == 1:
        makers.insert(2, ("zeros skipped", lambda: decoder_contender(model, full, skip_zeros=True)))
    for name, make in makers:
        try:
            yield make()
        except (UserError, RuntimeError, KeyError, ValueError) as error:
            yield name, " ".join(str(error).split())


def check(model: SpikeGPT) -> None:
    """Refuse to time a decoder that computes something else than the model."""
    tokens = torch.zeros(1, 8, dtype=torch.long)
    check_streaming(model, Decoder(model, skip_zeros=False), tokens, model.initial_state(1))


def seconds_a_step(contender: Contender, prompts: Tensor, tokens: int) -> float:
    """Seconds of one token of all rows, the mean over `tokens`."""
    contender.start(prompts)
    token = prompts[:, -1].contiguous()
    begin = time.perf_counter()
    if contender.run is not None:
        contender.run(token, tokens)
    else:
        for _ in range(tokens):
            token = contender.step(token).argmax(-1)
    return (time.perf_counter() - begin) / tokens


def machine_limits() -> dict[str, Callable[[], float]]:
    """Functions that measure once: bytes/s of copying and of reading, operations/s of products."""
    source, target = torch.randn(COPY_FLOATS), torch.empty(COPY_FLOATS)
    operands = {dtype: torch.randn(PRODUCT, PRODUCT).to(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def rate(amount: float, call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        call()
        return amount / (time.perf_counter() - begin)

    return {
        "copy": lambda: rate(8 * COPY_FLOATS, lambda: target.copy_(source)),
        "read": lambda: rate(4 * COPY_FLOATS, lambda: source.sum()),
        "torch.float32": lambda: rate(
            2 * PRODUCT**3, lambda: operands[torch.float32] @ operands[torch.float32]
        ),
        "torch.bfloat16": lambda: rate(
            2 * PRODUCT**3, lambda: operands[torch.bfloat16] @ operands[torch.bfloat16]
        ),
    }


@torch.no_grad()
def compare(name: str, config: ModelConfig, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time all contenders at one batch in rounds; print their table."""
    made = list(contenders(config, batch, options.tokens, options.zeros))
    running = [entry for entry in made if isinstance(entry, Contender)]
    missing = [entry for entry in made if not isinstance(entry, Contender)]
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(config.vocab_size or 0, (batch, PROMPT), generator=generator)
    limits = machine_limits()
    rates: dict[str, list[float]] = {key: [] for key in limits}
    seconds: list[list[float]] = [[] for _ in running]
    for contender in running:
        seconds_a_step(contender, prompts, min(options.tokens, 4))
    for _ in range(options.repeats):
        for key, measure_once in limits.items():
            rates[key].append(measure_once())
        for contender, times in zip(running, seconds, strict=True):
            times.append(seconds_a_step(contender, prompts, options.tokens))
    rate = {key: statistics.median(values) for key, values in rates.items()}
    rows, results = [], []
    for contender, times in zip(running, seconds, strict=True):
        timing = Timing(statistics.median(times), min(times), max(times))
        memory = contender.matrix_bytes / rate["copy"]
        arithmetic = 2 * batch * contender.matrix_elements / rate[str(contender.dtype)]
        nearer = "memory" if memory >= arithmetic else "arithmetic"
        kind = str(contender.dtype).removeprefix("torch.")
        rows.append(
            [
                contender.name,
                kind,
                f"{contender.matrix_bytes / 1e6:.0f}",
                timing.milliseconds(),
                f"{batch / timing.median:.0f}",
                f"{memory * 1e3:.2f}",
                f"{memory / timing.median:.2f}",
                f"{arithmetic * 1e3:.2f}",
                nearer,
                f"{max(memory, arithmetic) / timing.median:.2f}",
            ]
        )
        results.append(
            {
                "name": contender.name,
                "weights": kind,
                "matrix_bytes": contender.matrix_bytes,
                **timing.as_dict(),
                "tokens_second": batch / timing.median,
                "memory_limit_seconds": memory,
                "share_of_memory_limit": memory / timing.median,
                "arithmetic_limit_seconds": arithmetic,
                "nearer_limit": nearer,
                "share_of_nearer_limit": max(memory, arithmetic) / timing.median,
            }
        )
    rows += [[name, "-", "-", reason, *["-"] * 6] for name, reason in missing]
    title = (
        f"{name}: {config.layers} layers, width {config.width}, {config.vocab_size} symbols, batch {batch},"
        f" {options.threads} threads, {options.repeats} rounds of {options.tokens} tokens; copy"
        f" {rate['copy'] / 1e9:.1f} GB/s, read {rate['read'] / 1e9:.1f} GB/s, products"
        f" {rate['torch.float32'] / 1e9:.0f} and {rate['torch.bfloat16'] / 1e9:.0f} GFLOP/s"
    )
    columns = ["", "weights", "MB", "ms a step: median (range)", "tokens/s", "memory ms", "share of it"]
    show(title, [*columns, "arithmetic ms", "nearer limit", "share of the nearer"], rows)
    return {"preset": name, "batch": batch, "rates": rate, "contenders": results, "not_run": dict(missing)}


@torch.no_grad()
def long_context(name: str, config: ModelConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of a token and memory of the process at several positions in one text."""
    model = random_model(config, options.zeros)
    states = read_prefixes(model, options.positions)
    decoder = Decoder(model, skip_zeros=False)

    def make(position: int, state: State) -> Contender:
        return Contender(str(position), torch.float32, 0, lambda _: decoder.load_state(state), decoder.step)

    contenders = {position: make(position, state) for position, state in states.items()}
    prompts = torch.zeros(1, 1, dtype=torch.long)
    seconds: dict[int, list[float]] = {position: [] for position in states}
    memory: dict[int, int] = {}
    for _ in range(options.repeats):
        for position, contender in contenders.items():
            seconds[position].append(seconds_a_step(contender, prompts, options.tokens))
            memory[position] = resident_bytes()
    results, rows = [], []
    for position, state in states.items():
        times = seconds[position]
        timing = Timing(statistics.median(times), min(times), max(times))
        state_bytes = sum(x.numel() * x.element_size() for block in state for x in block.values())
        rows.append(
            [
                f"{position:,}",
                timing.milliseconds(),
                f"{state_bytes / 1e3:.0f}",
                f"{memory[position] / 1e6:.0f}",
            ]
        )
        results.append(
            {
                "position": position,
                **timing.as_dict(),
                "state_bytes": state_bytes,
                "resident_bytes": memory[position],
            }
        )
    columns = ["tokens before", "ms a token: median (range)", "state KB", "process MB"]
    show(f"{name}: long context, batch 1, float32", columns, rows)
    return results


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__.splitlines()[0], "streaming")
    parser.set_defaults(repeats=7)
    parser.add_argument(
        "--presets", nargs="+", default=["46m", "216m"], metavar="NAME", help="of configs/model"
    )
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 32], metavar="B", help="rows")
    parser.add_argument("--tokens", type=positive, default=64, metavar="N", help="timed tokens of each row")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="CPU threads")
    parser.add_argument(
        "--positions",
        type=positive,
        nargs="*",
        default=[1024, 65536],
        metavar="T",
        help="of long context; none: skip",
    )
    parser.add_argument("--layers", type=positive, metavar="L", help="instead of the presets'")
    parser.add_argument("--width", type=positive, metavar="C", help="instead of the presets'")
    parser.add_argument(
        "--vocabulary", type=positive, metavar="V", help="instead of 256 (46m) and 50277 (others)"
    )
    parser.add_argument("--zeros", type=float, default=0.77, metavar="SHARE", help="of the inner activations")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it runs; the times mean nothing"
    )
    options = parser.parse_args()
    if options.quick:
        options.layers, options.width, options.vocabulary = 2, 64, 256
        options.tokens, options.repeats, options.batches, options.positions = 4, 2, [1, 3], [64, 256]
    return options


def preset_config(name: str, options: argparse.Namespace) -> ModelConfig:
    """The preset with its vocabulary, and with what the command line changes."""
    given = {"layers": options.layers, "width": options.width, "vocab_size": options.vocabulary}
    changes = {"vocab_size": 256 if name in ("tiny", "46m") else 50277}
    changes.update({key: value for key, value in given.items() if value is not None})
    return load_model_preset(name, **changes)


def main() -> None:
    """Measure, print and write."""
    options = parse()
    torch.set_num_threads(options.threads)
    tables, long = [], {}
    for name in options.presets:
        config = preset_config(name, options)
        for batch in options.batches:
            tables.append(compare(name, config, batch, options))
            gc.collect()  # one table's models are gone before the next one's are made
    if options.positions:
        name = options.presets[0]
        long = {"preset": name, "positions": long_context(name, preset_config(name, options), options)}
    settings = {key: getattr(options, key) for key in ("threads", "tokens", "repeats", "zeros", "quick")}
    write_results({**settings, "tables": tables, "long_context": long}, options.output)


if __name__ == "__main__":
    main()
