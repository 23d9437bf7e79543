"""Mixtures: the shares hold in every stretch, nothing is lost or repeated, positions are pure functions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikescale.data_pipeline.blend import PERIOD, Blend, Ingredient, parts_of_period, turns
from spikescale.data_pipeline.manifest import Manifest
from spikescale.data_pipeline.prepare import PrepareSettings, prepare
from spikescale.data_pipeline.sources import open_source
from spikescale.data_pipeline.stream import Loader, TokenStream
from spikescale.errors import UserError

T = 32


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """Two more data sets, told apart from `prepared` and one another by their letters."""
    made = []
    for letter, documents in (("a", 60), ("b", 90)):
        folder = tmp_path_factory.mktemp(f"source-{letter}")
        path = folder / "corpus.jsonl"
        lines = [json.dumps({"text": letter * (100 + number)}) + "\n" for number in range(documents)]
        path.write_text("".join(lines), encoding="utf-8")
        source = open_source([str(path)], partition_bytes=2000)
        made.append(prepare(source, folder / "data", PrepareSettings(ray=False, quiet=True)))
    return made


def blend_of(manifests: list[Manifest], weights: list[float], seed: int = 1) -> Blend:
    names = ["second", "first", "third"][: len(manifests)]
    return Blend(
        [
            Ingredient(name, TokenStream(manifest, "train", T, seed, 4), weight)
            for name, manifest, weight in zip(names, manifests, weights, strict=True)
        ]
    )


@settings(max_examples=12, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8),
    context_length=st.sampled_from([128, 256, 512]),
)
def test_shares_hold_within_a_thousandth_in_every_million_tokens(
    weights: list[float], context_length: int
) -> None:
    counts = parts_of_period(weights)
    order = np.tile(turns(counts), 2)
    samples = round(1_000_000 / context_length)
    for source, count in enumerate(counts):
        before = np.concatenate([[0], np.cumsum(order == source)])
        # Every stretch of so many samples, wherever it begins in the period.
        shares = (before[samples : samples + PERIOD] - before[:PERIOD]) / samples
        assert np.abs(shares - count / PERIOD).max() <= 0.001


@settings(max_examples=15, deadline=None)
@given(weights=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12))
def test_every_source_has_had_its_share_at_any_moment_to_within_one_sample(weights: list[float]) -> None:
    counts = parts_of_period(weights)
    order = turns(counts)
    assert sum(counts) == PERIOD and np.bincount(order, minlength=len(counts)).tolist() == counts
    exact = PERIOD * np.asarray(weights) / sum(weights)
    assert np.abs(exact - counts).max() < 1
    turn = np.arange(1, PERIOD + 1)
    bound = 1 - 1 / max(1, 2 * len(weights) - 2) if len(weights) > 1 else 0
    for source, count in enumerate(counts):
        had = np.cumsum(order == source)
        assert np.abs(had - turn * count / PERIOD).max() <= bound + 1e-9


def test_each_source_keeps_its_own_order_and_misses_nothing(
    prepared: Manifest, others: list[Manifest]
) -> None:
    blend = blend_of([prepared, *others], [5, 2, 3])
    assert blend.shares == {"second": 0.5, "first": 0.2, "third": 0.3}
    count = 3000
    rows, sources = blend.rows(0, count), blend.sources(0, count)
    for position, ingredient in enumerate(blend.ingredients):
        mine = rows[torch.from_numpy(sources == position)]
        assert torch.equal(mine, ingredient.stream.rows(0, len(mine)))
    assert blend.taken(count) == np.bincount(sources).tolist() == [1500, 600, 900]
    # A later stretch, computed from nothing but its number, in the second period.
    again = blend_of([prepared, *others], [5, 2, 3])
    far = 2 * PERIOD + 7
    assert again.place(far)[1] == 2 * again.counts[again.place(far)[0]] + again.taken(7)[again.place(far)[0]]
    assert torch.equal(again.rows(1234, 50), rows[1234:1284])


def test_a_mixture_continues_at_any_step_with_any_number_of_ranks(
    prepared: Manifest, others: list[Manifest]
) -> None:
    manifests = [prepared, *others]
    with Loader(blend_of(manifests, [1, 1, 2]), 12) as loader:
        for _ in range(9):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict(), sort_keys=True))  # as in a checkpoint
        assert loader.state_dict(behind=2)["samples"] == 84
        tenth = next(loader)[0]
        assert loader.sources(108).tolist() == loader.stream.sources(108, 12).tolist()
    resumed = [Loader(blend_of(manifests, [1, 1, 2]), 12, rank, 3) for rank in range(3)]
    for loader in resumed:
        loader.load_state_dict(state)
    assert torch.equal(torch.cat([next(loader)[0] for loader in resumed]), tenth)
    together = np.concatenate([loader.sources(108) for loader in resumed])
    assert together.tolist() == blend_of(manifests, [1, 1, 2]).sources(108, 12).tolist()
    for loader in resumed:
        loader.close()
    with pytest.raises(UserError, match=r"the mixture was second 25.00%.* and is now second 20.00%"):
        Loader(blend_of(manifests, [1, 1, 3]), 12).load_state_dict(state)
    with pytest.raises(UserError, match="seed was 1 and is now 2"):
        Loader(blend_of(manifests, [1, 1, 2], seed=2), 12).load_state_dict(state)
    alone = Loader(TokenStream(prepared, "train", T, 1, 4), 12)
    with pytest.raises(UserError, match="it was one data set and is now a mixture"):
        Loader(blend_of(manifests, [1, 1, 2]), 12).load_state_dict(alone.state_dict())
    with pytest.raises(UserError, match="cannot continue in the data"):
        alone.load_state_dict(state)


def test_mixtures_that_cannot_be_are_refused(
    prepared: Manifest, others: list[Manifest], jsonl: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="weights must be positive"):
        blend_of([prepared, others[0]], [1, 0])
    with pytest.raises(UserError, match="first would make less than 1 sample in 10000"):
        blend_of([prepared, others[0]], [1, 1e-6])
    stream = TokenStream(prepared, "train", T)
    with pytest.raises(UserError, match="a name of its own"):
        Blend([Ingredient("one", stream, 1), Ingredient("one", stream, 1)])
    characters = prepare(
        open_source([str(jsonl)]), tmp_path / "char", PrepareSettings("char", ray=False, quiet=True)
    )
    with pytest.raises(UserError, match="first was prepared with tokenizer char"):
        blend_of([prepared, characters], [1, 1])
