"""Verdicts: the rule on figures whose answers are known, and the entries of claims.toml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.evidence import gpu
from bench.evidence.claims import Claim, Condition, Relation, answer, failed, judge, load, missing, pattern
from bench.evidence.experiments import EXPERIMENTS
from bench.evidence.figures import Figure, exact


def figure(name: str, low: float, high: float, *, p: float = 1e-6, better: int = -1, unit: str = "nats") -> Figure:
    return Figure(name, (low + high) / 2, low, high, p, 20, unit, better)


def claim(*conditions: Condition, must: bool = False) -> Claim:
    return Claim("one", "It is so.", "a paper", "a subject", conditions, must=must)


def outcome(figures: Sequence[Figure], *conditions: Condition) -> str:
    return judge([claim(*conditions)], figures)[0].text


# A loss: its interval, and what better, worse and equivalent by a margin of 0.01 are answered.
@pytest.mark.parametrize(
    ("low", "high", "better", "worse", "not_worse", "equivalent"),
    [
        (-0.05, -0.02, "yes", "no", "yes", "no"),
        (-0.05, -0.005, "open", "no", "yes", "open"),
        (-0.005, 0.005, "no", "no", "yes", "yes"),
        (-0.005, 0.05, "no", "open", "open", "open"),
        (0.02, 0.05, "no", "yes", "no", "no"),
        (-0.05, 0.05, "open", "open", "open", "open"),
        (0.0, 0.0, "no", "no", "yes", "yes"),
    ],
)
def test_answers_by_interval_and_margin(
    low: float, high: float, better: str, worse: str, not_worse: str, equivalent: str
):
    wanted: dict[Relation, str] = {
        "better": better,
        "worse": worse,
        "not worse": not_worse,
        "not better": {"yes": "no", "no": "yes", "open": "open"}[better],
        "equivalent": equivalent,
    }
    for relation, expected in wanted.items():
        loss = figure("x", low, high)
        assert answer(Condition("x", relation, 0.01, "w"), loss, 0.001) == expected, relation
        # The same as accuracy, and as a ratio.
        gain = figure("x", -high, -low, better=1)
        assert answer(Condition("x", relation, 0.01, "w"), gain, 0.001) == expected, relation
        steps = figure("x", 1 + low, 1 + high, unit="ratio")
        assert answer(Condition("x", relation, 0.01, "w"), steps, 0.001) == expected, relation


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [(0.02, 0.03, "yes", "no"), (0.0, 0.005, "no", "yes"), (0.005, 0.02, "open", "open"), (0.01, 0.01, "no", "no")],
)
def test_quantities_are_compared_with_the_margin_itself(low: float, high: float, above: str, below: str):
    # However improbable: a quantity has no "no difference".
    assert answer(Condition("x", "above", 0.01, "w"), figure("x", low, high, better=0), 1.0) == above
    assert answer(Condition("x", "below", 0.01, "w"), figure("x", low, high, better=0), 1.0) == below


def test_a_difference_is_told_only_where_it_is_significant():
    loss = figure("x", -0.05, -0.02)
    assert answer(Condition("x", "better", 0.01, "w"), loss, 0.051) == "open"
    assert answer(Condition("x", "equivalent", 0.01, "w"), loss, 0.051) == "open"
    assert answer(Condition("x", "not worse", 0.01, "w"), figure("x", 0.02, 0.05), 0.051) == "open"
    # "No difference that counts" is no discovery.
    assert answer(Condition("x", "worse", 0.01, "w"), loss, 0.051) == "no"
    with pytest.raises(ValueError, match="neither side"):
        answer(Condition("x", "better", 0.01, "w"), figure("x", 1, 2, better=0), 0.01)


GOOD, BAD, UNKNOWN = figure("good", -0.05, -0.02), figure("bad", 0.02, 0.05), figure("unknown", -0.05, 0.05)
IS_GOOD = Condition("good", "better", 0.0, "constant")
IS_BAD = Condition("bad", "better", 0.0, "cosine")
IS_UNKNOWN = Condition("unknown", "better", 0.0, "linear")
IS_MISSING = Condition("missing", "better", 0.0, "warm-up")


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([IS_GOOD], "holds"),
        ([IS_BAD], "does not hold"),
        ([IS_GOOD, IS_BAD], "holds when constant"),
        ([IS_GOOD, IS_UNKNOWN], "undecided"),
        ([IS_BAD, IS_UNKNOWN], "undecided"),
        ([IS_GOOD, IS_MISSING], "undecided"),
        ([IS_MISSING], "untested here, because its experiment was not run"),
    ],
)
def test_the_verdict(conditions: list[Condition], expected: str):
    assert outcome([GOOD, BAD, UNKNOWN], *conditions) == expected


def test_a_claim_that_nothing_tests_says_why():
    entry = Claim("one", "It is so.", "a paper", "a subject", untested="there is no cluster here")
    assert judge([entry], [GOOD])[0].text == "untested here, because there is no cluster here"


def test_a_glob_is_a_condition_for_each_figure():
    figures = [figure("cnn.cosine.final", -0.05, -0.02), figure("gpt.cosine.final", 0.02, 0.05)]
    condition = Condition("*.cosine.final", "better", 0.0, "cosine")
    verdict = judge([claim(condition)], figures)[0]
    assert verdict.text == "holds when cosine (cnn)"
    assert [finding.when for finding in verdict.findings] == ["cosine (cnn)", "cosine (gpt)"]
    # A point is a point, and the whole name counts.
    assert not pattern("a.*.b").fullmatch("a.x-b")
    assert not pattern("a.*").fullmatch("za.x")


def test_holm_is_over_all_claims():
    # p = 0.01 is enough for one comparison, not for ten; and a figure that two claims name counts once.
    weak = [figure(f"weak-{i}", -0.05, -0.02, p=0.01) for i in range(10)]
    entries = [claim(Condition(one.name, "better", 0.0, "w")) for one in weak]
    assert [verdict.outcome for verdict in judge(entries[:1], weak)] == ["holds"]
    assert {verdict.outcome for verdict in judge(entries, weak)} == {"undecided"}
    assert {verdict.outcome for verdict in judge(entries[:5] * 2, weak)} == {"holds"}
    # Exact figures are no part of it.
    certain = [exact(f"certain-{i}", -0.05, unit="nats", better=-1) for i in range(10)]
    more = [claim(Condition(one.name, "better", 0.0, "w")) for one in certain]
    assert {verdict.outcome for verdict in judge([*entries[:5], *more], [*weak, *certain])} == {"holds"}


def test_what_must_hold():
    wrong = judge([claim(IS_BAD, must=True), claim(IS_GOOD, must=True), claim(IS_BAD)], [GOOD, BAD])
    assert failed(wrong, all_run=True) == wrong[:1]
    assert missing(wrong) == []
    absent = judge([claim(IS_MISSING, must=True)], [GOOD])
    assert failed(absent, all_run=False) == []
    assert failed(absent, all_run=True) == absent
    assert missing(absent) == ["missing"]


def test_two_figures_of_one_name_raise():
    with pytest.raises(ValueError, match="two figures"):
        judge([], [GOOD, GOOD])


ENTRY = """[[claims]]
id = "one"
claim = "It is so."
source = "a paper"
subject = "a subject"
"""
SOUND = '{ figure = "x", relation = "better", margin = 0.1, when = "w" }'


@pytest.mark.parametrize(
    ("further", "said"),
    [
        ("", "has conditions, or says why"),
        (f'untested = "no cluster"\nconditions = [{SOUND}]', "has conditions, or says why"),
        (f"conditions = [{SOUND.replace('better', 'nicer')}]", "needs one of"),
        (f"conditions = [{SOUND.replace('0.1', '-0.1')}]", "negative"),
        (f'conditions = [{SOUND}]\nverdict = "holds"', "an entry has"),
        (f"conditions = [{SOUND}]\n{ENTRY}conditions = [{SOUND}]", "more than once"),
    ],
)
def test_an_entry_that_is_no_claim_raises(further: str, said: str, tmp_path: Path):
    path = tmp_path / "claims.toml"
    path.write_text(ENTRY + further)
    with pytest.raises(ValueError, match=said):
        load(path)


def meet(a: str, b: str) -> bool:
    """Whether some name is of both globs."""
    if not a or not b:
        return set(a + b) <= {"*"}
    if a[0] == "*":
        return meet(a[1:], b) or (b[0] != "*" and meet(a, b[1:])) or (b[0] == "*" and meet(a, b[1:]))
    if b[0] == "*":
        return meet(b, a)
    return a[0] == b[0] and meet(a[1:], b[1:])


def test_globs_that_meet():
    assert meet("a.*.c", "*.b.c")
    assert meet("*.final", "x.*-base.*")
    assert not meet("a.*.c", "b.*")
    assert not meet("*.final", "x.*.accuracy")


def test_every_condition_names_a_figure_that_an_experiment_declares():
    declared = [*gpu.NAMES, *(name for experiment in EXPERIMENTS for name in experiment.names())]
    lost = {
        condition.figure
        for entry in load()
        for condition in entry.conditions
        if not any(meet(condition.figure, name) for name in declared)
    }
    assert lost == set()


def test_what_must_hold_is_exact_work():
    """Margins that fail a run are not of networks, whose results are nobody's to know beforehand."""
    for entry in load():
        if entry.must:
            assert all(
                condition.figure.startswith(("noisy-quadratic.", "quadratics.", "convex."))
                for condition in entry.conditions
            ), entry.id
