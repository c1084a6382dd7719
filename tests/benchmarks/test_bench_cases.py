"""What the benchmarks compare: the lists of parameters are the models', and every side does the same work."""

from __future__ import annotations

import sys

import pytest
import torch

from bench.suites import steps
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.device import Cpu
from lookahead_fused.bench.measure import Effort, Schedule, Side
from lookahead_fused.bench.opponents import OPPONENTS, PLAIN, SYNC, Setting
from lookahead_fused.bench.samples import Samples


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_cases_have_the_exact_counts() -> None:
    counts = {name: (case.tensors, case.elements) for name, case in parameters.CASES.items()}
    # As the models' publishers count them.
    assert counts["resnet50"] == (161, 25_557_032)
    assert counts["bert-large"] == (391, 335_141_888)
    assert counts["gpt2-small"] == (148, 124_439_808)
    assert counts["gpt2-xl"] == (580, 1_557_611_200)
    assert counts["one-large"] == (1, 67_108_864)
    assert counts["many-small"] == (1000, 64_000)
    assert counts["groups-465"][0] == 465
    whole = parameters.Case("", parameters.llama3_8b())
    assert (whole.tensors, whole.elements) == (291, 8_030_261_248)
    whole = parameters.Case("", parameters.olmoe())
    assert (whole.tensors, whole.elements) == (3219, 6_919_161_856)


@pytest.mark.parametrize("ranks", [8, 64, 512])
def test_a_shard_is_what_fsdp_gives_the_first_rank(ranks: int) -> None:
    whole = parameters.llama3_8b()
    for shape, part in zip(whole, parameters.shard(whole, ranks), strict=True):
        expected = torch.empty(shape, device="meta").chunk(ranks)[0].shape
        assert part == tuple(expected)


def test_layouts() -> None:
    params = parameters.make(parameters.Case("", ((3, 4), (5,), ())))
    assert [len(group["params"]) for group in parameters.groups(params, "one")] == [3]
    decayed, others = parameters.groups(params, "decay")
    assert ([tuple(p.shape) for p in decayed["params"]], [tuple(p.shape) for p in others["params"]]) == (
        [(3, 4)],
        [(5,), ()],
    )
    assert others["weight_decay"] == 0
    assert "weight_decay" not in decayed
    assert [group["params"] for group in parameters.groups(params, "each")] == [[p] for p in params]
    with pytest.raises(ValueError, match="layout"):
        parameters.groups(params, "two")


def test_parameters_and_their_twins() -> None:
    params = parameters.make(parameters.Case("", ((3, 4), (5,))), dtype=torch.bfloat16)
    twins = parameters.twin(params)
    assert [tuple(p.shape) for p in twins] == [(3, 4), (5,)]
    for mine, other in zip(params, twins, strict=True):
        assert mine.dtype == gradient(mine).dtype == other.dtype == torch.bfloat16
        assert torch.equal(mine, other)
        assert other.data_ptr() != mine.data_ptr()
        assert other.grad is mine.grad


def test_renewed_gradients_are_other_tensors_at_other_addresses() -> None:
    params = parameters.make(parameters.CASES["scalars-1000"])
    old = [(gradient(p), gradient(p).data_ptr(), gradient(p).clone()) for p in params]
    parameters.renew_gradients(params)
    for param, (tensor, address, value) in zip(params, old, strict=True):
        assert gradient(param) is not tensor
        assert gradient(param).data_ptr() != address
        assert torch.equal(gradient(param), value)


def test_gradients_in_turns() -> None:
    """In each step another eighth has none, and all others their own; after eight steps it begins anew."""
    params = parameters.make(parameters.Case("", ((2,),) * 11))
    own = [gradient(p) for p in params]
    turns = parameters.Turns(params)
    without = []
    for _ in range(9):
        turns()
        assert all(p.grad is None or p.grad is g for p, g in zip(params, own, strict=True))
        without.append([i for i, p in enumerate(params) if p.grad is None])
    assert without == [[1, 9], [2, 10], [3], [4], [5], [6], [7], [0, 8], [1, 9]]


def test_every_side_takes_its_own_gradients_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Side] = []

    def interleave(self: Cpu, sides: list[Side], schedule: Schedule) -> Samples:
        seen.extend(sides)
        return {side.name: [1.0, 1.0] for side in sides}

    monkeypatch.setattr(Cpu, "interleave", interleave)
    report = steps.compare(steps.COMPARISONS["many-small-turns"], Cpu(), Effort())
    assert steps.IN_TURNS in report.title
    turns = [side.prepare for side in seen]
    assert all(isinstance(turn, parameters.Turns) for turn in turns)
    assert len({id(turn) for turn in turns}) == len(turns) == 2
    assert not {id(p) for p in turns[0].parameters} & {id(p) for p in turns[1].parameters}  # type: ignore[union-attr]


@pytest.mark.parametrize("sync", [opponents.ForeachSync, opponents.PythonSync])
def test_the_opponent_is_lookahead(sync: type) -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = -torch.ones(1)
    opponent = sync(torch.optim.SGD([param], lr=1.0), k=3, alpha=0.5)
    trajectory = []
    for _ in range(9):
        opponent.step()
        trajectory.append(param.item())
    assert trajectory == [1, 2, 1.5, 2.5, 3.5, 3, 4, 5, 4.5]


# The others do something else, and say so in the report: no sync, other slow weights, another inner step.
RIVALS = [name for name, opponent in OPPONENTS.items() if name != PLAIN and not opponent.note]


@pytest.mark.parametrize("layout", parameters.LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16-master"])
@pytest.mark.parametrize("rule", opponents.RULE_TITLES)
@pytest.mark.parametrize("name", RIVALS)
def test_all_sides_do_the_same_work(name: str, rule: str, dtype: str, layout: str) -> None:
    setting = Setting(rule, dtype, k=3)
    reason = OPPONENTS[name].refusal(setting)
    if reason:
        pytest.skip(reason)
    mine = parameters.make(parameters.Case("", ((300,), (7, 11))), dtype=setting.param_dtype)
    other = parameters.twin(mine)
    sides = [
        opponents.ours("cpu")[0].make(setting, parameters.groups(mine, layout)),
        OPPONENTS[name].make(setting, parameters.groups(other, layout)),
    ]
    for _ in range(2 * setting.k + 1):
        for side in sides:
            side.step()
    # A master's last place may round a 16-bit parameter to the other side.
    tolerance = (1e-5, 1e-7) if dtype == "fp32" else (2**-7, 1e-7)
    torch.testing.assert_close(mine, other, rtol=tolerance[0], atol=tolerance[1])


@pytest.mark.parametrize("in_training", [False, True])
def test_in_training_an_operator_comes_before_every_step(in_training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every side, near and far; and it writes more than torch's smallest parallel piece."""
    seen: list[Side] = []

    def interleave(self: Cpu, sides: list[Side], schedule: Schedule) -> Samples:
        seen.extend(sides)
        return {side.name: [1.0, 1.0] for side in sides}

    monkeypatch.setattr(Cpu, "interleave", interleave)
    comparison = steps.Comparison("many-small", far=steps.FAR[:1], in_training=in_training)
    report = steps.compare(comparison, Cpu(), Effort())
    assert len(seen) == 5
    assert (steps.IN_TRAINING in report.title) == in_training
    for side in seen:
        assert (side.prepare is not None) == in_training
        if side.prepare is not None:
            written = side.prepare()
            assert isinstance(written, torch.Tensor)
            assert written.numel() > 1 << 20


def test_every_opponent_serves_or_says_why_not() -> None:
    for rule in opponents.RULE_TITLES:
        for dtype in opponents.DTYPE_TITLES:
            setting = Setting(rule, dtype)
            refusals = {name: opponent.refusal(setting) for name, opponent in OPPONENTS.items()}
            assert not refusals[opponents.MASTERS if dtype == "bf16-master" else SYNC]
            assert "GPU" in refusals["apex fused + foreach sync"] or dtype == "bf16-master"


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm" in OPPONENTS["timm's Lookahead over torch fused"].refusal(Setting())
