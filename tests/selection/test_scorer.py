"""Scores of sets of heads are those of models converted with them; slopes; layers that are not computed again."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from conftest import tiny_model

import lolcats
from lolcats.config import AttentionConfig
from lolcats.ranks import Ranks
from lolcats.selection.prompts import Scored
from lolcats.selection.scorer import Scorer
from lolcats.selection.search import added_at, grow, shrink, units_of

WINDOW = {"kind": "window", "window_size": 8, "sinks": 2}


def base_of(family: str = "llama") -> Any:
    torch.manual_seed(0)
    return tiny_model(family, num_attention_heads=8, num_key_value_heads=4, hidden_size=64).eval()


def prompts() -> list[Scored]:
    """Three of one length and one of another, with answers of different lengths."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(6, 300, (length,), generator=draw).tolist() for length in (50, 50, 50, 70)]
    spans = [[(40, 44), (46, 50)], [(45, 50)], [(48, 50)], [(60, 63), (66, 70)]]
    return [Scored(kind, ids, answers) for kind, ids, answers in zip("abbc", rows, spans, strict=True)]


def scorer_of(base: Any, **changes: Any) -> Scorer:
    model = lolcats.convert(copy.deepcopy(base), AttentionConfig(**WINDOW | changes))
    return Scorer(model, prompts(), batch_tokens=120)


def expected(base: Any, heads: list[tuple[int, int]]) -> float:
    """The loss by plain passes, prompt by prompt, of a model that was converted with these heads."""
    chosen: dict[str, list[int]] = {}
    for layer, head in heads:
        chosen.setdefault(str(layer), []).append(head)
    student = lolcats.convert(copy.deepcopy(base), AttentionConfig(**WINDOW, softmax_heads=chosen)).eval()
    by_kind: dict[str, list[float]] = {}
    for prompt in prompts():
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            p, q = (model(ids).logits[0].log_softmax(-1) for model in (base, student))
        kl = (p.exp() * (p - q)).sum(-1)
        for start, stop in prompt.answers:
            by_kind.setdefault(prompt.kind, []).extend(kl[start - 1 : stop - 1].tolist())
    return sum(sum(values) / len(values) for values in by_kind.values()) / len(by_kind)


SETS = [[], [(0, 1)], [(1, 0), (1, 2)], [(0, 0), (0, 1), (0, 2), (0, 3), (1, 3)]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_scores_are_those_of_models_with_these_heads(family: str) -> None:
    base = base_of(family)
    scorer = scorer_of(base)
    shift = 1 if family == "gemma3" else 0  # its first layer has a sliding window and stays as it is
    assert scorer.heads == [(layer + shift, head) for layer in (0, 1) for head in range(4)]
    for heads in [[(layer + shift, head) for layer, head in heads] for heads in SETS]:
        assert scorer.loss(heads) == pytest.approx(expected(base, heads), rel=2e-4, abs=1e-6)


def test_all_heads_are_the_teacher() -> None:
    scorer = scorer_of(base_of())
    assert scorer.loss(scorer.heads) == pytest.approx(0, abs=1e-6)
    assert scorer.exact(scorer.heads) == scorer.exact(None)


def test_layers_below_the_first_change_are_not_computed_again() -> None:
    base = base_of()
    scorer, fresh = scorer_of(base), scorer_of(base)
    at = scorer.move_to([(0, 2)])
    assert at == pytest.approx(fresh.loss([(0, 2)]), rel=1e-5)
    before = scorer.passes
    assert scorer.loss([(0, 2), (1, 1)]) == pytest.approx(fresh.loss([(0, 2), (1, 1)]), rel=1e-5)
    assert scorer.passes - before == pytest.approx(0.5)
    before = scorer.passes
    assert scorer.loss([(0, 3)]) == pytest.approx(fresh.loss([(0, 3)]), rel=1e-5)
    assert scorer.passes - before == pytest.approx(1)


def test_moving_on_computes_only_what_changes() -> None:
    base = base_of()
    scorer, fresh = scorer_of(base), scorer_of(base)
    scorer.move_to([(0, 2)])
    before = scorer.passes
    assert scorer.move_to([(0, 2), (1, 1)]) == pytest.approx(fresh.loss([(0, 2), (1, 1)]), rel=1e-5)
    assert scorer.passes - before == pytest.approx(0.5)
    assert scorer.loss([(0, 2), (1, 3)]) == pytest.approx(fresh.loss([(0, 2), (1, 3)]), rel=1e-5)
    assert scorer.move_to([(0, 1)]) == pytest.approx(fresh.loss([(0, 1)]), rel=1e-5)
    assert all(len(batch.passed) == len(scorer.blocks) for batch in scorer.batches)


def test_ranks_get_sets_of_which_as_many_layers_are_computed() -> None:
    scorer, shared = scorer_of(base_of()), list[Any]()
    scorer.move_to([(0, 2)])
    sets = [[(0, 2), (1, 0)], [(0, 1)], [(0, 2), (1, 1)], [(0, 3)]]
    expected = [scorer.loss(heads) for heads in sets]

    class Noting(Ranks):
        def spread(self, function: Any, items: Any) -> Any:
            shared.extend(items)
            return [function(item) for item in items]

    scorer.ranks = Noting()
    assert scorer.losses(sets) == expected
    assert shared == [sets[1], sets[3], sets[0], sets[2]]  # every second one is a rank's


def test_slopes_are_computed_once_for_a_set() -> None:
    scorer, asked = scorer_of(base_of()), list[frozenset[Any]]()
    slopes = scorer.slopes

    def counted(shares: Any) -> Any:
        asked.append(frozenset(shares))
        return slopes(shares)

    scorer.slopes = counted  # type: ignore[method-assign,assignment]
    grow(scorer, [], units_of(scorer, by_layer=False), 5, 3, lambda _: None)
    assert any(len(heads) > 3 for heads in asked)  # where units are both dropped and added by their slopes
    assert len(asked) == len(set(asked))


def test_slopes_are_derivatives_by_the_shares() -> None:
    scorer = scorer_of(base_of())
    shares = {head: 0.2 + 0.1 * i for i, head in enumerate(scorer.heads)}
    loss, slopes = scorer.slopes(shares)
    assert loss > 0
    for head in [(0, 1), (1, 3)]:
        ends = [scorer.slopes({**shares, head: shares[head] + step})[0] for step in (1e-2, -1e-2)]
        assert slopes[head] == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2, abs=1e-7)
    assert scorer.slopes(dict.fromkeys(scorer.heads, 1.0))[0] == pytest.approx(0, abs=1e-6)
    assert scorer.slopes(dict.fromkeys([(0, 1)], 1.0))[0] == pytest.approx(scorer.loss([(0, 1)]), rel=1e-4)


def test_many_units_are_added_several_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lolcats.selection.search.ONE_BY_ONE", 2)
    monkeypatch.setattr("lolcats.selection.search.ROUNDS", 3)
    scorer = scorer_of(base_of())
    kept = [(head,) for head in scorer.heads[:2]]
    found = grow(scorer, kept, [(head,) for head in scorer.heads[2:]], 8, 3, lambda _: None)
    assert [len(each.units) for each in found] == [4, 6, 8]
    for each in found:
        assert each.loss == pytest.approx(scorer.loss(each.heads), rel=1e-5, abs=1e-6)


def test_the_first_units_are_added_singly_and_many_more_in_about_eight_rounds() -> None:
    def rounds(count: int) -> list[int]:
        kept = [0]
        while kept[-1] < count:
            kept.append(kept[-1] + added_at(kept[-1], count))
        return [b - a for a, b in itertools.pairwise(kept)]

    assert rounds(7) == [1] * 7
    assert rounds(15) == [1] * 15
    assert rounds(32) == [1] * 8 + [3] * 8
    assert rounds(80) == [1] * 8 + [9] * 8


def test_search_finds_what_trying_all_sets_of_one_finds() -> None:
    scorer = scorer_of(base_of())
    units = units_of(scorer, by_layer=False)
    assert len(units) == 8
    first = grow(scorer, [], units, 1, len(units), lambda _: None)[0]
    losses = {unit: scorer.loss(unit) for unit in units}
    assert first.units == (min(units, key=losses.__getitem__),)
    assert first.loss == pytest.approx(min(losses.values()), rel=1e-5)
    last = shrink(scorer, units, 7, len(units), lambda _: None)[-1]
    without = {unit: scorer.loss([head for other in units if other != unit for head in other]) for unit in units}
    assert set(units) - set(last.units) == {min(units, key=without.__getitem__)}


class Table:
    """A scorer whose losses are made up: a set that is not listed has a high one."""

    def __init__(self, losses: dict[frozenset[Any], float]) -> None:
        self.known = losses
        self.heads = sorted({head for heads in losses for head in heads})

    def move_to(self, heads: Any) -> None:
        pass

    def loss(self, heads: Any) -> float:
        return self.known.get(frozenset(heads), 10 - len(heads))

    def losses(self, sets: Any) -> list[float]:
        return [self.loss(heads) for heads in sets]


def test_what_was_the_best_beginning_is_dropped_when_it_is_worth_little() -> None:
    """0 is the best single head and 0, 1 the best pair with it, but 1 and 2 are better without 0."""
    a, b, c, d = [(0, head) for head in range(4)]
    table: Any = Table({
        frozenset({a}): 5.0, frozenset({b}): 6.0, frozenset({c}): 7.0, frozenset({d}): 8.0,
        frozenset({a, b}): 4.0, frozenset({a, c}): 4.5, frozenset({a, d}): 4.6, frozenset({b, c}): 1.0,
        frozenset({a, b, c}): 0.9, frozenset({a, b, d}): 3.5, frozenset({b, c, d}): 0.5,
    })  # fmt: skip
    units = units_of(table, by_layer=False)
    said: list[str] = []
    found = grow(table, [], units, 3, len(units), said.append)
    assert [(set(each.heads), each.loss) for each in found] == [({a}, 5.0), ({b, c}, 1.0), ({b, c, d}, 0.5)]
    assert [line.split(", loss")[0] for line in said] == [
        "1 head: layer 0 head 0 added", "2 heads: layer 0 head 1 added", "3 heads: layer 0 head 2 added",
        "2 heads: layer 0 head 0 dropped again", "3 heads: layer 0 head 3 added",
    ]  # fmt: skip


def test_losses_that_are_only_rounding_end_the_search() -> None:
    """The same loss everywhere, a little below zero, as KL divergences may be; no set is better than another."""
    heads = [(0, head) for head in range(4)]
    sets = [frozenset(some) for n in range(5) for some in itertools.combinations(heads, n)]
    table: Any = Table(dict.fromkeys(sets, -1e-9))
    found = grow(table, [], units_of(table, by_layer=False), 4, 4, lambda _: None)
    assert [len(each.units) for each in found] == [1, 2, 3, 4]


def test_no_set_of_the_curve_is_better_without_one_than_a_smaller_one() -> None:
    scorer = scorer_of(base_of())
    found = grow(scorer, [], units_of(scorer, by_layer=False), 5, 8, lambda _: None)
    for fewer, more in itertools.pairwise(found):
        assert len(more.units) == len(fewer.units) + 1
        for gone in more.units:
            left = [head for unit in more.units if unit != gone for head in unit]
            assert scorer.loss(left) > 0.99 * fewer.loss - 1e-6


def test_what_layers_put_out_is_kept_where_there_is_room() -> None:
    """Only one layer's hidden states come back for a score; a device without values shows where they lie."""
    scorer = scorer_of(base_of())
    scorer.record_on = torch.device("meta")
    scorer.move_to([(0, 2)])
    kept = [output if isinstance(output, torch.Tensor) else output[0] for b in scorer.batches for output in b.passed]
    assert len(kept) == len(scorer.blocks) * len(scorer.batches)
    assert all(tensor.is_meta for tensor in kept)
