"""WikiText as it would be written."""

import pytest

from spikescale.evaluation.detokenize import detokenize_wikitext


@pytest.mark.parametrize(
    ("published", "written"),
    [
        ("in 1 @,@ 500 and 2 @.@ 5 well @-@ known", "in 1,500 and 2.5 well-known"),
        (" = = = History = = = \n", " === History ===\n"),
        ("It ended . He left , then ; so : yes ! no ?", "It ended. He left, then; so: yes! no?"),
        ("the ( so @-@ called ) end [ 1 ]", "the (so-called) end [1]"),
        ('he said " no way " twice " here "', 'he said "no way" twice "here"'),
        ("the team 's and the players ' wages", "the team's and the players' wages"),
        ("it does n't ; they 're , I 've", "it doesn't; they're, I've"),
        ("at 5 ° C", "at 5°C"),
        ("the <unk> of U @.@ S. and x = y", "the <unk> of U.S. and x = y"),
    ],
)
def test_published_text_is_written_as_usual(published, written):
    assert detokenize_wikitext(published) == written


def test_ordinary_text_is_left_as_it_is():
    text = 'A "quoted" word (here), it\'s 1,000.5 - well-known.\n\n= Heading =\nNext.'
    assert detokenize_wikitext(text) == text
