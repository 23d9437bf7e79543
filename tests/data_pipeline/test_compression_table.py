"""`spikescale data compression`: tokens of held-out text by tokenizers learnt from the rest."""

from pathlib import Path

import pytest

from spikescale.cli.main import main
from spikescale.data_pipeline.compression import measure
from spikescale.data_pipeline.sources import open_source
from spikescale.data_pipeline.split import SplitSettings
from spikescale.errors import UserError


def test_the_table_counts_held_out_text_alone(jsonl: Path, texts: list[str]) -> None:
    split = SplitSettings(valid_fraction=0.2, test_fraction=0.0)
    byte, char, syllable = measure(open_source([str(jsonl)]), ["byte", "char", "syllable:30"], split, 10_000)
    assert 50 < byte.documents < 110
    assert byte.tokens == byte.bytes and char.tokens == char.characters == byte.characters
    assert 1.2 < syllable.characters / syllable.tokens < 4
    assert char.unknown == 0 and syllable.unknown == 0
    assert syllable.vocab_size == 30 + (char.vocab_size - 2) + 257
    with pytest.raises(UserError, match="no documents are held out"):
        measure(open_source([str(jsonl)]), ["byte"], SplitSettings(0.0, 0.0), 1000)


def test_the_command_prints_a_row_for_each(jsonl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "compression", "--source", str(jsonl), "--tokenizer", "char", "sentencepiece:360:bpe"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "held-out documents of files" in lines[0] and len(lines) == 4
    assert lines[2].split()[0] == "char" and lines[2].split()[3] == "1.000"
    assert float(lines[3].split()[3]) > 1.5
    assert main([*words, "--held-out", "1"]) == 2
