"""Points are read from what people bring, and bad ones are refused in one line."""

import json

import pytest

from spikescale.errors import UserError
from spikescale.scaling.points import Point, final_points, read_points, write_points


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_published_format_of_model_size_flop_and_loss_is_accepted(tmp_path):
    path = write(tmp_path, "published.csv", "Model Size,Training FLOP,loss\n4.4e7,1.2e18,3.1\n")
    (point,) = read_points([path])
    assert (point.parameters, point.flop, point.loss) == (4.4e7, 1.2e18, 3.1)
    assert point.tokens == pytest.approx(1.2e18 / (6 * 4.4e7))


def test_json_lines_and_csv_hold_the_same(tmp_path):
    line = json.dumps({"N": 1000, "D": 20000, "valid_loss": 2.5, "variant": "rwkv"})
    table = write(tmp_path, "a.csv", "n,training tokens,validation_loss,family\n1000,20000,2.5,rwkv\n")
    assert read_points([write(tmp_path, "a.jsonl", line)]) == read_points([table])


def test_written_points_come_back(tmp_path):
    points = [
        Point(1000.0, 5000.0, 3.25, 3e7, 800.0, "a", "spikegpt", 3e7, False, 0.004, 0.2, 1e6),
        Point(1000.0, 9000.0, 3.0, 5.4e7, 800.0, "a", "spikegpt", lr=0.004, firing_rate=0.0),
    ]
    write_points(points, tmp_path / "points.csv")
    assert read_points([tmp_path / "points.csv"]) == points


def test_the_end_of_each_run_counts_and_unfinished_ones_do_not():
    points = [
        Point(1e3, 1e4, 3.0, 6e7, run="a"),
        Point(1e3, 2e4, 2.5, 1.2e8, run="a"),
        Point(1e3, 4e4, 2.2, 2.4e8, run="trunk", final=False),
        Point(2e3, 1e4, 2.9, 1.2e8),
    ]
    assert [point.loss for point in final_points(points)] == [2.9, 2.5]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "tokens,loss\n5,2\n", "p.csv:2: no column parameters"),
        ("p.csv", "N,loss\n5,2\n", "p.csv:2: needs a column tokens or flop"),
        ("p.csv", "N,D,loss\n5,6,2\n5,seven,2\n", "p.csv:3: tokens = 'seven': not a number"),
        ("p.csv", "N,D,loss\n5,6,-2\n", "loss = '-2': must be a number above 0"),
        ("p.csv", "N,D,loss\n5,6,nan\n", "must be a number above 0"),
        ("p.csv", "N,params,D,loss\n5,5,6,2\n", "second column for parameters"),
        ("p.csv", "N,D,loss\n", "holds no points"),
        ("p.jsonl", '{"N": 1}\n', "p.jsonl:1: no column loss"),
        ("p.jsonl", '{"N": 1}\n{"N":\n', "p.jsonl:2: not valid JSON"),
        ("p.txt", "N", "must end in .csv"),
    ],
)
def test_bad_points_are_refused_by_file_and_line(tmp_path, name, text, words):
    with pytest.raises(UserError, match=r"^[^\n]+$") as refused:
        read_points([write(tmp_path, name, text)])
    assert words in str(refused.value)
