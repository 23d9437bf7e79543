"""From a budget, a family of shapes and a data set to a plan.

Designs:
    isoflop    profiles of equal FLOP: each size with the tokens that its share of the budget pays for
    ratio      each size with a fixed number of tokens a parameter
    branches   each size with several numbers of tokens, from one long run (a trunk) of constant rate: each
               is a branch whose rate decays over the last part of its steps (warm-up, stable, decay)
    lr-sweep   each size with several learning rates at one number of tokens
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from spikescale.config.schema import ModelConfig, TrainConfig, Variant, ZeroConfig
from spikescale.errors import UserError
from spikescale.planning.devices import Device, find_device
from spikescale.planning.memory import Workload
from spikescale.planning.throughput import plan_throughput
from spikescale.scaling.ladder import Shape, Size
from spikescale.scaling.plan_file import Design, Plan, PlannedRun

LEAST_DECAY_STEPS = 5
PROFILE_SPACING = 3.0  # between the FLOP of neighbouring isoFLOP profiles
LENGTH_SPACING = 2.0  # between the tokens of neighbouring branches


@dataclass(frozen=True)
class Wish:
    """What is asked for. budget_flop, budget_seconds (of one device): at most one of the two.

    lr_of: the rate by family and non-embedding parameters. tokens: explicit lengths; else `lengths` of them
    (branches), or `profiles` budgets (isoflop), as large as the budget allows. base: the run file of all
    runs.
    """

    name: str
    design: Design
    families: Sequence[Variant]
    shapes: Sequence[Shape]
    model: ModelConfig
    train: TrainConfig
    base: dict[str, Any]
    train_tokens: int
    lr_of: Callable[[str, float], float]
    device: str = "cpu"
    budget_flop: float | None = None
    budget_seconds: float | None = None
    tokens: Sequence[float] = ()
    budgets: Sequence[float] = ()
    max_flop: float = math.inf  # of a branch; longer ones are left out
    lengths: int = 4
    profiles: int = 4
    ratio: float = 20.0
    ratio_range: tuple[float, float] = (1.0, 1000.0)
    lrs: Sequence[float] = ()
    min_lr_share: float = 0.1
    ranks_of: Callable[[float], int] = field(default=lambda parameters: 1)


@dataclass(frozen=True)
class _Candidate:
    family: Variant
    shape: Shape
    size: Size
    tokens_per_second: float


def make_plan(wish: Wish) -> Plan:
    """The plan. Raises UserError when the budget pays for nothing useful, or what is asked contradicts."""
    if wish.budget_flop is not None and wish.budget_seconds is not None:
        raise UserError("--budget and --hours: give one of them")
    device = find_device(wish.device)
    candidates = [
        _candidate(wish, family, shape, device) for family in wish.families for shape in wish.shapes
    ]
    design = {"isoflop": _isoflop, "ratio": _ratio, "branches": _branches, "lr-sweep": _sweep}[wish.design]
    runs = design(wish, candidates)
    cost = _cost(wish, runs)
    if wish_budget(wish) is not None and cost > 1.001 * _budget(wish):
        raise UserError(
            f"the plan costs {cost:.3g} {_unit(wish)}, the budget is {_budget(wish):.3g}: fewer or smaller"
            " --sizes, or fewer --tokens"
        )
    return Plan(
        name=wish.name,
        design=wish.design,
        device=wish.device,
        train_tokens=wish.train_tokens,
        vocab_size=int(wish.model.vocab_size or 0),
        min_lr_share=wish.min_lr_share,
        decay_fraction=wish.train.decay_fraction,
        base=wish.base,
        runs=tuple(runs),
    )


def wish_budget(wish: Wish) -> float | None:
    """The budget in its own unit, FLOP or seconds; None: none was given."""
    return wish.budget_flop if wish.budget_flop is not None else wish.budget_seconds


def _budget(wish: Wish) -> float:
    budget = wish_budget(wish)
    if budget is None:
        raise UserError("needs a budget (--budget FLOP or --hours), or --tokens (isoflop: --budgets)")
    return budget


def _unit(wish: Wish) -> str:
    return "FLOP" if wish.budget_flop is not None else "device seconds"


def _cost(wish: Wish, runs: Sequence[PlannedRun]) -> float:
    return sum(run.seconds if wish.budget_flop is None else run.cost_flop for run in runs)


def _candidate(wish: Wish, family: Variant, shape: Shape, device: Device) -> _Candidate:
    model = shape.model(wish.model).model_copy(
        update={"variant": family, "binary_embedding": wish.model.binary_embedding and family != "rwkv"}
    )
    size = Size.of(model)
    train = wish.train
    if train.precision == "auto":
        train = train.model_copy(update={"precision": "bfloat16"})
    ranks = wish.ranks_of(size.total)
    workload = Workload(
        model,
        train,
        ZeroConfig(),
        ranks=ranks,
        on_cpu=device.on_cpu,
        baseline=device.baseline,
        host_baseline=0,
    )
    return _Candidate(family, shape, size, plan_throughput(workload, device).tokens_per_second / ranks)


def _step_tokens(wish: Wish) -> int:
    return wish.train.batch_size * wish.model.context_length


def _steps(wish: Wish, tokens: float) -> int:
    return max(1, round(tokens / _step_tokens(wish)))


def _decay_start(wish: Wish, steps: int) -> int:
    return max(wish.train.warmup_steps, steps - math.ceil(wish.train.decay_fraction * steps))


def _run(
    wish: Wish, at: _Candidate, steps: int, name: str, trained: int | None = None, **more: Any
) -> PlannedRun:
    tokens = steps * _step_tokens(wish)
    trained_tokens = tokens if trained is None else trained * _step_tokens(wish)
    settings = {
        "kind": "run",
        "lr": wish.lr_of(at.family, at.size.non_embedding),
        "ranks": wish.ranks_of(at.size.total),
        **more,
    }
    return PlannedRun(
        name=name,
        family=at.family,
        layers=at.shape.layers,
        width=at.shape.width,
        parameters=at.size.total,
        parameters_non_embedding=at.size.non_embedding,
        flop_per_token=at.size.flop_per_token,
        tokens=tokens,
        steps=steps,
        flop=float(at.size.flop_per_token * tokens),
        cost_flop=float(at.size.flop_per_token * trained_tokens),
        seconds=trained_tokens / at.tokens_per_second,
        **settings,
    )


def _require_length(wish: Wish, steps: int, what: str) -> None:
    decay = steps - _decay_start(wish, steps)
    if steps <= wish.train.warmup_steps or decay < LEAST_DECAY_STEPS:
        raise UserError(
            f"{what} is {steps} steps of {_step_tokens(wish)} tokens, of which {wish.train.warmup_steps} warm"
            f" up and {max(decay, 0)} decay: more tokens or budget, a smaller batch, or fewer warm-up steps"
        )


def _tag(tokens: float) -> str:
    return f"{tokens / 1e9:.4g}G" if tokens >= 1e9 else f"{tokens / 1e6:.4g}M"


def _largest(wish: Wish, runs_at: Callable[[float], Sequence[PlannedRun]], low: float) -> list[PlannedRun]:
    """Runs for the largest scale, from `low` up, whose cost is within the budget."""
    budget = _budget(wish)
    if _cost(wish, runs_at(low)) > budget:
        least = _cost(wish, runs_at(low))
        raise UserError(f"the budget of {budget:.3g} {_unit(wish)} is too small: the least costs {least:.3g}")
    high, most = low, 0.0
    while (cost := _cost(wish, runs := runs_at(2 * high))) <= budget:
        if not runs:
            raise UserError(
                f"the budget of {budget:.3g} {_unit(wish)} is more than these --sizes can spend with at most"
                f" {wish.ratio_range[1]:g} tokens a parameter (about {most:.3g}): larger --sizes, a wider"
                " --ratio-range, or a smaller budget"
            )
        high, most = 2 * high, max(most, cost)
    low, high = high, 2 * high
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _cost(wish, runs_at(middle)) <= budget else (low, middle)
    return list(runs_at(low))


def _branches(wish: Wish, candidates: Sequence[_Candidate]) -> list[PlannedRun]:
    def runs_for(lengths: Sequence[float]) -> list[PlannedRun]:
        return [run for at in candidates for run in _branches_of(wish, at, lengths)]

    def runs_at(longest: float) -> list[PlannedRun]:
        return runs_for([longest / LENGTH_SPACING**i for i in reversed(range(wish.lengths))])

    if wish.tokens:
        return runs_for(sorted(wish.tokens))
    shortest = _step_tokens(wish) * max(
        math.ceil(LEAST_DECAY_STEPS / wish.train.decay_fraction), 2 * wish.train.warmup_steps
    )
    return _largest(wish, runs_at, shortest * LENGTH_SPACING ** (wish.lengths - 1))


def _branches_of(wish: Wish, at: _Candidate, lengths: Sequence[float]) -> list[PlannedRun]:
    steps = [_steps(wish, tokens) for tokens in lengths if at.size.flop_per_token * tokens <= wish.max_flop]
    if not steps:
        raise UserError(f"--max-flop {wish.max_flop:.3g}: leaves no length of {at.shape}")
    for count in steps:
        _require_length(wish, count, f"a branch of {at.shape}")
    if len(set(steps)) < len(steps):
        raise UserError(f"--tokens: lengths of {sorted(lengths)} tokens are not all different in steps")
    starts = [_decay_start(wish, count) for count in steps]
    trunk = _run(
        wish,
        at,
        max(starts),
        f"{at.family}-{at.shape}-trunk",
        kind="trunk",
        save_at=tuple(sorted(set(starts))),
    )
    branches = [
        _run(
            wish,
            at,
            count,
            f"{at.family}-{at.shape}-{_tag(count * _step_tokens(wish))}",
            trained=count - start,
            kind="branch",
            branch_from=trunk.name,
            branch_step=start,
        )
        for count, start in zip(steps, starts, strict=True)
    ]
    return [trunk, *branches]


def _isoflop(wish: Wish, candidates: Sequence[_Candidate]) -> list[PlannedRun]:
    def runs_for(budgets: Sequence[float], strict: bool) -> list[PlannedRun]:
        runs = []
        for budget in budgets:
            for at in candidates:
                tokens = budget / at.size.flop_per_token
                least, most = wish.ratio_range
                if not least <= tokens / at.size.total <= most:
                    continue
                steps = _steps(wish, tokens)
                if strict:
                    _require_length(wish, steps, f"{at.shape} at {budget:.3g} FLOP")
                name = f"{at.family}-{at.shape}-{budget:.2e}".replace("+", "")
                runs.append(_run(wish, at, steps, name, budget=budget))
        return runs

    def runs_at(largest: float) -> list[PlannedRun]:
        return runs_for([largest / PROFILE_SPACING**i for i in reversed(range(wish.profiles))], False)

    budgets = sorted(wish.budgets)
    if not budgets:
        smallest = min(at.size.flop_per_token * at.size.total for at in candidates)
        chosen = _largest(wish, runs_at, smallest * wish.ratio_range[0])
        budgets = sorted({run.budget for run in chosen if run.budget is not None})
    runs = runs_for(budgets, True)
    for family in wish.families:
        for budget in budgets:
            count = sum(run.family == family and run.budget == budget for run in runs)
            if count < 4:
                raise UserError(
                    f"the profile of {family} at {budget:.3g} FLOP has {count} sizes with"
                    f" {wish.ratio_range[0]:g} to {wish.ratio_range[1]:g} tokens a parameter, and a parabola"
                    " needs 4: more --sizes, or a wider --ratio-range"
                )
    return runs


def _ratio(wish: Wish, candidates: Sequence[_Candidate]) -> list[PlannedRun]:
    runs = []
    for at in candidates:
        steps = _steps(wish, wish.ratio * at.size.total)
        _require_length(wish, steps, f"{at.shape} at {wish.ratio:g} tokens a parameter")
        runs.append(_run(wish, at, steps, f"{at.family}-{at.shape}-r{wish.ratio:g}"))
    if wish_budget(wish) is None:
        return runs
    # The largest shapes that the budget pays for, for all families alike.
    order = sorted({run.shape: run.parameters for run in runs}.items(), key=lambda pair: pair[1])
    for kept in range(len(order), 2, -1):
        shapes = {shape for shape, _ in order[:kept]}
        within = [run for run in runs if run.shape in shapes]
        if _cost(wish, within) <= _budget(wish):
            return within
    raise UserError(f"the budget of {_budget(wish):.3g} {_unit(wish)} does not pay for three of the --sizes")


def _sweep(wish: Wish, candidates: Sequence[_Candidate]) -> list[PlannedRun]:
    if not wish.lrs or len(wish.tokens) != 1:
        raise UserError("--design lr-sweep needs --lrs, and one number in --tokens")
    steps = _steps(wish, wish.tokens[0])
    _require_length(wish, steps, "a run of the sweep")
    return [
        _run(wish, at, steps, f"{at.family}-{at.shape}-lr{lr:.3g}", kind="sweep", lr=lr)
        for at in candidates
        for lr in wish.lrs
    ]
