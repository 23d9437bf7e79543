"""Variants over seeds: which runs there are, that finished ones are kept, what is made of their figures."""

import json
import math
from pathlib import Path

import pytest

from spikescale.ablation import runner
from spikescale.ablation.report import summarise, table_rows, write_report
from spikescale.ablation.statistics import paired_difference, t_interval
from spikescale.ablation.study import VARIANTS, AblationRun, plan_runs
from spikescale.cli.main import main
from spikescale.errors import UserError
from spikescale.files import write_json


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    content = {
        "name": "study",
        "output": str(tmp_path / "runs"),
        "data": {"path": str(tmp_path / "data")},
        "model": {"preset": "tiny"},
        "train": {"steps": 4, "warmup_steps": 1, "precision": "auto"},
        "mlflow": {"enabled": False},
    }
    path.write_text(json.dumps(content))
    return path


def finish(run: AblationRun, bits: float, **changes: object) -> None:
    """What a finished run leaves behind, as far as an ablation looks at it."""
    settings = run.config.model_dump(mode="json")
    settings["model"]["vocab_size"], settings["train"]["precision"] = 256, "bfloat16"
    settings["train"].update(changes)
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(json.dumps(settings))
    records = [{"step": step, "valid_bits_per_byte": bits + 1 / step} for step in (2, 4)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rate = None if run.variant == "rwkv" else 0.25
    splits = {"test": {"bits_per_byte": bits, "tokens": 1000}}
    write_json(
        run.folder / "result.json", {"step": 4, "parameters": 900, "firing_rate": rate, "splits": splits}
    )


def test_every_variant_is_run_with_every_seed_and_the_same_budget(run_file, tmp_path):
    runs = plan_runs(run_file, VARIANTS, range(3), ["train.lr=0.002"])
    assert [(run.variant, run.seed) for run in runs] == [(v, seed) for seed in range(3) for v in VARIANTS]
    for run in runs:
        assert run.folder == tmp_path / "runs" / "study" / f"{run.variant}-seed{run.seed}"
        assert run.config.train.seed == run.config.data.seed == run.seed
        assert run.config.model.variant == run.variant
        assert run.config.model.binary_embedding is (run.variant != "rwkv")
        assert run.config.train.lr == 0.002
    budgets = {(run.config.train.steps, run.config.train.batch_size, run.config.model.layers) for run in runs}
    assert len(budgets) == 1
    with pytest.raises(UserError, match="--variants lstm: must be one of rwkv, heaviside-rwkv"):
        plan_runs(run_file, ["lstm"], [0])
    with pytest.raises(UserError, match="name each variant once"):
        plan_runs(run_file, ["rwkv", "rwkv"], [0])


def test_a_run_is_finished_only_with_these_very_settings(run_file):
    run, other, short = plan_runs(run_file, ["rwkv", "spikegpt", "spikegpt-b"], [0])
    assert run.result() is None
    finish(run, 2.0)
    assert run.result()["splits"]["test"]["bits_per_byte"] == 2.0
    finish(other, 2.0, lr=0.5)
    with pytest.raises(UserError, match=r"train.lr = 0.5, and this ablation has 0.001: choose another name"):
        other.result()
    finish(short, 2.0)
    result = json.loads((short.folder / "result.json").read_text())
    write_json(short.folder / "result.json", {**result, "step": 3})
    assert short.result() is None


def test_finished_runs_are_not_repeated_and_a_failure_says_why(run_file, monkeypatch):
    runs = plan_runs(run_file, ["rwkv", "spikegpt"], [0])
    started: list[str] = []
    most = 0

    class Pretended:
        """A run that is finished at the second look."""

        active = 0

        def __init__(self, run: AblationRun) -> None:
            nonlocal most
            started.append(run.variant)
            Pretended.active += 1
            most = max(most, Pretended.active)
            self.run, self.looks, self.returncode = run, 0, 0

        def poll(self) -> int | None:
            self.looks += 1
            if self.looks < 2:
                return None
            finish(self.run, 2.0)
            Pretended.active -= 1
            return 0

    monkeypatch.setattr(runner, "_start", lambda run, config: Pretended(run))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0)
    finish(runs[0], 2.0)
    seen: list[tuple[str, int]] = []
    assert runner.run_all(runs, run_file, None, lambda run, steps: seen.append((run.variant, steps)))
    assert (started, seen[0], most) == (["spikegpt"], ("rwkv", 4), 1)
    assert runner.run_all(runs, run_file)
    assert started == ["spikegpt"]
    several = plan_runs(run_file, list(VARIANTS), [2])
    assert runner.run_all(several, run_file, workers=3)
    assert (started[1:], most) == (list(VARIANTS), 3)
    late = plan_runs(run_file, ["rwkv", "spikegpt"], [1])
    assert not runner.run_all(late, run_file, seconds=0)
    assert len(started) == 6
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"rwkv-seed1: the run ended with code 2: .*data.*no such"):
        runner.run_all(late[:1], run_file)


def test_intervals_are_students_and_differences_are_paired():
    values = [2.10, 2.14, 2.12]
    interval = t_interval(values)
    # t(0.975; 2) = 4.302653, and the sample's deviation is 0.02.
    assert (interval.mean, interval.deviation) == (pytest.approx(2.12), pytest.approx(0.02))
    assert interval.half_width == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-6)
    alone = t_interval([2.0])
    assert alone.mean == 2.0 and math.isnan(alone.low)
    paired = paired_difference({0: 2.2, 1: 2.3, 2: 2.4, 5: 9.0}, {0: 2.1, 1: 2.2, 2: 2.3})
    assert paired is not None
    assert (paired.mean, paired.half_width) == (pytest.approx(0.1), pytest.approx(0, abs=1e-12))
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_the_report_orders_variants_and_says_what_is_missing(run_file, tmp_path, capsys):
    runs = plan_runs(run_file, ["rwkv", "spikegpt", "spikegpt-driven"], range(2))
    for run in runs[:5]:
        finish(run, {"rwkv": 2.0, "spikegpt": 2.1, "spikegpt-driven": 1.9}[run.variant] + run.seed / 100)
    summary = summarise(runs, "test", "rwkv")
    assert [row["variant"] for row in summary["variants"]] == ["spikegpt-driven", "rwkv", "spikegpt"]
    assert (summary["finished"], summary["planned"]) == (5, 6)
    assert summary["budget"] == {"steps": 4, "tokens": 4 * 16 * 256, "scored_tokens": 1000}
    by_name = {row["variant"]: row for row in summary["variants"]}
    assert by_name["spikegpt"]["seeds"] == {"0": 2.1, "1": pytest.approx(2.11)}
    assert by_name["spikegpt"]["difference"]["mean"] == pytest.approx(0.1)
    assert by_name["spikegpt-driven"]["difference"]["low"] is None  # one seed
    assert by_name["rwkv"]["difference"] is None and by_name["rwkv"]["firing_rate"] is None
    columns, rows = table_rows(summary)
    assert all(len(row) == len(columns) for row in rows)
    assert rows[0][3:6] == ["1.9000", "-", "-0.1000"]
    write_report(runs, summary, tmp_path)
    assert json.loads((tmp_path / "ablation.json").read_text()) == json.loads(json.dumps(summary))
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="has no valid split; there are test"):
        summarise(runs, "valid", "rwkv")
    finish(runs[5], 1.9)
    words = [
        "ablate",
        "--config",
        str(run_file),
        "--variants",
        "rwkv,spikegpt,spikegpt-driven",
        "--seeds",
        "2",
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "65,536" not in out and "16,384 tokens a run (4 steps)" in out
    assert out.index("spikegpt-driven") < out.rindex(" rwkv ")
    assert main([*words[:-1], "0"]) == 2
    assert "--seeds 0: must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_run_stops_goes_on_and_stands_under_a_parent_in_mlflow(tmp_path, capsys):
    from mlflow.tracking import MlflowClient

    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number} says what it says. " * 20)
    prepare = ["data", "prepare", "--source", str(tmp_path / "text"), "--no-ray", "--quiet"]
    prepare += ["--valid-fraction", "0.2", "--test-fraction", "0.2", "--output", str(tmp_path / "data")]
    assert main(prepare) == 0
    train = {"steps": 3, "warmup_steps": 1, "batch_size": 2, "log_every": 1, "threads": 1, "sample_count": 0}
    content = {
        "name": "study",
        "output": str(tmp_path / "runs"),
        "data": {"path": str(tmp_path / "data")},
        "model": {"layers": 1, "width": 8, "context_length": 16},
        "train": train,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    words = ["ablate", "--config", str(tmp_path / "run.yaml"), "--variants", "spikegpt", "--seeds", "1"]
    assert main([*words, "--minutes", "0.00001"]) == 75
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["finished"], summary["budget"]["tokens"]) == (1, 3 * 2 * 16)
    study = tmp_path / "runs" / "study"
    client = MlflowClient(tracking_uri=f"sqlite:///{study}/mlflow.db")
    parent = json.loads((study / "mlflow_run.json").read_text())["run_id"]
    child = json.loads((study / "spikegpt-seed0" / "mlflow_run.json").read_text())["run_id"]
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent
    found = json.loads((study / "spikegpt-seed0" / "result.json").read_text())
    bits = found["splits"]["test"]["bits_per_byte"]
    assert client.get_run(parent).data.metrics["test_bits_per_byte/spikegpt"] == pytest.approx(bits)
    assert {"ablation.json", "ablation.png"} <= {file.path for file in client.list_artifacts(parent)}
