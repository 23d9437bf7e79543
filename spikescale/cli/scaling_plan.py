"""`spikescale scaling plan`: a grid of runs from a compute budget."""

import argparse
import math
from pathlib import Path
from typing import Any

from spikescale.errors import UserError

VARIANTS = ("spikegpt", "spikegpt-b", "spikegpt-driven", "heaviside-rwkv", "rwkv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    what = parser.add_argument_group("the ladder")
    what.add_argument("--data", required=True, metavar="FOLDER", help="prepared data (data prepare)")
    what.add_argument("--name", default="ladder", help="of the plan; its runs go to OUTPUT/NAME")
    what.add_argument(
        "--design",
        choices=("branches", "isoflop", "ratio", "lr-sweep"),
        default="branches",
        help="branches: many lengths from one long run of each size; isoflop: profiles of equal FLOP;"
        " ratio: a fixed number of tokens a parameter; lr-sweep: several rates for `scaling lr`",
    )
    what.add_argument("--variants", default="spikegpt", help=f"of {', '.join(VARIANTS)}; commas between them")
    what.add_argument(
        "--sizes",
        default="50k:2M:6",
        help="LAYERSxWIDTH with commas, or LOW:HIGH:COUNT of non-embedding parameters",
    )
    what.add_argument("--tokens", help="lengths of the runs, such as 1M,2M,4M, in place of a budget")
    what.add_argument(
        "--lengths", type=int, default=4, metavar="N", help="branches: lengths, each twice the last"
    )
    what.add_argument(
        "--max-flop", metavar="FLOP", help="branches: leave lengths out that cost a size more (default: none)"
    )
    what.add_argument("--budgets", help="isoflop: FLOP of the profiles, in place of a budget of all")
    what.add_argument(
        "--profiles", type=int, default=4, metavar="N", help="isoflop: profiles, each 3x the last"
    )
    what.add_argument("--ratio", type=float, default=20.0, help="ratio: tokens a parameter (all of them)")
    what.add_argument(
        "--ratio-range",
        default="1:1000",
        metavar="LOW:HIGH",
        help="isoflop: tokens a parameter that are tried",
    )
    budget = parser.add_argument_group("budget")
    either = budget.add_mutually_exclusive_group()
    either.add_argument("--budget", metavar="FLOP", help="of all runs together, such as 3e14")
    either.add_argument("--hours", type=float, metavar="H", help="of all devices together")
    budget.add_argument("--devices", type=int, default=1, metavar="N", help="that --hours are hours of")
    budget.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="h100, a100-80, a100-40, mi300x, rtx4090, or cpu: a core",
    )
    budget.add_argument(
        "--rank-parameters",
        metavar="N",
        help="parameters a rank; larger models take more ranks, a power of two (default: one rank each)",
    )
    train = parser.add_argument_group("training")
    rate = train.add_mutually_exclusive_group()
    rate.add_argument("--lr", type=float, default=4e-3, help="learning rate of all sizes")
    rate.add_argument("--lr-rule", type=Path, metavar="FILE", help="rule by size, from `scaling lr`")
    train.add_argument("--lrs", help="lr-sweep: the rates, such as 1e-3,2e-3,4e-3")
    train.add_argument(
        "--width-transfer", type=int, metavar="WIDTH", help="muP: --lr was tuned at this width (default: off)"
    )
    train.add_argument(
        "--min-lr-share", type=float, default=0.05, help="rate at the end over that of the start"
    )
    train.add_argument("--warmup-steps", type=int, default=50, help="of every run")
    train.add_argument(
        "--decay-fraction", type=float, default=0.2, help="share of the steps in which it decays"
    )
    train.add_argument("--decay-shape", choices=("linear", "1-sqrt"), default="linear", help="how it decays")
    train.add_argument("--batch-size", type=int, default=16, help="sequences a step")
    train.add_argument("--context-length", type=int, default=128, help="tokens a sequence")
    train.add_argument(
        "--evaluate-tokens", type=int, default=131072, help="of the valid split, for each loss"
    )
    train.add_argument("--seed", type=int, default=0, help="of weights and of the order of data")
    train.add_argument("--set", nargs="*", default=[], metavar="key.sub=value", help="settings of every run")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where runs are written"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the plan: .yaml or .json")


def run(arguments: argparse.Namespace) -> int:
    """Write the plan and print what it costs."""
    from spikescale.config.load import settings_of
    from spikescale.data_pipeline.manifest import load_manifest
    from spikescale.scaling.ladder import parse_number, parse_numbers, parse_shapes
    from spikescale.scaling.learning_rate import read_rules
    from spikescale.scaling.plan_file import write_plan
    from spikescale.scaling.planner import Wish, make_plan
    from spikescale.scaling.tables import show_plan

    families = arguments.variants.split(",")
    for family in families:
        if family not in VARIANTS:
            raise UserError(f"--variants {family}: must be of {', '.join(VARIANTS)}")
    manifest = load_manifest(Path(arguments.data))
    base = _base(arguments)
    config = settings_of(base, arguments.set, f"the settings of {arguments.name}")
    rules = read_rules(arguments.lr_rule) if arguments.lr_rule else None

    def lr_of(family: str, parameters: float) -> float:
        if rules is None:
            return float(arguments.lr)
        if family not in rules:
            raise UserError(f"{arguments.lr_rule}: has no rule for {family}")
        return rules[family](parameters)

    per_rank = (
        parse_number(arguments.rank_parameters, "--rank-parameters") if arguments.rank_parameters else None
    )

    def ranks_of(parameters: float) -> int:
        ranks = 1
        while per_rank is not None and parameters / ranks > per_rank:
            ranks *= 2
        return ranks

    seconds = None if arguments.hours is None else arguments.hours * 3600 * arguments.devices
    wish = Wish(
        name=arguments.name,
        design=arguments.design,
        families=families,
        shapes=parse_shapes(arguments.sizes),
        model=config.model.model_copy(update={"vocab_size": manifest.tokenizer.vocab_size}),
        train=config.train,
        base=config.model_dump(mode="json", exclude_unset=True),
        train_tokens=manifest.totals("train").tokens,
        lr_of=lr_of,
        device=arguments.device,
        budget_flop=parse_number(arguments.budget, "--budget") if arguments.budget else None,
        budget_seconds=seconds,
        tokens=parse_numbers(arguments.tokens, "--tokens") if arguments.tokens else (),
        budgets=parse_numbers(arguments.budgets, "--budgets") if arguments.budgets else (),
        max_flop=parse_number(arguments.max_flop, "--max-flop") if arguments.max_flop else math.inf,
        lengths=arguments.lengths,
        profiles=arguments.profiles,
        ratio=arguments.ratio,
        ratio_range=_range(arguments.ratio_range),
        lrs=parse_numbers(arguments.lrs, "--lrs") if arguments.lrs else (),
        min_lr_share=arguments.min_lr_share,
        ranks_of=ranks_of,
    )
    plan = make_plan(wish)
    write_plan(plan, arguments.output)
    show_plan(plan)
    print(f"written: {arguments.output}; start it with: spikescale scaling run {arguments.output}")
    return 0


def _range(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        found = float(low), float(high)
    except ValueError:
        found = (0.0, 0.0)
    if not 0 < found[0] < found[1]:
        raise UserError(f"--ratio-range {text}: write LOW:HIGH, numbers above 0")
    return found


def _base(arguments: argparse.Namespace) -> dict[str, Any]:
    model: dict[str, Any] = {"context_length": arguments.context_length}
    if arguments.width_transfer is not None:
        model["width_transfer"] = arguments.width_transfer
    return {
        "output": str(arguments.runs / arguments.name),
        "data": {"path": str(arguments.data), "seed": arguments.seed, "verify": "size"},  # verified by `run`
        "model": model,
        "train": {
            "batch_size": arguments.batch_size,
            "steps": 1_000_000_000,  # each run has its own
            "optimizer": "adamw",
            "weight_decay": 0.1,
            "lr": arguments.lr,
            "min_lr": 0.0,
            "warmup_steps": arguments.warmup_steps,
            "schedule": "wsd",
            "decay_fraction": arguments.decay_fraction,
            "decay_shape": arguments.decay_shape,
            "precision": "auto",
            "log_every": 20,
            "evaluate_every": 0,
            "evaluate_tokens": arguments.evaluate_tokens,
            "final_evaluation_tokens": 4096,
            "save_every": 0,
            "sample_count": 0,
            "seed": arguments.seed,
        },
        "zero": {"stage": 1},
        "mlflow": {"experiment": arguments.name, "register_model": False},
    }
