"""DQN on CartPole, and the contest in which its arms are tuned and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.evidence import control, dqn
from bench.evidence.contest import Contest, Grid, Outcome, Point
from bench.evidence.control import Control, Size
from bench.evidence.experiment import Experiment, Scale
from bench.evidence.records import Records
from lookahead_fused import Lookahead

PLAN = dqn.Plan(steps=160, environments=3, hidden=8, batch=16, warm_up=40, target_every=25, evaluations=4, episodes=2)


def run_all(experiment: Experiment, scale: Scale, records: Records) -> list[Mapping[str, Any]]:
    """As the runner does: what is pending is asked for, run, and asked for again. The settings, in order."""
    done: list[Mapping[str, Any]] = []
    while pending := [
        job
        for job in experiment.jobs(scale, records)
        if records.get(experiment.name, experiment.revision, job.setting) is None
    ]:
        for job in pending:
            records.add(experiment.name, experiment.revision, job.setting, job.run(), 0.0)
            done.append(job.setting)
    return done


def adam(net: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(net, lr=2e-3)


def constant(_: float) -> float:
    return 1.0


@pytest.mark.parametrize("skill", ["balances", "falls"])
def test_carts_are_those_of_gymnasium(skill: str) -> None:
    """Step by step: state, reward, fall, and the end of an episode at 500. A constant of the dynamics, the order of the
    integration, a limit or the time limit that is another one is seen."""
    gymnasium = pytest.importorskip("gymnasium")
    environment = gymnasium.make("CartPole-v1")
    for seed in range(4):
        environment.reset(seed=seed)
        carts = dqn.CartPoles(environment.unwrapped.state[None].copy())
        random = np.random.default_rng(seed)
        for _ in range(500):
            x, x_dot, angle, angle_dot = carts.states[0]
            steady = 0.05 * x + 0.1 * x_dot + angle + 0.3 * angle_dot > 0
            action = int(steady) if skill == "balances" else int(random.integers(2))
            observation, reward, terminated, truncated, _ = environment.step(action)
            fallen, over = carts.step(np.array([action]))
            assert carts.states[0] == pytest.approx(environment.unwrapped.state, rel=1e-12, abs=1e-14)
            assert torch.equal(carts.observations()[0], torch.from_numpy(observation)) or np.allclose(
                carts.observations()[0], observation, rtol=2e-7
            )
            assert (fallen[0], over[0], reward) == (terminated, truncated, 1.0)
            if terminated or truncated:
                break
        assert (carts.ages[0] == 500) == (skill == "balances")


def test_a_cart_that_fell_begins_again() -> None:
    carts = dqn.CartPoles(np.array([[3.0, 0, 0, 0], [0.0, 0, 0, 0]]))
    carts.step(np.array([0, 0]))
    before = carts.states.copy()
    carts.restart(np.array([True, False]), np.full((2, 4), 0.01))
    assert carts.states[0] == pytest.approx(0.01)
    assert (carts.states[1] == before[1]).all()
    assert carts.ages.tolist() == [0, 1]


def test_a_seed_trains_in_a_stack_as_alone() -> None:
    """A draw, a loss or a replay that seeds share would make them another's."""
    nets: list[list[Tensor]] = []

    def kept(net: list[Tensor]) -> torch.optim.Optimizer:
        nets.append(net)
        return adam(net)

    together = dqn.train(PLAN, [5, 6, 7], kept, constant)
    alone = dqn.train(PLAN, [6], kept, constant)
    assert together.shape == (3, 4)
    assert (alone[0] == together[1]).all()
    for p, own in zip(*nets, strict=True):
        assert torch.allclose(p[1], own[0], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(p[0], p[2], rtol=1e-3, atol=1e-5)


def test_an_episode_that_its_time_limit_ends_bootstraps_and_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cart falls within six steps: replay has no end of an episode, and none is older."""
    ages: list[int] = []
    ends: list[bool] = []
    add, step = dqn.Replay.add, dqn.CartPoles.step

    def watched_add(self: dqn.Replay, before: Any, actions: Any, after: Any, terminated: Any) -> None:
        ends.append(bool(terminated.any()))
        add(self, before, actions, after, terminated)

    def watched_step(self: dqn.CartPoles, actions: Any) -> Any:
        found = step(self, actions)
        ages.append(int(self.ages.max()))
        return found

    monkeypatch.setattr(dqn.CartPoles, "LONGEST", 6)
    monkeypatch.setattr(dqn.Replay, "add", watched_add)
    monkeypatch.setattr(dqn.CartPoles, "step", watched_step)
    assert (dqn.train(PLAN, [0], adam, constant) == 6).all()
    assert not any(ends)
    assert (len(ends), max(ages)) == (PLAN.steps, 6)


def test_the_loss_is_double_dqns() -> None:
    """Against plain loops: actions of the trained network, values of the target, no future after a fall."""
    streams = dqn.Streams(PLAN, [1, 2])
    net, target = streams.network(), dqn.Streams(PLAN, [3, 4]).network()
    random = torch.Generator().manual_seed(0)
    before, after = (torch.randn(2, 5, 4, generator=random) for _ in range(2))
    actions = torch.randint(2, (2, 5), generator=random)
    fallen = torch.tensor([[0.0, 1, 0, 0, 1], [1, 0, 0, 1, 0]])

    def values(weights: list[Tensor], seed: int, observation: Tensor) -> Tensor:
        x = observation
        for layer in range(3):
            x = x @ weights[2 * layer][seed] + weights[2 * layer + 1][seed][0]
            x = x.clamp(min=0) if layer < 2 else x
        return x

    total = torch.zeros(())
    disagree = 0
    for seed in range(2):
        for i in range(5):
            ours, theirs = values(net, seed, after[seed, i]), values(target, seed, after[seed, i])
            disagree += int(ours.argmax() != theirs.argmax())
            future = 0.0 if fallen[seed, i] else 0.99 * theirs[ours.argmax()]
            error = (values(net, seed, before[seed, i])[actions[seed, i]] - 1 - future).abs()
            total = total + (0.5 * error**2 if error < 1 else error - 0.5) / 5
    assert disagree
    ours = dqn.loss(net, target, (before, actions, after, fallen), 0.99)
    assert ours.item() == pytest.approx(total.item(), rel=1e-5)


def test_replay_keeps_the_last_and_gives_what_it_has() -> None:
    replay = dqn.Replay(2, 4)
    for step in range(3):
        marks = torch.tensor([[2.0 * step, 2.0 * step + 1]]).repeat(2, 1)
        actions = np.array([[0, 1], [1, 0]])
        replay.add(marks[..., None].repeat(1, 1, 4), actions, marks[..., None] + 100, actions == 1)
        if step == 0:
            seen = replay.sample(np.array([[0.0, 0.99], [0.5, 0.1]]))[0][..., 0]
            assert seen.tolist() == [[0, 1], [1, 0]]
    before, actions_, after, fallen = replay.sample(np.tile([[0.1, 0.3, 0.6, 0.9]], (2, 1)))
    assert before[..., 0].tolist() == [[4, 5, 2, 3]] * 2
    assert torch.equal(after[..., 0], before[..., 0] + 100)
    assert actions_.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert torch.equal(fallen, actions_.float())


def test_the_target_is_copied_in_its_rhythm(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every 25th update it is the trained network, and until the next one it stays that."""
    kept: list[Tensor] = []
    real = dqn.loss

    def watched(net: list[Tensor], target: list[Tensor], *rest: Any) -> Tensor:
        if len(kept) % 25 == 0:
            assert torch.equal(net[0], target[0])
        else:
            assert torch.equal(target[0], kept[-1])
            assert not torch.equal(net[0], target[0])
        kept.append(target[0].clone())
        return real(net, target, *rest)

    monkeypatch.setattr(dqn, "loss", watched)
    dqn.train(PLAN, [0], adam, constant)
    assert len(kept) == PLAN.updates


def test_returns_are_those_of_the_slow_weights() -> None:
    """Slow weights that no sync ever moves are the start; the agent meanwhile acts on what it trains."""
    never = dqn.train(PLAN, [0, 1], lambda net: Lookahead(torch.optim.Adam(net, lr=0.05), k=2**40), constant)
    streams = dqn.Streams(PLAN, [0, 1])
    assert (never == dqn.evaluate(streams.network(), streams.evaluation)[:, None]).all()
    assert (dqn.train(PLAN, [0, 1], lambda net: torch.optim.Adam(net, lr=0.05), constant) != never).any()


def test_the_schedule_scales_the_learning_rate() -> None:
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    dqn.train(PLAN, [0], lambda net: Watched(net, lr=0.5), lambda done: 1 - done)
    assert rates == pytest.approx([0.5 * (1 - i / PLAN.updates) for i in range(PLAN.updates)])


def test_it_learns() -> None:
    """A random policy falls after some twenty steps."""
    returns = dqn.train(dqn.Plan(steps=900, evaluations=3, episodes=2), [0, 1], adam, constant)
    assert returns[:, 0].mean() < 40
    assert returns[:, -1].mean() > 80


def contest(optimum: Mapping[str, float], **changes: Any) -> Contest:
    """Arms whose score falls off from an optimal learning rate; the value of a seed is its own."""

    def run(arm: str, point: Point, seeds: Sequence[int]) -> Outcome:
        distance = abs(math.log2(point.lr / optimum[arm])) + abs(point.beta - 0.5)
        return {"return": [10 * seed - distance for seed in seeds], "area": [1.0 * seed for seed in seeds]}

    settings: dict[str, Any] = {"fixed": (("one-lr", Point(3.0, 0.9)),), "untuned": ("small",)} | changes
    return Contest(
        key={"scale": "smoke"},
        arms=tuple(arm for arm in optimum if arm != "small"),
        grid=Grid((1.0, 2.0, 4.0), (0.5, 0.9), widen=2),
        tuning=(7, 8),
        fresh=tuple(range(7)),
        run=run,
        score=lambda outcome: sum(outcome["return"]),
        cost=1.0,
        **settings,
    )


class Alone:
    """A contest as an experiment."""

    name, revision = "alone", 1

    def __init__(self, of: Contest) -> None:
        self.of = of

    def jobs(self, scale: Scale, records: Records) -> Any:
        return self.of.jobs(lambda setting: records.get("alone", 1, setting))


def test_a_contest_tunes_each_arm_alike_and_confirms_once() -> None:
    """The grid grows where its edge is best, for that arm alone; fresh seeds see one point of each arm."""
    of, records = contest({"base": 2.0, "arm": 0.3, "far": 64.0, "small": 1.0}), Records(None)

    def get(setting: Any) -> Any:
        return records.get("alone", 1, setting)

    done = run_all(Alone(of), Scale.SMOKE, records)  # type: ignore[arg-type]
    tried = {arm: sorted({s["lr"] for s in done if s["arm"] == arm and s["seeds"] == [7, 8]}) for arm in of.arms}
    assert tried == {"base": [1, 2, 4], "arm": [0.25, 0.5, 1, 2, 4], "far": [1, 2, 4, 8, 16]}
    assert {arm: of.best(arm, get) for arm in of.arms} == {
        "base": Point(2.0, 0.5),
        "arm": Point(0.25, 0.5),
        "far": Point(16.0, 0.5),
    }
    assert [of.at_edge(arm, get) for arm in of.arms] == [False, True, True]
    confirmed = [(s["arm"], s["lr"], s["beta"]) for s in done if len(s["seeds"]) == 7]
    fixed = [(arm, 3.0, 0.9) for arm in ("base", "arm", "far", "small")]
    assert sorted(confirmed) == sorted([*fixed, ("base", 2.0, 0.5), ("arm", 0.25, 0.5), ("far", 16.0, 0.5)])
    assert len(done) == len({str(s) for s in done})


def test_seeds_that_tune_do_not_confirm() -> None:
    with pytest.raises(ValueError, match=r"seeds \[2\] both tune and confirm"):
        Contest({}, (), Grid((), (), 0), (1, 2), (2, 3), lambda *_: {}, lambda _: 0.0, 1.0)


def test_figures_are_arm_minus_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """At one point for "one-lr", and for "constant" each at its own best one, on the fresh seeds."""

    def run(plan: dqn.Plan, arm: str, point: Point, seeds: Sequence[int]) -> Outcome:
        best = {"base": 2e-3, "lookahead": 8e-3}.get(arm, 1e-3)
        value = {"base": 100.0, "lookahead": 103.0}.get(arm, 90.0) - 10 * abs(math.log2(point.lr / best))
        return {"return": [value + seed % 3 for seed in seeds], "area": [value / 2 + seed for seed in seeds]}

    monkeypatch.setattr(control, "run", run)
    size = Size(PLAN, Grid((1e-3, 2e-3, 4e-3), (0.9,), 2), 2, 8)
    experiment, records = Control(sizes=dict.fromkeys(Scale, size)), Records(None)
    assert experiment.figures(records) == []
    run_all(experiment, Scale.QUICK, records)
    figures = {figure.name: figure for figure in experiment.figures(records)}
    shared = math.log2(2.3e-3 / 2e-3) - math.log2(8e-3 / 2.3e-3)
    assert figures["dqn.one-lr.lookahead-base.return"].value == pytest.approx(3 + 10 * shared)
    tuned = figures["dqn.constant.lookahead-base.return"]
    assert (tuned.value, tuned.n, tuned.better, tuned.unit) == (pytest.approx(3), 8, 1, "steps")
    assert figures["dqn.constant.lookahead-base.area"].value == pytest.approx(1.5)
    assert "lookahead: lr 0.008, beta1 0.9; base: lr 0.002" in tuned.note.replace(", at the edge of its grid", "")
    kinds = {name.split(".")[2] for name in figures if ".constant." in name}
    assert kinds == {f"{arm}-base" for arm in control.TUNED[1:]}
    assert "dqn.one-lr.base-small-lr-base.return" in figures


def test_a_return_is_the_last_quarter_and_the_area_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dqn, "train", lambda *_, **__: np.array([[0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]))
    plan = dqn.Plan(steps=200, evaluations=10)
    assert control.run(plan, "base", Point(1e-3, 0.9), [0]) == {"return": [8.5], "area": [4.5]}


def test_an_arm_is_run_over_its_own_optimizer() -> None:
    """One seed, 130 steps: what is recorded are finite numbers, one a seed, and arms differ from the base."""
    plan = dqn.Plan(steps=130, hidden=8, evaluations=2, episodes=2, warm_up=30)
    outcomes = {arm: control.run(plan, arm, Point(2e-2, 0.9), [0, 1]) for arm in (*control.TUNED, *control.UNTUNED)}
    for outcome in outcomes.values():
        assert {name: len(values) for name, values in outcome.items()} == {"return": 2, "area": 2}
        assert all(1 <= value <= 500 for values in outcome.values() for value in values)
    assert len({str(outcome) for outcome in outcomes.values()}) == len(outcomes)


def test_the_picture_has_every_arm_and_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        control, "run", lambda plan, arm, point, seeds: {"return": [1.0] * len(seeds), "area": [1.0] * len(seeds)}
    )
    experiment, records = (
        Control(sizes=dict.fromkeys(Scale, Size(PLAN, Grid((1e-3, 2e-3), (0.5, 0.9), 0), 2, 6))),
        Records(None),
    )
    assert experiment.pictures(records) == []
    run_all(experiment, Scale.QUICK, records)
    (picture,) = experiment.pictures(records)
    assert all(arm in picture.svg for arm in control.TUNED)
    assert "quick" in picture.title
