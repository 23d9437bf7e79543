"""The report and the fit command say what the law says, in pages that hold everything."""

import json
from dataclasses import replace

import numpy as np
import pytest
from synthetic import CHINCHILLA, chinchilla, grid

from spikescale.cli.main import main
from spikescale.config import load_model_preset
from spikescale.scaling.fit import Options, fit_family
from spikescale.scaling.forecast import forecast
from spikescale.scaling.ladder import Size
from spikescale.scaling.points import write_points
from spikescale.scaling.report import Content, write_report
from spikescale.scaling.twin import worth

OPTIONS = Options(rounds=8, forms=("chinchilla",), approaches=(3,))


def half_as_good(n, d):
    """The law of models that are worth half their parameters."""
    return chinchilla(0.5 * n, d)


@pytest.fixture(scope="module")
def points():
    """A twin, and a family that is worth half of it; its name is not fit for HTML."""
    twin = [replace(p, family="rwkv", run=f"r{i}") for i, p in enumerate(grid(noise=1e-4))]
    spiking = [
        replace(p, family="<b>spiking", run=f"s{i}", firing_rate=0.2)
        for i, p in enumerate(grid(half_as_good, noise=1e-4, seed=1))
    ]
    return [*twin, *spiking]


def test_effective_parameters_are_those_of_the_twin_with_the_same_loss(points):
    twin = fit_family("rwkv", points[:30], OPTIONS).forms["chinchilla"]
    found = worth(points[30:], twin, "total")
    assert len(found) == 30
    for each in found:
        assert each.ratio.value == pytest.approx(0.5, rel=0.05)
        assert 0.45 < each.ratio.low < each.ratio.high < 0.55
    hopeless = worth([replace(points[0], loss=0.5)], twin, "total")
    assert hopeless[0].ratio.value == np.inf


def test_forecast_is_the_law_at_the_presets_own_cost(points):
    form = fit_family("rwkv", points[:30], OPTIONS).forms["chinchilla"]
    found = forecast(form, points[:30], 257, "total", [1e18])
    assert [each.preset for each in found] == ["216m", "430m", "1b2"]
    size = Size.of(load_model_preset("216m", vocab_size=257))
    assert found[0].tokens == 1e18 / size.flop_per_token
    truth = chinchilla(size.total, found[0].tokens)
    assert found[0].loss.value == pytest.approx(truth, rel=0.01)
    assert found[0].loss.low < truth < found[0].loss.high
    assert found[0].beyond == pytest.approx(1e18 / max(p.flop for p in points))


def test_a_page_of_laws_that_points_leave_open_has_dashes(points, tmp_path):
    few = [p for p in points if p.tokens in sorted({p.tokens for p in points})[:2]]
    results = [fit_family(f, [p for p in few if p.family == f], OPTIONS) for f in ("rwkv", "<b>spiking")]
    write_report(Content("Open", results, "rwkv", 257, [1e15]), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "undetermined: 2 different numbers of tokens" in text
    assert "E = -, A = -" in text
    assert ">nan" not in text


@pytest.mark.slow
def test_report_is_one_page_with_pictures_beside_it_and_in_mlflow(points, tmp_path, capsys):
    write_points(points, tmp_path / "points.csv")
    page, store = tmp_path / "out" / "report.html", f"sqlite:///{tmp_path}/mlflow.db"
    words = ["scaling", "report", str(tmp_path / "points.csv"), "--output", str(page), "--rounds", "3"]
    assert main([*words, "--log", store, "--title", "Laws & <more>"]) == 0
    text = page.read_text()
    assert "<h1>Laws &amp; &lt;more&gt;</h1>" in text
    assert "&lt;b&gt;spiking" in text
    assert "<b>spiking" not in text
    assert "<script" not in text
    assert text.count("data:image/png;base64,") == 8
    pictures = sorted(path.stem for path in page.parent.glob("*.png"))
    assert [name.removeprefix("report-") for name in pictures] == [
        *("curves", "firing", "forecast", "intervals", "isoflop", "optima", "residuals", "twin"),
    ]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("scaling").experiment_id])
    assert len(client.list_artifacts(run.info.run_id, "report")) == 9
    assert run.data.metrics["fit/rwkv/chinchilla/alpha"] == pytest.approx(CHINCHILLA["alpha"], abs=0.01)


def test_fit_command_prints_and_writes_the_law_and_its_warnings(points, tmp_path, capsys):
    write_points(points[:30], tmp_path / "points.csv")
    words = ["scaling", "fit", str(tmp_path / "points.csv"), "--form", "chinchilla", "--rounds", "5"]
    assert main([*words, "--predict", "10M:50M", "--output", str(tmp_path / "fit.json")]) == 0
    shown = capsys.readouterr()
    assert "rwkv: 30 runs" in shown.out
    assert f"{chinchilla(1e7, 5e7):.4f}".startswith("1.156")
    assert "1.15" in shown.out
    assert "approach 2: the profiles are interpolated" in shown.err
    family = json.loads((tmp_path / "fit.json").read_text())["families"]["rwkv"]
    (prediction,) = family["predictions"]
    assert (prediction["parameters"], prediction["tokens"]) == (1e7, 5e7)
    assert prediction["chinchilla"]["value"] == pytest.approx(chinchilla(1e7, 5e7), rel=0.01)
    law = family["approach_3"]["chinchilla"]
    for symbol, value in CHINCHILLA.items():
        assert law["parameters"][symbol]["value"] == pytest.approx(value, rel=0.05)
    assert max(map(abs, law["leave_largest_out"]["log_errors"])) < 0.01


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--family", "gpt"], "--family gpt: the points have rwkv"),
        (["--predict", "5"], "--predict 5: write N:D"),
        (["--confidence", "1.5"], "--confidence 1.5: must be between 0 and 1"),
        (["--count", "non-embedding"], "no column parameters_non_embedding"),
        (["--mlflow", "sqlite:///x.db"], "give files of points, or --mlflow"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(points, tmp_path, capsys, words, said):
    write_points(points[:30], tmp_path / "points.csv")
    assert main(["scaling", "fit", str(tmp_path / "points.csv"), "--rounds", "2", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
