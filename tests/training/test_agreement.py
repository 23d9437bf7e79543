"""What one rank finds wrong, all ranks know; and one of them says it."""

import json
from pathlib import Path

import pytest
import torch

from spikescale.errors import UserError
from spikescale.training.agreement import AgreedError, agreed, from_main, only_run_in, say_error
from spikescale.training.bootstrap import Process


def fail(text: str) -> None:
    raise UserError(text)


def two_ranks(rank: int, folder: str) -> None:
    """The body of each process: records what it saw in a file of its own."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    process = Process(rank, 2, rank, 2, torch.device("cpu"))
    seen = {
        "result": agreed(process, lambda: rank * 10),
        "main": from_main(process, lambda: f"made by {rank}"),
    }
    for name, action in {
        "one": lambda: fail("disk is gone") if rank == 1 else None,
        "both": lambda: fail("bad key"),
    }.items():
        try:
            agreed(process, action)
        except AgreedError as error:
            seen[name] = str(error)
    try:
        from_main(process, lambda: fail("only the main rank looks"))
    except AgreedError as error:
        seen["from_main"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_an_error_of_any_rank_is_raised_on_all_with_the_same_words(tmp_path):
    torch.multiprocessing.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [s["result"] for s in seen] == [0, 10]
    assert [s["main"] for s in seen] == ["made by 0"] * 2
    assert seen[0]["one"] == seen[1]["one"]
    assert seen[0]["one"].startswith("rank 1 on ")
    assert seen[0]["one"].endswith(": disk is gone")
    assert [s["both"] for s in seen] == ["bad key"] * 2
    assert [s["from_main"] for s in seen] == ["only the main rank looks"] * 2


def test_a_single_process_needs_no_group():
    process = Process(0, 1, 0, 1, torch.device("cpu"))
    assert agreed(process, lambda: 3) == 3
    with pytest.raises(AgreedError, match=r"^bad$"):
        agreed(process, lambda: fail("bad"))


def test_an_error_is_one_line_and_names_the_rank_when_it_is_alone(capsys):
    say_error(Process(1, 2, 1, 2, torch.device("cpu")), UserError("no\nroom"))
    assert capsys.readouterr().err == "error: rank 1: no room\n"
    say_error(Process(0, 1, 0, 1, torch.device("cpu")), UserError("no room"))
    assert capsys.readouterr().err == "error: no room\n"


def test_a_folder_is_free_again_when_the_run_has_left_it(tmp_path):
    process = Process(0, 1, 0, 1, torch.device("cpu"))
    with (
        only_run_in(tmp_path / "run", process),
        pytest.raises(UserError, match="another process is training there"),
        only_run_in(tmp_path / "run", process),
    ):
        pass
    with only_run_in(tmp_path / "run", process):
        pass
