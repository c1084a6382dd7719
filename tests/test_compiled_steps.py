"""torch.compile over a whole training step: forward, backward and the optimizer's. Of ours there is one graph break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LOOKAHEAD_CLASSES, seeded
from runs import assert_same_run
from torch._dynamo.utils import counters

from lookahead_fused import EMA, GPA, Lion, Lookahead, LookaheadAdamW, ScheduleFree

MAKERS: dict[str, Callable[[Any], Any]] = {
    **{name: lambda params, cls=cls: cls(params, lr=0.1, k=2) for name, cls in LOOKAHEAD_CLASSES.items()},
    "lion alone": lambda params: Lion(params, lr=0.1),
    "clipping": lambda params: LookaheadAdamW(params, lr=0.1, k=2, max_grad_norm=0.1),
    "Lookahead": lambda params: Lookahead(torch.optim.AdamW(params, lr=0.1), k=2),
    "Lookahead around its own": lambda params: Lookahead(torch.optim.NAdam(params, lr=0.1), k=2),
    "EMA": lambda params: EMA(torch.optim.AdamW(params, lr=0.1)),
    "GPA": lambda params: GPA(torch.optim.SGD(params, lr=0.1)),
    "ScheduleFree": lambda params: ScheduleFree(torch.optim.AdamW(params, lr=0.1)),
}
STEPS = 6

pytestmark = pytest.mark.filterwarnings("ignore")


class Training:
    """A model, its optimizer, and what is compiled: forward, backward, and what is done after."""

    def __init__(self, make: Callable[[Any], Any], *after: str) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        self.optimizer = make(self.model.parameters())
        self.after = after

    def function(self) -> Callable[[torch.Tensor], torch.Tensor]:
        # A function of its own each: torch keeps what it made of one. No loop: torch gives one up that breaks.
        def train(x: torch.Tensor) -> torch.Tensor:
            loss = self.model(x).square().sum()
            loss.backward()
            if "step" in self.after:
                self.optimizer.step()
            if "sync" in self.after:
                self.optimizer.sync()
            return loss * 2

        return train

    def run(self, function: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        losses = []
        for step in range(STEPS):
            self.optimizer.zero_grad()
            self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            losses.append(function(torch.randn(5, 4, generator=seeded(step))))
        return losses


def breaks_of(training: Training) -> tuple[int, int]:
    """Graph breaks, torch's own at the backward among them, and graphs, of all steps."""
    torch._dynamo.reset()
    counters.clear()
    training.run(torch.compile(training.function(), backend="eager"))
    return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_is_one_break_and_its_bits_are_the_eager_ones(name: str) -> None:
    """And no graph: nothing of it is traced, and nothing is compiled again where a learning rate changes."""
    before, graphs = breaks_of(Training(MAKERS[name]))
    compiled = Training(MAKERS[name], "step")
    found = breaks_of(compiled)
    assert found[0] - before <= 1, counters["graph_break"]
    assert found[1] == graphs

    eager = Training(MAKERS[name], "step")
    eager.run(eager.function())
    assert_same_run(compiled.optimizer, eager.optimizer)


@pytest.mark.parametrize("name", ["adamw", "Lookahead", "EMA"])
def test_explained(name: str) -> None:
    training = Training(MAKERS[name], "step")
    training.optimizer.zero_grad()
    torch._dynamo.reset()
    explained = torch._dynamo.explain(training.function())(torch.ones(5, 4))
    assert explained.graph_break_count <= 1, explained


@pytest.mark.parametrize("name", ["adamw", "Lookahead", "Lookahead around its own"])
def test_hooks_and_a_sync(name: str) -> None:
    """A hook's own code is not traced either; a sync after the step is one break more."""
    before, graphs = breaks_of(Training(MAKERS[name]))
    runs = []
    for compiled in (True, False):
        training, calls = Training(MAKERS[name], "step", "sync"), []
        training.optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        training.optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        if compiled:
            found = breaks_of(training)
            assert found[0] - before <= 2, counters["graph_break"]
            assert found[1] == graphs
        else:
            training.run(training.function())
        assert calls == ["before", "after"] * STEPS
        training.optimizer._optimizer_step_pre_hooks.clear()
        training.optimizer._optimizer_step_post_hooks.clear()
        runs.append(training.optimizer)
    assert_same_run(*runs)
