"""Settings: merged in the right order, and refused in one clear line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spikescale.config import load_config, load_model_preset
from spikescale.config.load import preset_names
from spikescale.errors import UserError
from spikescale.training.arguments import setting_list

RUN_FILES = sorted(Path(__file__).parents[2].glob("configs/run/*.yaml"))


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {path: somewhere}\nmodel: {preset: tiny, width: 64}\ntrain: {steps: 200}\n")
    return path


def test_file_overrides_preset_and_words_override_file(run_file):
    config = load_config(run_file, ["train.steps=300", "train.lr=2e-3", "zero.preset=stage2"])
    assert (config.model.layers, config.model.width) == (4, 64)
    assert (config.train.steps, config.train.lr, config.zero.stage) == (300, 2e-3, 2)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["train.learning_rate=1"], "unknown key train.learning_rate; allowed here: steps, batch_size"),
        (["modle.width=1"], "unknown key modle; allowed here: name, output"),
        (["train.steps=many"], "train.steps = 'many': input should be a valid integer"),
        (["train.steps=0"], "train.steps = 0: input should be greater than 0"),
        (["train.lr=-1"], "train.lr = -1: input should be greater than 0"),
        (["train.lr=nan"], "train.lr"),
        (
            ["train.precision=float8"],
            "train.precision = 'float8': input should be 'auto', 'float32' or 'bfloat16'",
        ),
        (["zero.stage=4"], "zero.stage = 4: input should be less than or equal to 3"),
        (["model.variant=gpt"], "model.variant = 'gpt': input should be 'rwkv'"),
        (["model.variant=rwkv"], "binary_embedding must be false"),
        (["model.preset=huge"], "no preset 'huge'; there are 1b2, 216m, 430m, 46m, tiny"),
        (["train.min_lr=1"], "min_lr (1.0) must not exceed lr"),
        (["train.warmup_steps=500"], "warmup_steps (500) must not exceed steps (200)"),
        (["zero.stage=3", "train.compile=true"], "does not work with zero.stage 3"),
        (["data=3"], "data = 3"),
        (["data.path=null"], "data.path"),
        (["name=../x"], "name = '../x'"),
        (["steps"], "a setting is written key.sub=value"),
        (["train.steps=[1"], "not valid settings"),
        (["train.lr=${nowhere}"], "nowhere"),
    ],
)
def test_bad_settings_give_one_clear_line(run_file, words, complaint):
    with pytest.raises(UserError) as caught:
        load_config(run_file, words)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml: cannot be read"):
        load_config(tmp_path / "nothing.yaml")
    bad = tmp_path / "bad.yaml"
    for text in ("a: [", "- 1\n- 2\n", "just words"):
        bad.write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml"):
            load_config(bad)


def test_missing_data_path_is_said(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {seed: 1}\n")
    with pytest.raises(UserError, match=r"data\.path is missing"):
        load_config(path)


STREAM = {"source": ["corpus.jsonl"]}
ONE, TWO = {"path": "data/one", "weight": 7, "stream": STREAM}, {"path": "data/two", "weight": 1}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"mode": "prepared", "sources": [ONE, TWO]}, "one has a stream, but data.mode is prepared: set it"),
        (
            {"mode": "prepared", "path": "x", "stream": STREAM},
            "data.stream is given, but data.mode is prepared",
        ),
        ({"sources": [TWO]}, "data.mode = streaming needs a stream in at least one of data.sources"),
        ({"path": "x"}, "data.mode = streaming needs data.path (a folder to write to) and data.stream"),
        ({"sources": [ONE, TWO], "stream": STREAM}, "data.stream goes with data.path: in a mixture each"),
        (
            {"sources": [{**ONE, "path": "s3://b/one"}]},
            "a folder in the path of one in data.sources, not a URL",
        ),
        ({"path": "s3://b/one", "stream": STREAM}, "needs a folder in data.path, not a URL"),
        (
            {"sources": [{"path": "a", "epochs": 1, "stream": STREAM}, {"path": "b", "epochs": 2}]},
            "data.sources: a is streamed, so its tokens are not known yet: give every source a weight",
        ),
        ({"sources": [ONE, {**TWO, "epochs": 1}]}, "give every source a weight, or every source its epochs"),
        ({"sources": [ONE, {**TWO, "path": "data/two/../one/"}]}, "data.sources: names must differ"),
        (
            {"sources": [ONE, {**TWO, "name": "two", "path": "data/two/../one/"}]},
            "data.sources: one and two have the same path",
        ),
        (
            {"sources": [{**ONE, "stream": {**STREAM, "worker": 2}}]},
            "unknown key data.sources.0.stream.worker; allowed here: source, catalogs, tokenizer, eos",
        ),
        ({"sources": [{**ONE, "stream": {"source": []}}]}, "data.sources.0.stream: source is empty"),
        ({"path": "x", "stream": {**STREAM, "ray": "cluster"}}, "data.stream: ray_address goes with ray"),
    ],
)
def test_streams_that_cannot_be_are_one_clear_line(tmp_path, data, complaint):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"data": {"mode": "streaming", **data}}))
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_streamed_and_prepared_sources_may_be_mixed(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"data": {"mode": "streaming", "sources": [ONE, TWO]}}))
    parts = load_config(path).data.parts
    assert [(part.label, part.stream is not None) for part in parts] == [("one", True), ("two", False)]
    path.write_text(json.dumps({"data": {"mode": "streaming", "path": "data/one", "stream": STREAM}}))
    (part,) = load_config(path).data.parts
    assert (part.label, part.path, part.weight, part.stream.source) == (
        "one",
        "data/one",
        1,
        ("corpus.jsonl",),
    )


def test_help_lists_the_keys_of_groups_that_may_be_left_out():
    lines = setting_list().splitlines()
    assert len(set(lines)) == len(lines)
    for line in (
        "  data.stream.workers = 1",
        "  data.sources[].path (required)",
        "  data.sources[].stream = None, with the keys of data.stream",
        "  data.curriculum[].until_step (required)",
        "  train.lr = 0.001",
    ):
        assert line in lines


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_every_recipe_in_the_repository_is_valid(path):
    assert load_config(path).train.steps > 0


def test_every_model_preset_is_valid():
    shapes = {name: load_model_preset(name) for name in preset_names("model")}
    assert {name: (c.layers, c.width, c.binary_embedding) for name, c in shapes.items()} == {
        "tiny": (4, 128, True),
        "46m": (12, 512, True),
        "216m": (18, 768, False),
        "430m": (24, 1024, False),
        "1b2": (24, 1792, False),
    }


def test_heavy_packages_are_not_imported_by_the_model_or_the_command():
    heavy = ["ray", "deepspeed", "megatron", "mlflow", "transformers", "datasets", "matplotlib"]
    heavy.append("torch._dynamo")  # torch's compiler, behind torch.compiler's decorators
    code = (
        "import sys, spikescale.model, spikescale.cli.main, spikescale.training.pretrain\n"
        "spikescale.cli.main.build_parser()\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
