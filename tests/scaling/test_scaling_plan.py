"""Plans spend the budget on the grid that was asked for."""

import json
import math
import signal

import pytest
import yaml

from spikescale.cli.main import main
from spikescale.config.load import settings_of
from spikescale.errors import UserError
from spikescale.model import SpikeGPT
from spikescale.scaling.ladder import Shape, Size, parse_number, parse_shapes, shape_near
from spikescale.scaling.learning_rate import fit_rules, read_rules, rules_as_json
from spikescale.scaling.plan_file import read_plan
from spikescale.scaling.points import Point
from spikescale.training.schedule import learning_rate


def plan(tmp_path, data, *words):
    """The plan that a command line writes."""
    output = tmp_path / "plan.yaml"
    common = [
        "scaling",
        "plan",
        "--data",
        str(data),
        "--runs",
        str(tmp_path / "runs"),
        "--output",
        str(output),
    ]
    assert main([*common, *words]) == 0
    return read_plan(output)


def test_both_counts_are_those_of_the_model():
    model = Shape(4, 32).model(
        settings_of({"data": {"path": "x"}, "model": {"vocab_size": 300}}, [], "").model
    )
    size = Size.of(model)
    built = SpikeGPT(model)
    assert size.total == built.count_parameters()
    assert size.non_embedding == size.total - built.embedding.weight.numel() - built.head.weight.numel()
    projections = [p for name, p in built.named_parameters() if p.ndim == 2 and name != "embedding.weight"]
    assert size.flop_per_token == 6 * sum(p.numel() for p in projections)


def test_shapes_follow_the_presets():
    presets = [Shape(12, 512), Shape(18, 768), Shape(24, 1024)]
    for shape in presets:
        body = shape.layers * (13 * shape.width**2 + 11 * shape.width) + 4 * shape.width
        assert shape_near(body) == shape
    ladder = parse_shapes("50k:2M:6")
    assert len(ladder) == 6
    assert (ladder[0], ladder[-1]) == (Shape(4, 32), Shape(4, 192))


@pytest.mark.parametrize("text", ["4x32,4x32", "50k:2M", "x", "2M:50k:3", "50k:2M:1", "50k:51k:4"])
def test_sizes_that_make_no_ladder_are_refused(text):
    with pytest.raises(UserError, match="--sizes"):
        parse_shapes(text)


def test_numbers_have_suffixes():
    assert [parse_number(text, "-") for text in ("50k", "2M", "1.5e9", "3t")] == [5e4, 2e6, 1.5e9, 3e12]
    for text in ("", "-1", "k", "1.2.3", "nan"):
        with pytest.raises(UserError, match="--x"):
            parse_number(text, "--x")


def test_branches_spend_the_budget_and_share_their_trunk(tmp_path, prepared_data, capsys):
    found = plan(tmp_path, prepared_data, "--sizes", "4x32,4x64", "--lengths", "3", "--budget", "3e12")
    cost = sum(run.cost_flop for run in found.runs)
    assert 0.97 * 3e12 < cost <= 3e12
    trunks = [run for run in found.runs if run.kind == "trunk"]
    assert [trunk.shape for trunk in trunks] == ["4x32", "4x64"]
    for trunk in trunks:
        branches = [run for run in found.runs if run.branch_from == trunk.name]
        assert [b.branch_step for b in branches] == list(trunk.save_at)
        longest = branches[-1]
        assert trunk.steps == longest.branch_step == longest.steps - math.ceil(0.2 * longest.steps)
        assert longest.tokens / branches[0].tokens == pytest.approx(4, rel=0.01)
        # A branch counts whole as a point, and costs only its decay.
        assert longest.flop == longest.flop_per_token * longest.tokens
        assert longest.cost_flop == longest.flop * (longest.steps - longest.branch_step) / longest.steps
    assert "passes over the data" in capsys.readouterr().err  # the test's corpus is tiny


def test_small_sizes_go_on_where_large_ones_would_cost_too_much(tmp_path, prepared_data):
    words = ["--sizes", "4x32,4x64", "--tokens", "0.5M,1M,2M", "--max-flop", "1.1e12"]
    found = plan(tmp_path, prepared_data, *words)
    lengths = [(run.shape, round(run.tokens / 1e6, 1)) for run in found.runs if run.kind == "branch"]
    assert lengths == [("4x32", 0.5), ("4x32", 1.0), ("4x32", 2.0), ("4x64", 0.5)]


def test_rate_of_trunk_and_branch_is_that_of_one_whole_run(tmp_path, prepared_data):
    found = plan(tmp_path, prepared_data, "--sizes", "4x32", "--tokens", "0.5M,1M")
    configs = {run.name: settings_of(found.base, found.settings(run), run.name) for run in found.runs}
    trunk, *branches = found.runs
    for branch in branches:
        whole = configs[branch.name].train
        for step in range(branch.branch_step):
            assert learning_rate(step, configs[trunk.name].train) == learning_rate(step, whole)
        assert learning_rate(branch.steps - 1, whole) == pytest.approx(branch.lr * found.min_lr_share)
        assert configs[branch.name].branch_from.name == f"step-{branch.branch_step:08d}"


def test_isoflop_profiles_have_equal_flop_within_the_budget(tmp_path, prepared_data):
    words = ["--design", "isoflop", "--sizes", "50k:1M:6", "--profiles", "2", "--budget", "2e13"]
    found = plan(tmp_path, prepared_data, *words, "--ratio-range", "0.1:1000")
    budgets = sorted({run.budget for run in found.runs})
    assert len(budgets) == 2
    assert budgets[1] / budgets[0] == pytest.approx(3)
    for run in found.runs:
        assert run.flop == pytest.approx(run.budget, rel=0.05)  # whole steps
    assert 0.9 * 2e13 < sum(run.cost_flop for run in found.runs) <= 2.01e13


def test_a_budget_that_no_size_can_spend_is_refused(tmp_path, prepared_data, capsys):
    def late(*_):
        raise TimeoutError("still searching for the largest budget")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        words = ["scaling", "plan", "--data", str(prepared_data), "--output", str(tmp_path / "p.yaml")]
        words += ["--design", "isoflop", "--sizes", "50k:1M:6", "--budget", "1e25"]
        assert main([*words, "--runs", str(tmp_path), "--ratio-range", "0.1:1000"]) == 2
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert "is more than these --sizes can spend with at most 1000 tokens" in capsys.readouterr().err


def test_ratio_ladder_drops_what_the_budget_does_not_pay_for(tmp_path, prepared_data):
    words = [
        "--design",
        "ratio",
        "--sizes",
        "4x32,4x48,4x64,4x96",
        "--ratio",
        "10",
        "--variants",
        "spikegpt,rwkv",
    ]
    whole = plan(tmp_path, prepared_data, *words)
    assert len(whole.runs) == 8
    for run in whole.runs:
        assert run.tokens / run.parameters == pytest.approx(10, rel=0.02)
    assert [run.family for run in whole.runs] == ["spikegpt"] * 4 + ["rwkv"] * 4
    budget = sum(run.cost_flop for run in whole.runs if run.shape != "4x96")
    part = plan(tmp_path, prepared_data, *words, "--budget", str(budget))
    assert {run.shape for run in part.runs} == {"4x32", "4x48", "4x64"}


def test_large_models_take_more_ranks_and_mup_keeps_the_rate(tmp_path, prepared_data):
    words = [
        "--design",
        "ratio",
        "--sizes",
        "4x32,4x64,4x128",
        "--rank-parameters",
        "250k",
        "--width-transfer",
        "32",
    ]
    found = plan(tmp_path, prepared_data, *words)
    assert [run.ranks for run in found.runs] == [1, 1, 4]
    assert found.base["model"]["width_transfer"] == 32
    assert len({run.lr for run in found.runs}) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--design", "branches"], "needs a budget"),
        (["--budget", "1e6"], "budget of 1e+06 FLOP is too small: the least costs"),
        (["--sizes", "4x32", "--tokens", "50k"], "a branch of 4x32 is 24 steps of 2048 tokens"),
        (["--variants", "gpt", "--budget", "1e13"], "--variants gpt: must be of"),
        (["--design", "lr-sweep", "--budget", "1e13"], "needs --lrs"),
        (["--tokens", "1M,2M", "--budget", "1e12"], "the plan costs"),
        (["--design", "isoflop", "--sizes", "4x32,4x48", "--budgets", "1e12"], "a parabola needs 4"),
        (["--budget", "1e13", "--set", "train.clip=-1"], "train.clip"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path, prepared_data, capsys, words, said):
    common = ["scaling", "plan", "--data", str(prepared_data), "--output", str(tmp_path / "p.yaml")]
    assert main([*common, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "p.yaml").exists()


def test_damaged_plans_are_refused(tmp_path, prepared_data):
    plan(tmp_path, prepared_data, "--sizes", "4x32", "--tokens", "0.5M,1M")
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    for change, said in (
        (lambda c: c.update(format=7), "not a plan of format 1"),
        (lambda c: c["runs"][1].update(branch_step=3), "no checkpoint of a trunk"),
        (lambda c: c["runs"][0].update(steps=0), "runs.0.steps"),
        (lambda c: c["runs"].append(c["runs"][0]), "names must differ"),
    ):
        damaged = yaml.safe_load(yaml.safe_dump(content))
        change(damaged)
        (tmp_path / "damaged.yaml").write_text(yaml.safe_dump(damaged))
        with pytest.raises(UserError, match=said):
            read_plan(tmp_path / "damaged.yaml")


def sweep(best, sizes=(1e5, 1e6), rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3)):
    return [
        Point(2 * n, 1e6, 2 + math.log(lr / best(n)) ** 2, 1e12, n, family="spikegpt", lr=lr)
        for n in sizes
        for lr in rates
    ]


def test_sweep_gives_the_rule_that_it_was_made_from(tmp_path):
    rule = fit_rules(sweep(lambda n: 0.3 * n**-0.4))["spikegpt"]  # 3e-3 and 1.2e-3
    assert (rule.coefficient, rule.exponent) == pytest.approx((0.3, -0.4))
    assert not any(border for *_, border in rule.best)
    (tmp_path / "rule.json").write_text(json.dumps(rules_as_json({"spikegpt": rule})))
    assert read_rules(tmp_path / "rule.json") == {"spikegpt": rule}
    assert rule(1e7) == pytest.approx(0.3 * 1e7**-0.4)


def test_best_rate_at_the_border_of_its_sweep_is_marked():
    rule = fit_rules(sweep(lambda n: 0.1))["spikegpt"]
    assert [(lr, border) for _, lr, border in rule.best] == [(8e-3, True)] * 2
