"""Bad input ends a run with one clear line, a non-zero exit and nothing lost."""

import fcntl
import json
import resource
import shutil
import subprocess
import sys

import pytest
from launching import ROOT, launch

from spikescale.training.pretrain import main


def refused(capsys, words) -> str:
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


@pytest.fixture
def data_copy(tmp_path, prepared_data):
    shutil.copytree(prepared_data, tmp_path / "data")
    return tmp_path / "data"


def first_train_shard(data):
    return next(path for path in sorted(data.glob("train-*.bin")) if path.stat().st_size)


def test_unknown_key(capsys, run_file):
    assert "unknown key train.learning_rate" in refused(
        capsys, ["--config", str(run_file), "train.learning_rate=1"]
    )


def test_value_of_the_wrong_type(capsys, run_file):
    assert "train.steps = 'ten'" in refused(capsys, ["--config", str(run_file), "train.steps=ten"])


def test_value_out_of_range(capsys, run_file):
    assert "train.lr = -1" in refused(capsys, ["--config", str(run_file), "train.lr=-1"])


def test_option_that_does_not_exist(capsys, run_file):
    assert "'--lr'" in refused(capsys, ["--config", str(run_file), "--lr", "1"])


def test_missing_data_folder(capsys, run_file, tmp_path):
    message = refused(capsys, ["--config", str(run_file), f"data.path={tmp_path}/nowhere"])
    assert "nowhere" in message
    assert "spikescale data prepare" in message


def test_empty_data_folder(capsys, run_file, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused(capsys, ["--config", str(run_file), f"data.path={tmp_path}/empty"])
    assert "empty" in message
    assert "spikescale data prepare" in message


def test_truncated_shard(capsys, run_file, data_copy):
    shard = first_train_shard(data_copy)
    shard.write_bytes(shard.read_bytes()[:-2])
    message = refused(capsys, ["--config", str(run_file), f"data.path={data_copy}", "data.verify=size"])
    assert shard.name in message


def test_shard_with_another_checksum(capsys, run_file, data_copy):
    shard = first_train_shard(data_copy)
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(bytes(content))
    message = refused(capsys, ["--config", str(run_file), f"data.path={data_copy}"])
    assert shard.name in message
    assert "checksum" in message


def test_tokenizer_that_is_not_the_one_of_the_manifest(capsys, run_file, data_copy, tmp_path):
    from spikescale.data_pipeline.tokenizers.character import CharacterTokenizer

    shutil.rmtree(data_copy / "tokenizer")
    CharacterTokenizer("abc").save(data_copy / "tokenizer")
    assert "tokenizer" in refused(capsys, ["--config", str(run_file), f"data.path={data_copy}"])


def test_vocabulary_smaller_than_an_id_in_the_data(capsys, run_file):
    message = refused(capsys, ["--config", str(run_file), "model.vocab_size=100"])
    assert "model.vocab_size = 100: smaller than the 256 ids" in message


def test_no_checkpoint_to_resume(capsys, run_file):
    assert "no checkpoint to resume" in refused(capsys, ["--config", str(run_file), "resume=must"])


def test_settings_may_stand_before_the_options(capsys, run_file):
    assert "train.lr = -1" in refused(capsys, ["train.lr=-1", "--config", str(run_file), "train.steps=3"])


def test_batch_that_cannot_be_divided(capsys, run_file):
    assert "train.micro_batch_size = 3" in refused(
        capsys, ["--config", str(run_file), "train.micro_batch_size=3"]
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_disk_that_fills_up_while_saving_keeps_the_older_checkpoint(run_file, tmp_path):
    launch(["--config", str(run_file), "train.save_every=6"])
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    before = {p: p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()}
    largest = max(len(content) for content in before.values())

    def small_files_only() -> None:
        # No file may grow past half of the largest one of a checkpoint: the kernel fails the write.
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    command = [
        sys.executable,
        str(ROOT / "launch" / "pretrain.py"),
        "--config",
        str(run_file),
        "train.steps=18",
        "train.save_async=true",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=small_files_only)
    assert done.returncode == 2, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "writing failed" in errors[0]
    assert "the last checkpoint is step-00000012" in errors[0]
    after = {p: p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()}
    assert after == before

    resumed = launch(["--config", str(run_file), "train.steps=18"])
    assert "resumed at step 12" in resumed.stdout
    assert json.loads((checkpoints / "step-00000018" / "state.json").read_text())["step"] == 18


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("train.learning_rate=1", "unknown key train.learning_rate"),
        ("model.vocab_size=9", "model.vocab_size = 9: smaller than the 256 ids"),
    ],
)
def test_bad_input_with_two_ranks_is_said_once_and_exits_non_zero(run_file, word, complaint):
    done = launch(["--config", str(run_file), word], "deepspeed", ranks=2, check=False)
    assert done.returncode == 2
    assert errors_of(done) == 1
    assert complaint in done.stderr


def errors_of(done) -> int:
    return (done.stdout + done.stderr).count("error: ")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_loss_that_is_no_number_ends_the_run_and_saves_nothing(run_file, tmp_path):
    words = ["train.lr=1e30", "train.min_lr=0", "train.clip=0", "train.warmup_steps=0", "zero.stage=0"]
    done = launch(["--config", str(run_file), *words], check=False)
    assert done.returncode == 2
    assert "the loss is nan; lower train.lr" in done.stderr
    assert not list((tmp_path / "runs" / "run" / "checkpoints").glob("step-*"))


def test_a_run_folder_in_use_is_refused(capsys, run_file, tmp_path):
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is training there" in refused(capsys, ["--config", str(run_file)])
