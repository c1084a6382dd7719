"""A training is the same for a seed in any stack, for all arms on the same batches, and judged on the slow weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.evidence import data
from bench.evidence.arms import ARMS, RULES, has_muon
from bench.evidence.data import Part, Source
from bench.evidence.networks.classifiers import ConvNet
from bench.evidence.networks.stack import Batch, starts
from bench.evidence.networks.transformers import GPT
from bench.evidence.training import Point, Task, factor, from_json, to_json, train

DIGITS = Task("tiny", RULES["sgd"], ConvNet(8, (3,), (2,)), data.digits, 16, 23, 0.1, ("accuracy",), 20, 100)


@dataclass
class Watched:
    """A source that keeps what it gave."""

    source: Source
    given: list[Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.source.name

    def batches(self, seeds: Sequence[int], size: int) -> Iterator[Batch]:
        for batch in self.source.batches(seeds, size):
            self.given.append(batch[0])
            yield batch

    def held_out(self, part: Part, size: int, limit: int) -> list[Batch]:
        return self.source.held_out(part, size, limit)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _itself(source: Source) -> Source:
    return source


def windows() -> Source:
    generator = torch.Generator().manual_seed(0)
    parts = {part: torch.randint(9, (300,), generator=generator) for part in ("train", "validation", "test")}
    return data.Windows("made up", parts, 6)


@pytest.mark.parametrize(("rule", "arm"), [("sgd", "lookahead-pullback"), ("adamw", "gpa"), ("muon", "lookahead")])
def test_a_seed_trains_in_a_stack_as_it_does_alone(rule: str, arm: str) -> None:
    if rule == "muon" and not has_muon():
        pytest.skip("torch.optim.Muon came with torch 2.9")
    task = replace(DIGITS, rule=RULES[rule])
    if rule == "muon":
        task = replace(task, network=GPT(data.VOCABULARY, 8, 1, 2, 6), source=windows, metrics=())
    point = Point(0.02, 0.8)
    both = train(task, ARMS[arm], point, "cosine", [3, 4], 23)
    for i, seed in enumerate((3, 4)):
        alone = train(task, ARMS[arm], point, "cosine", [seed], 23)
        assert both.curve[i] == pytest.approx(alone.curve[0], rel=1e-4)
        assert both.test["loss"][i] == pytest.approx(alone.test["loss"][0], rel=1e-4)
        assert both.start["loss"][i] == pytest.approx(alone.start["loss"][0], rel=1e-6)
        assert alone.test["loss"][0] < alone.start["loss"][0] - 0.01
    assert both.curve[0] != pytest.approx(both.curve[1], rel=1e-3)


def test_all_arms_see_the_same_batches() -> None:
    seen = []
    for arm in ("base", "lookahead", "schedule-free"):
        watched = Watched(data.digits())
        train(replace(DIGITS, source=partial(_itself, watched)), ARMS[arm], Point(0.1, 0.9), "constant", [1, 2], 13)
        seen.append(torch.stack(watched.given[:13]))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0][:, 0], seen[0][:, 1])
    assert not torch.equal(seen[0][0], seen[0][1])


def test_evaluation_is_on_the_slow_weights_between_two_syncs() -> None:
    # Three steps: the slow weights are still the start's.
    trained = train(DIGITS, ARMS["lookahead"], Point(0.1, 0.9), "constant", [1], 3)
    assert trained.test == trained.start
    still = train(DIGITS, ARMS["base"], Point(1e-12, 0.9), "constant", [1], 3)
    assert trained.curve[0] == pytest.approx(still.curve[0], rel=1e-6)
    assert train(DIGITS, ARMS["base"], Point(0.1, 0.9), "constant", [1], 3).test != trained.start
    longer = train(DIGITS, ARMS["lookahead"], Point(0.1, 0.9), "constant", [1], 23)
    assert longer.steps == [3, 13, 23]
    assert longer.curve[0][2] < longer.curve[0][1] < longer.curve[0][0]
    assert all(step % arm.k for step in longer.steps for arm in ARMS.values())


def test_scores_are_those_of_the_parts_they_are_named_after() -> None:
    trained = train(DIGITS, ARMS["base"], Point(1e-12, 0.0), "constant", [5], 3)
    parameters = starts(DIGITS.network, [5])
    for part, loss in (("validation", trained.validation[0]), ("test", trained.test["loss"][0])):
        images, classes = data.digits().parts[part]
        scores = DIGITS.network.scores(parameters, (images[None, :100], classes[None, :100]))
        assert loss == pytest.approx(scores["loss"].item(), rel=1e-5)
    assert trained.test["accuracy"][0] == pytest.approx(scores["accuracy"].item())
    images, classes = data.digits().parts["validation"]
    along = DIGITS.network.scores(parameters, (images[None, :20], classes[None, :20]))
    assert trained.curve[0][0] == pytest.approx(along["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("arm", ["lookahead", "ema", "schedule-free"])
def test_a_part_alone_is_what_it_is_among_all(arm: str) -> None:
    """To the bit: what is evaluated changes nothing of a training, so tuning may leave out what it does not ask for."""
    whole, validation, test = (
        train(DIGITS, ARMS[arm], Point(0.1, 0.9), "cosine", [1, 2], 23, only) for only in (None, "validation", "test")
    )
    assert validation == replace(whole, steps=[], curve=[], start={}, test={})
    assert test == replace(whole, steps=[], curve=[], validation=[])
    for one in (validation, test):
        assert to_json(from_json(json.loads(json.dumps(to_json(one))))) == to_json(one)


def test_divergence_is_infinite_and_survives_the_record() -> None:
    trained = train(DIGITS, ARMS["lookahead"], Point(1e38, 0.9), "constant", [1, 2], 33)
    assert trained.diverged == [True, True]
    assert math.isnan(trained.test["accuracy"][0])
    assert trained.scored("loss") == trained.start["loss"]
    assert trained.scored("accuracy") == trained.start["accuracy"]
    plain = json.loads(json.dumps(to_json(trained), allow_nan=False))
    again = from_json(plain)
    assert again.curve[0][-1] == math.inf
    assert again.diverged == [True, True]
    assert again.scored("loss") == pytest.approx(trained.scored("loss"), rel=1e-6)
    sound = train(DIGITS, ARMS["base"], Point(0.1, 0.9), "constant", [1], 13)
    assert from_json(json.loads(json.dumps(to_json(sound)))).curve[0] == pytest.approx(sound.curve[0], rel=1e-6)


def test_schedules_warm_up_and_then_stay_or_fall_to_nothing() -> None:
    constant = [factor("constant", step, 100) for step in range(1, 101)]
    assert constant[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert set(constant[5:]) == {1.0}
    cosine = [factor("cosine", step, 105) for step in range(1, 106)]
    assert cosine[:5] == constant[:5]
    assert cosine[54] == pytest.approx(0.5)
    assert cosine[-1] == pytest.approx(0.0, abs=1e-12)
    assert sorted(cosine[5:], reverse=True) == cosine[5:]
