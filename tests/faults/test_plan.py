"""The words of `faults.inject`."""

import pytest

from spikescale.config import load_config
from spikescale.errors import UserError
from spikescale.faults.plan import FOR_EVER, Fault, parse_faults


def test_faults_are_read_with_their_steps_and_places():
    assert parse_faults("") == []
    assert parse_faults("nan@12; kill-save@8:rank1;silence@5:blocks.0; sigusr1@3;spike@2-4") == [
        Fault("nan", 12, 12, 0, ""),
        Fault("kill-save", 8, 8, 1, ""),
        Fault("silence", 5, FOR_EVER, 0, "blocks.0"),
        Fault("sigusr1", 3, 3, 0, ""),
        Fault("spike", 2, 4, 0, ""),
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("crash@1", "'crash@1' is no fault; write kind@step, kind one of nan, spike"),
        ("nan", "'nan' is no fault"),
        ("kill@2:node1", "'node1' must be a rank"),
        ("silence@2", "needs the name of a layer"),
    ],
)
def test_what_is_no_fault_is_refused_in_one_line(tmp_path, text, complaint):
    path = tmp_path / "run.yaml"
    path.write_text("data: {path: somewhere}\n")
    with pytest.raises(UserError, match=r"faults\.inject") as caught:
        load_config(path, [f"faults.inject={text}"])
    assert complaint in str(caught.value)
