"""Batches: every text once, few shapes, little padding, the same from the same input."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jarm.embedding import batches as batching
from jarm.embedding.batches import (
    Shapes,
    choose_lengths,
    make_chunks,
    padded_to,
    plain_work,
    round_up,
    shared_work,
    split_prefixes,
)


def texts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [(row, rng.integers(1, 50, length).astype(np.int32)) for row, length in enumerate(lengths)]


def test_grid():
    assert [round_up(n) for n in (1, 8, 9, 64, 65, 128, 129, 257, 1025)] == [8, 8, 16, 64, 72, 128, 144, 288, 1152]
    assert all(n <= round_up(n) <= max(n + 7, 1.13 * n) for n in range(1, 5000))


@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=30), st.integers(1, 5), st.sampled_from([0.0, 10.0, 50.0, 1e4])
)
def test_chosen_lengths_pad_least_for_their_price(lengths, most, price):
    grid = sorted({round_up(length) for length in lengths})

    def cost(chosen):
        return sum(min(c for c in chosen if c >= length) for length in lengths) + price * len(chosen)

    subsets = (s for k in range(1, most + 1) for s in itertools.combinations(grid, k) if grid[-1] in s)
    chosen = choose_lengths(lengths, most, price)
    assert len(chosen) <= most
    assert cost(chosen) == min(map(cost, subsets))


def test_lengths_beyond_the_sample_stay_on_the_grid():
    assert [padded_to(n, (16, 64), 140) for n in (1, 16, 17, 65, 130)] == [16, 16, 64, 72, 140]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 300), st.sampled_from([1, 2, 8]))
def test_plain_work_has_every_text_once(lengths, budget, devices):
    texts = texts_of(lengths)
    shapes = Shapes(choose_lengths(lengths, 4), (), budget, devices, 512)
    parts = [texts[:20], texts[20:25], texts[25:]]
    works = list(plain_work(iter(parts), shapes))
    batches = [batch for work in works for batch in work.batches]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(texts)))
    for batch in batches:
        assert len(batch.tokens) % devices == 0
        assert batch.tokens.size <= max(budget * devices, devices * batch.tokens.shape[1])
        assert (batch.lengths >= 1).all()
        for at, row in enumerate(batch.rows):
            np.testing.assert_array_equal(batch.tokens[at, : batch.lengths[at]], texts[row][1])
    assert sum(work.tokens[0] for work in works) == sum(lengths)


def test_padding_of_many_ragged_texts_is_small():
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(5.2, 0.8, 6000)), 5, 512).astype(int)
    shapes = Shapes(choose_lengths(lengths[::6].tolist(), batching.SHAPES), (), 8192, 1, 512)
    texts = texts_of(lengths)
    parts = (texts[at : at + 1000] for at in range(0, 6000, 1000))
    works = list(plain_work(parts, shapes))
    real, padded = np.sum([work.tokens for work in works], axis=0)
    assert 1 - real / padded < 0.1
    assert len({batch.tokens.shape for work in works for batch in work.batches}) <= batching.SHAPES + 1


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=40),
    st.integers(8, 64),
    st.sampled_from([1, 16, 64]),
)
def test_shared_work_puts_texts_together_again(spec, budget, room):
    """Texts of a group begin with as many of its tokens as they like, and end with tokens of their own."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 9, 6) for _ in range(5)]
    chunk = [
        (group, (row, np.concatenate([prompts[group][:of], rng.integers(10, 99, own)]).astype(np.int32)))
        for row, (group, of, own) in enumerate(spec)
    ]
    prefixes, rest, _ = split_prefixes(chunk)
    assert all(len(ids) for _, ids in rest)
    works = shared_work(chunk, Shapes((8, 16), (8,), budget, 1, 512, room))
    seen, joined = [], []
    for work in works:
        heads = {}
        for head in work.prefixes:
            for at, slot in enumerate(head.rows):
                heads[int(slot)] = head.tokens[at, : head.lengths[at]]
        # Prefixes are numbered in the order in which the parts are put side by side.
        assert list(heads) == list(range(len(heads)))
        joined += heads.values()
        held = (1 << (len(work.prefixes) - 1).bit_length()) * work.prefixes[0].tokens.size
        assert held <= room or len(heads) == 1
        for batch in work.batches:
            for at, row in enumerate(batch.rows):
                whole = np.concatenate([heads[int(batch.group[at])], batch.tokens[at, : batch.lengths[at]]])
                np.testing.assert_array_equal(whole, chunk[row][1][1])
                seen.append(row)
    assert sorted(seen) == list(range(len(chunk)))
    assert all((one == other[1]).all() for one, other in zip(joined, prefixes, strict=True))
    full = {}
    for group, (_, ids) in chunk:
        full.setdefault(group, []).append(ids)
    for group, (_, ids) in zip(full, prefixes, strict=True):
        if len(full[group]) > 1 and all(len(other) > len(ids) + 1 for other in full[group]):
            assert len({int(other[len(ids)]) for other in full[group]}) > 1  # as long as can be


@pytest.mark.parametrize(("responses", "room", "budget", "devices"), [(2, 32_000, 16384, 1), (16, 32_000, 16384, 8)])
def test_sharing_costs_little_with_few_responses_and_a_large_model(responses, room, budget, devices):
    """Of prompts and responses of 200 and 300 tokens, and a cache of 4 GiB, which is 32,000 tokens of an 8B model."""
    rng = np.random.default_rng(0)
    chunk = []
    count = 4096 // responses
    for group, length in enumerate(sorted(np.exp(rng.normal(5.2, 0.4, count)).astype(int), reverse=True)):
        prompt = rng.integers(0, 9, length)
        for _ in range(responses):
            own = rng.integers(10, 99, int(np.exp(rng.normal(5.6, 0.4))))
            chunk.append((group, (len(chunk), np.concatenate([prompt, own]).astype(np.int32))))
    prefixes, rest, _ = split_prefixes(chunk)
    lengths = [
        choose_lengths([len(ids) for _, ids in part], most)
        for part, most in ((rest, batching.SHARED_SHAPES), (prefixes, batching.PREFIX_SHAPES))
    ]
    works = shared_work(chunk, Shapes(*lengths, min(budget, room // (8 * devices)), devices, 8192, room))
    padded = sum(work.tokens[1] for work in works)
    assert padded < {2: 1.02, 16: 0.75}[responses] * sum(len(ids) for _, (_, ids) in chunk)
    assert len({(batch.tokens.shape, work.prefixes[0].tokens.shape) for work in works for batch in work.batches}) < 60


@given(st.lists(st.integers(0, 7), min_size=1, max_size=60), st.integers(0, 3))
def test_chunks_keep_groups_together(groups, seed):
    groups = np.array(groups)
    sizes = np.random.default_rng(seed).integers(1, 40, 8)[groups]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "CHUNK", 12)
        chunks = make_chunks(sizes, groups)
    assert sorted(np.concatenate(chunks)) == list(range(len(groups)))
    assert all(len(chunk) <= 12 for chunk in chunks)
    parts = sum(len(set(groups[chunk].tolist())) for chunk in chunks)
    assert parts <= len(set(groups.tolist())) + len(groups) // 12


def test_chunks_of_large_groups_are_parted(monkeypatch):
    monkeypatch.setattr(batching, "CHUNK", 4)
    chunks = make_chunks(np.array([1] * 10 + [3] * 2), np.array([0] * 10 + [1] * 2))
    assert [len(chunk) for chunk in chunks] == [2, 4, 4, 2]
    assert sorted(np.concatenate(chunks)) == list(range(12))


@pytest.mark.parametrize("groups", [None, np.zeros(0, int)])
def test_nothing_to_do(groups):
    assert make_chunks(np.zeros(0, int), groups) == []
