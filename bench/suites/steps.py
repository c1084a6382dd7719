"""The comparisons of step times: which lists, rules, dtypes and groups, and against whom.

Opponents come in two tiers. Those that are near ours take turns with it and with the ceiling in one interleaving of
many rounds. Those that are far, by a factor, are compared one at a time in a few rounds: their ratio needs no third
digit, and their state need not be in memory with all others'.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import traffic
from bench.harness import ceiling
from bench.harness.figures import Figure, Report, scaled
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.device import Device
from lookahead_fused.bench.measure import LARGE, Effort, Side, Unavailable, schedule
from lookahead_fused.bench.opponents import MASTERS, OPPONENTS, OURS, PLAIN, SYNC, K, Opponent, Setting, Steps
from lookahead_fused.bench.samples import Samples, fastest, ratio, spread

NEAR = (SYNC, PLAIN)
FAR = ("torch fused + Python sync", "torch foreach + foreach sync", "torch per-tensor + Python sync")
PACKAGES = tuple(
    name for name in OPPONENTS if name not in (SYNC, PLAIN, MASTERS) and not name.startswith("torch f")
    and not name.startswith("torch p")
)  # fmt: skip
ALL_FAR = tuple(name for name in OPPONENTS if name not in (SYNC, PLAIN, MASTERS))
GRADIENTS = "the same gradient tensors at every step"
IN_TURNS = "another eighth of the parameters without a gradient in each step"
IN_TRAINING = "each step right after a parallel operator of torch's"


@dataclass(frozen=True)
class Comparison:
    """One list of parameters, stepped by several optimizers.

    Attributes:
        case, layout: keys of ``parameters.CASES`` and ``parameters.LAYOUTS``.
        setting: rule, dtype and k; its device is set when it is run.
        rounds: of the near opponents, at an effort of 1.
        near, far: names of opponents.
        targets: what the ratio to an opponent must reach, on a CPU.
        share_target: the percentage of the ceiling that must be reached, on a CPU.
        at_full: also compare with ours in fp32.
        ceiling: also compare with the bandwidth ceiling, where the list is large.
        in_training: before every step torch runs an operator on all its threads, as a backward pass ends with. They
            then spin on their cores for milliseconds, and a step on other threads waits for those cores. The operator
            leaves the caches full of its own memory, as a backward pass leaves them full of activations.
        in_turns: in each step another eighth of the parameters has no gradient. A sync of all at once is other work
            then, so that plain torch is the only opponent.
    """

    case: str
    setting: Setting = field(default_factory=Setting)
    layout: str = "one"
    rounds: int = 10
    near: tuple[str, ...] = NEAR
    far: tuple[str, ...] = ()
    targets: dict[str, float] = field(default_factory=dict)
    share_target: float | None = None
    at_full: bool = False
    ceiling: bool = True
    in_training: bool = False
    in_turns: bool = False

    @property
    def title(self) -> str:
        case, setting = parameters.CASES[self.case], self.setting
        layout = "" if self.layout == "one" else f", {parameters.LAYOUTS[self.layout]}"
        dtype, rule = opponents.DTYPE_TITLES[setting.dtype], opponents.RULE_TITLES[setting.rule]
        when = f", {IN_TRAINING}" if self.in_training else f", {IN_TURNS}" if self.in_turns else ""
        return f"{case}, {dtype}, {rule}, k={setting.k}{layout}{when}"

    @property
    def short(self) -> str:
        """As pictures name it."""
        setting = self.setting
        parts = [parameters.CASES[self.case].title, opponents.RULE_TITLES[setting.rule].partition(" ")[0]]
        parts += [setting.dtype] if setting.dtype != "fp32" else []
        parts += [f"k={setting.k}"] if setting.k != K else []
        parts += {"one": [], "decay": ["2 groups"], "each": ["group per tensor"]}[self.layout]
        parts += ["in training"] if self.in_training else []
        parts += ["gradients in turns"] if self.in_turns else []
        return ", ".join(parts)


COMPARISONS = {
    # The figures with targets.
    "gpt2-adamw": Comparison("gpt2-small", rounds=12, far=FAR[1:], targets={SYNC: 1.25, PLAIN: 1.0}),
    "gpt2-sgd": Comparison("gpt2-small", Setting("sgd"), targets={SYNC: 1.1}),
    "gpt2-bf16": Comparison(
        "gpt2-small", Setting(dtype="bf16"), rounds=8, targets={f"{OURS}, fp32": 1.0}, at_full=True
    ),
    "gpt2-bf16-master": Comparison("gpt2-small", Setting(dtype="bf16-master"), rounds=8, near=(MASTERS,)),
    "one-large": Comparison("one-large", rounds=16, targets={SYNC: 1.15, PLAIN: 0.97}, share_target=95),
    "many-small": Comparison("many-small", rounds=16, far=ALL_FAR, targets={SYNC: 15}),
    "small-gpt-training": Comparison("small-gpt", rounds=6, targets={SYNC: 1.25, PLAIN: 1.0}, in_training=True),
    "many-small-turns": Comparison("many-small", near=(PLAIN,), targets={PLAIN: 5}, in_turns=True),
    # The rest of the lists.
    "small-gpt-adamw": Comparison("small-gpt"),
    "resnet50-sgd": Comparison("resnet50", Setting("sgd"), far=ALL_FAR),
    "resnet50-adamw": Comparison("resnet50", far=ALL_FAR),
    "resnet50-adam": Comparison("resnet50", Setting("adam")),
    "resnet50-decay": Comparison("resnet50", layout="decay"),
    "resnet50-each": Comparison("resnet50", layout="each", far=("torch per-tensor + Python sync",)),
    "resnet50-k1": Comparison("resnet50", Setting(k=1), rounds=20),
    "resnet50-k10": Comparison("resnet50", Setting(k=10), rounds=6),
    "resnet50-bf16": Comparison("resnet50", Setting(dtype="bf16"), at_full=True),
    "resnet50-bf16-master": Comparison("resnet50", Setting(dtype="bf16-master"), near=(MASTERS,)),
    "bert-large-adamw": Comparison("bert-large", rounds=2, ceiling=False),
    "gpt2-xl-adamw": Comparison("gpt2-xl", rounds=4, far=FAR),
    "llama3-8b-8-adamw": Comparison("llama3-8b-8", rounds=4, far=FAR),
    "llama3-8b-8-master": Comparison("llama3-8b-8", Setting(dtype="bf16-master"), rounds=4, near=(MASTERS,)),
    "llama3-8b-64-adamw": Comparison("llama3-8b-64", layout="decay", rounds=6),
    "llama3-8b-512-adamw": Comparison("llama3-8b-512", layout="decay", far=FAR),
    "moe-adamw": Comparison("moe", far=FAR),
    "moe-each": Comparison("moe", layout="each", rounds=4),
    "many-small-each": Comparison("many-small", layout="each"),
    "many-small-sgd": Comparison("many-small", Setting("sgd")),
}  # fmt: skip


def needed_bytes(comparison: Comparison, with_ceiling: bool, device: str) -> int:
    """About what the comparison has in memory at once: the near opponents', or ours and one far opponent's."""
    setting = comparison.setting
    moments = 1 if setting.rule == "sgd" else 2
    size = 4 if setting.dtype == "fp32" else 2
    ours = 2 * size + 4 * moments + 4 + (2 if setting.dtype == "bf16-master" else 0)
    state = {PLAIN: size * (1 + moments), MASTERS: size + 4 * (3 + moments)}
    near = sum(state.get(name, size * (2 + moments)) for name in comparison.near)
    near += 4 * (3 + moments) + 4 if comparison.at_full else 0
    # Unfused steps make temporaries as large as all parameters, twice.
    far = size * (4 + moments) if comparison.far else 0
    copies = 2 << 30 if with_ceiling and device == "cuda" else 0
    return int(parameters.CASES[comparison.case].elements * (ours + max(near, far)) * 1.03) + (1 << 29) + copies


def compare(comparison: Comparison, device: Device, effort: Effort) -> Report:
    """Run a comparison.

    Args:
        comparison: what is compared.
        device: where.
        effort: how much time it may take.

    Raises:
        Unavailable: there is not the memory for it, or no backend.
    """
    setting = replace(comparison.setting, device=device.name)
    case = parameters.CASES[comparison.case]
    candidates = opponents.ours(device.name)
    has_ceiling = (
        comparison.ceiling and case.elements >= LARGE and not (device.name == "cpu" and setting.dtype == "bf16-master")
    )
    need, have = needed_bytes(comparison, has_ceiling, device.name), device.available_bytes()
    if need > have:
        raise Unavailable(f"{case}: needs {need / 2**30:.1f} GiB, {have / 2**30:.1f} GiB are available")

    params = parameters.make(case, dtype=setting.param_dtype, device=device.name)
    first, *further = candidates
    mine = first.make(setting, parameters.groups(params, comparison.layout))
    sides = [Side(OURS, mine.step, _turns(comparison, params))]
    sides += [_side(other, setting, comparison, params) for other in further]
    skipped: dict[str, str] = {}
    near = _willing(comparison.near, setting, skipped)
    sides += [_side(other, setting, comparison, params) for other in near]
    if comparison.at_full:
        full = replace(setting, dtype="fp32")
        own = parameters.make(case, device=device.name)
        sides.append(Side(f"{OURS}, fp32", first.make(full, parameters.groups(own, comparison.layout)).step))
    ceilings: list[Side] = []
    if has_ceiling:
        for _ in range(setting.k):
            mine.step()
        ceilings = ceiling.ceilings(device, _rows(mine, params, setting), setting.k)
        if comparison.share_target is None:
            del ceilings[1:]  # what only informs needs no second candidate
    # A figure with a target gets twice the time of one that informs.
    budget = effort.budget * (2 if comparison.targets else 1)
    turns = schedule(case.elements, setting.k, effort.of(comparison.rounds), budget)
    prepare = _operator(device) if comparison.in_training else None
    samples = device.interleave([replace(s, prepare=prepare or s.prepare) for s in (*sides, *ceilings)], turns)
    figures = [
        Figure(
            f"{OURS} against {side.name}", ratio(samples, OURS, side.name), "x",
            comparison.targets.get(side.name) if device.name == "cpu" else None, kind="ratio", of=side.name,
        )
        for side in sides[1:]
    ]  # fmt: skip
    figures += _rates(comparison, device, samples, [side.name for side in ceilings])

    # The near opponents' memory is free before a far one's is taken.
    names = [side.name for side in (*sides, *ceilings)]
    del sides, ceilings
    gc.collect()
    few = schedule(case.elements, setting.k, max(2, round(min(turns.rounds, 9) / 3)), effort.budget / 6)
    beside = f"{OURS}, beside those below"
    for other in _willing(comparison.far, setting, skipped):
        both = (Side(OURS, mine.step), _side(other, setting, comparison, params))
        pair = device.interleave([replace(side, prepare=prepare) for side in both], few)
        figures.append(
            Figure(f"{OURS} against {other.name}", ratio(pair, OURS, other.name), "x", kind="ratio", of=other.name)
        )
        samples.setdefault(beside, []).extend(pair[OURS])
        samples[other.name] = pair[other.name]
        gc.collect()
    notes = [f"{o.name}: {o.note}" for o in OPPONENTS.values() if o.note and o.name in samples]
    if setting.dtype == "bf16":
        notes.append(opponents.BF16_NOTE)
    report = Report(comparison.title, "; ".join([str(turns), GRADIENTS, *notes]), figures, samples, skipped=skipped)
    report.about = about(comparison, setting, names)
    return report


def about(comparison: Comparison, setting: Setting, names: Sequence[str]) -> dict[str, Any]:
    """What a program that reads the report needs of the comparison."""
    case = parameters.CASES[comparison.case]
    return {
        "case": comparison.case,
        "short": comparison.short,
        "tensors": case.tensors,
        "elements": case.elements,
        "rule": setting.rule,
        "dtype": setting.dtype,
        "layout": comparison.layout,
        "k": setting.k,
        "device": setting.device,
        "bytes_per_parameter": traffic.mean_bytes(setting),
        "near": list(names),
    }


def _side(other: Opponent, setting: Setting, comparison: Comparison, params: Sequence[nn.Parameter]) -> Side:
    own = parameters.twin(params)
    step = other.make(setting, parameters.groups(own, comparison.layout)).step
    return Side(other.name, step, _turns(comparison, own))


def _turns(comparison: Comparison, params: Sequence[nn.Parameter]) -> Callable[[], object] | None:
    return parameters.Turns(params) if comparison.in_turns else None


def _operator(device: Device) -> Callable[[], object]:
    """An operator on all of torch's threads, and over more memory than most caches hold."""
    operand = torch.zeros(1 << 26, device=device.name)
    return lambda: operand.add_(1.0)


def _willing(names: Sequence[str], setting: Setting, skipped: dict[str, str]) -> list[Opponent]:
    """The opponents that serve a setting here; why the others do not goes into `skipped`."""
    reasons = {name: OPPONENTS[name].refusal(setting) for name in names}
    skipped.update({name: reason for name, reason in reasons.items() if reason})
    return [OPPONENTS[name] for name in names if not reasons[name]]


def _rows(optimizer: Steps, params: Sequence[nn.Parameter], setting: Setting) -> list[list[Tensor]]:
    """For each parameter the arrays that a step walks, in the order that a ceiling takes."""
    moments = ("momentum_buffer",) if setting.rule == "sgd" else ("exp_avg", "exp_avg_sq")
    rows = []
    for p in params:
        assert p.grad is not None
        state = optimizer.state[p]  # type: ignore[attr-defined]
        rows.append([p.detach(), p.grad, *(state[name] for name in moments), state["slow_param"]])
    return rows


def _rates(comparison: Comparison, device: Device, samples: Samples, ceilings: Sequence[str]) -> list[Figure]:
    elements, setting = parameters.CASES[comparison.case].elements, comparison.setting
    moved = elements * traffic.mean_bytes(setting)
    each = [elements / seconds / 1e9 for seconds in samples[OURS]]
    figures = [Figure("parameters a second", spread(each), "G/s", kind="rate", of=OURS)]
    if ceilings:
        best = fastest(samples, ceilings)
        bounds = [device.ceiling_seconds_per_step(seconds, moved) for seconds in samples[best]]
        share = ratio({OURS: samples[OURS], best: bounds}, OURS, best)
        target = comparison.share_target if device.name == "cpu" else None
        figures += [
            Figure(f"share of the bandwidth {best}", scaled(share, 100), "%", target, kind="share", of=OURS),
            Figure("bandwidth of the ceiling", spread([moved / s / 1e9 for s in bounds]), "GB/s", kind="rate", of=best),
        ]
    return figures
