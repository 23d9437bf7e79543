"""Models go into MLflow's registry and come back; runs are listed and compared."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spikescale.cli.main import main
from spikescale.config import ModelConfig
from spikescale.data_pipeline.tokenizers import make_tokenizer, parse_spec
from spikescale.errors import UserError
from spikescale.model import SpikeGPT
from spikescale.model.store import find_model_folder, load_model_folder, save_model_folder
from spikescale.scaling.mlflow_points import read_mlflow
from spikescale.scaling.points import final_points
from spikescale.tracking.comparison import plot_comparison
from spikescale.tracking.mlflow_run import MlflowRun
from spikescale.tracking.run_table import RunStore, differing, sparkline


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with two runs of two models, `first` twice in the registry and `second` once."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    tokenizer = make_tokenizer(parse_spec("byte"), [])
    for name, width in (("first", 8), ("second", 16)):
        config = ModelConfig(layers=1, width=width, vocab_size=tokenizer.vocab_size, context_length=8)
        model = SpikeGPT(config, seed=width)
        run = MlflowRun(uri, "tests", name, artifacts=folder / "artifacts")
        settings = {"model.width": width, "model.layers": 1, "model.vocab_size": config.vocab_size}
        settings |= {"model.variant": config.variant, "model.context_length": 8, "train.batch_size": 2}
        run.log_parameters({**settings, "train.lr": 0.01, "name": name})
        for step in (1, 2, 3):
            losses = {"loss/train": 5.0 / step, "loss/valid": width / step}
            run.log_metrics({**losses, "neurons/mean_firing_rate": 0.1 * step}, step)
        for step in (2, 3) if name == "first" else (3, 3):
            model_folder = folder / f"{name}-{step}"
            if not model_folder.exists():
                save_model_folder(
                    model_folder, dict(model.named_parameters()), config, tokenizer, {"step": step}
                )
            run.register_model(model_folder, name, {"step": str(step), "valid_loss": f"{width / step:.3f}"})
        assert run.finish(seconds=120)
    return uri


@pytest.fixture(autouse=True)
def address(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


def test_registered_models_come_back_by_run_version_alias_and_name(store, capsys):
    from mlflow.tracking import MlflowClient

    MlflowClient(tracking_uri=store).set_registered_model_alias("first", "good", "1")
    runs = {run.name: run for run in RunStore(store).runs()}
    for address, width, step in (
        (f"runs:/{runs['first'].id}", 8, 3),
        ("models:/first/1", 8, 2),
        ("models:/first@good", 8, 2),
        ("models:/first", 8, 3),
        ("models:/second", 16, 3),
        (f"runs:/{runs['second'].id}/model/step-3", 16, 3),
    ):
        loaded = load_model_folder(find_model_folder(Path(address)))
        assert (loaded.config.width, loaded.info["step"]) == (width, step)
    assert main(["runs", "list", "--models", "--json"]) == 0
    versions = json.loads(capsys.readouterr().out)
    # One version for each step, however often it was handed over.
    assert [(v["name"], v["version"], v["step"]) for v in versions] == [
        ("first", 1, "2"),
        ("first", 2, "3"),
        ("second", 1, "3"),
    ]
    assert versions[2]["valid_loss"] == "5.333"


def test_generate_speaks_with_a_model_of_the_registry(capsys):
    assert (
        main(["generate", "--model", "models:/first", "--tokens", "3", "--prompt", "a", "--ignore-eos"]) == 0
    )
    assert "3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["models:/third"], "no model of this name; there are first, second"),
        (["models:/first/9"], "models:/first/9 in sqlite"),
        (["runs:/0123"], "runs:/0123 in sqlite"),
        (["models:/first", "--model", "models:/second"], "name one model"),
        ([], "name one model"),
    ],
)
def test_models_that_are_not_there_are_refused_in_one_line(capsys, words, said):
    assert main(["generate", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_missing_store_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    assert main(["generate", "models:/first"]) == 2
    assert "no such store" in capsys.readouterr().err
    assert main(["runs", "list"]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "none.db").exists()


def test_runs_are_listed_by_a_metric_and_filtered(capsys):
    assert main(["runs", "list", "--sort", "loss/valid", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in listed] == ["first", "second"]
    assert listed[0]["metrics"]["loss/valid"] == pytest.approx(8 / 3)
    assert main(["runs", "list", "--filter", "params.`model.width` = '16'"]) == 0
    table = capsys.readouterr().out
    assert "second" in table
    assert "first" not in table
    assert main(["runs", "list", "--filter", "nonsense"]) == 2
    assert main(["runs", "list", "--experiment", "none"]) == 2
    assert "there are Default, tests" in capsys.readouterr().err


def test_compared_runs_show_what_differs_and_their_curves(store, tmp_path, capsys):
    runs = RunStore(store)
    pair = [runs.named("first"), runs.named(runs.named("second").id[:6])]
    assert differing(pair) == ["model.width"]
    assert main(["runs", "compare", "first", "second", "--output", str(tmp_path / "curves.png")]) == 0
    shown = capsys.readouterr().out
    assert "model.width" in shown
    assert "loss 5.000 █" in shown
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="third: no run of this id or name"):
        runs.named("third")


def test_runs_are_points_of_a_scaling_law(store):
    points = sorted(read_mlflow(store, "tests"), key=lambda point: (point.run, point.tokens))
    assert [(point.run, point.tokens, point.final) for point in points] == [
        (name, 16.0 * step, step == 3) for name in ("first", "second") for step in (1, 2, 3)
    ]
    model = SpikeGPT(ModelConfig(layers=1, width=16, vocab_size=256))
    last = final_points(points)[-1]
    assert last.parameters == model.count_parameters()
    assert (last.loss, last.firing_rate, last.lr) == (pytest.approx(16 / 3), pytest.approx(0.3), 0.01)
    assert last.flop == 6 * 48 * (13 * 16 * 16 + 256 * 16)
    with pytest.raises(UserError, match="there are Default, tests"):
        read_mlflow(store, "none")
    with pytest.raises(UserError, match="no finished run"):
        read_mlflow(store, "Default")


@pytest.fixture
def same_name(store, tmp_path):
    """Two runs of one name, of a model whose neurons learn, in an experiment that is removed afterwards."""
    from mlflow.tracking import MlflowClient

    config = ModelConfig(layers=1, width=16, vocab_size=256, neuron={"learn_tau": True})
    neuron = {f"neuron.{key}": value for key, value in config.neuron.model_dump().items()}
    settings = config.model_dump(exclude={"neuron"}) | neuron
    for last in (2.0, 1.5):
        run = MlflowRun(store, "same", "twice", artifacts=tmp_path / "artifacts")
        run.log_parameters({f"model.{key}": value for key, value in settings.items()})
        run.log_parameters({"train.batch_size": 2, "train.lr": 0.01})
        run.log_metrics({"loss/valid": last}, 4)
        assert run.finish(seconds=120)
    yield config
    client = MlflowClient(tracking_uri=store)
    client.delete_experiment(client.get_experiment_by_name("same").experiment_id)


def test_runs_of_one_name_stay_apart_and_learnt_neurons_are_counted(store, same_name):
    points = read_mlflow(store, "same")
    assert sorted(point.loss for point in final_points(points)) == [1.5, 2.0]
    assert {point.run for point in points} == {f"twice ({run.id})" for run in RunStore(store).runs("same")}
    assert {point.parameters for point in points} == {SpikeGPT(same_name).count_parameters()}


def test_steps_are_never_shown_as_tokens(store, tmp_path):
    runs = RunStore(store)
    silent = replace(runs.named("first"), settings={"train.batch_size": "2"})
    with pytest.raises(UserError, match=r"first .*how many tokens a step has.*--against steps"):
        plot_comparison(runs, [silent], tmp_path / "curves.png")
    plot_comparison(runs, [silent], tmp_path / "curves.png", against="steps")
    assert (tmp_path / "curves.png").is_file()


def test_sparkline_is_as_high_as_its_values():
    assert sparkline([3.0, 1.0, 2.0]) == "█▁▅"
    assert len(sparkline(list(range(1000)), 40)) == 40
    assert sparkline([]) == ""
