"""torch's first FSDP and its ShardedGradScaler: it tells an overflow on one rank to the others where it unscales,
and only there. Two ranks, no network."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import needs_gloo, two_ranks

pytestmark = needs_gloo

SCRIPT = """
import warnings
warnings.filterwarnings("ignore")
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from lookahead_fused import Lookahead, LookaheadAdamW, LookaheadSGD

MAKERS = {
    "adamw": lambda ps: LookaheadAdamW(ps, lr=0.1, k=2),
    "sgd": lambda ps: LookaheadSGD(ps, lr=0.1, k=2, momentum=0.9),
    "fused": lambda ps: LookaheadAdamW(ps, lr=0.1, k=2, fused=True),
    "wrapped-adamw": lambda ps: Lookahead(torch.optim.AdamW(ps, lr=0.1), k=2),
    "wrapped-adamax": lambda ps: Lookahead(torch.optim.Adamax(ps, lr=0.1), k=2),
}

def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))

def loss_of(model, step):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean()

def shards(model):
    return [p.detach().clone() for p in model.parameters()]

def weights(model):
    with FSDP.summon_full_params(model, writeback=False):
        return [p.detach().clone().flatten() for p in model.parameters()]

for use_orig_params in (False, True):
    for name, make in MAKERS.items():
        what = (name, use_orig_params)
        model, plain = FSDP(make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu")), make_model()
        optimizer, twin = make(model.parameters()), make(plain.parameters())
        assert optimizer._step_supports_amp_scaling is False, what
        scaler = ShardedGradScaler(device="cpu", init_scale=8.0, growth_interval=1000)
        skipped = (0, 3, 4)  # the first step, before there is a state, and some later
        for step in range(7):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step in skipped and rank == 1:
                # Only where this rank has a share.
                for p in model.parameters():
                    if p.grad is not None and p.grad.numel():
                        p.grad.view(-1)[0] = float("inf")
            before, scale = shards(model), scaler.get_scale()
            states = {id(p): {k: v.clone() for k, v in own.items()} for p, own in optimizer.state.items()}
            scaler.step(optimizer)
            scaler.update()
            if step in skipped:
                assert scaler.get_scale() < scale, (what, step)
                for p, old in zip(model.parameters(), before, strict=True):
                    assert torch.equal(p, old), (what, step, "moved on rank", rank)
                assert {id(p) for p in optimizer.state} == states.keys(), (what, step)
                for p, own in optimizer.state.items():
                    assert all(torch.equal(v, states[id(p)][k]) for k, v in own.items()), (what, step)
            else:
                twin.zero_grad()
                loss_of(plain, step).backward()
                twin.step()
        found, expected = weights(model), [p.detach().flatten() for p in plain.parameters()]
        torch.testing.assert_close(torch.cat(found)[: sum(t.numel() for t in expected)], torch.cat(expected))
        both = [torch.empty_like(torch.cat(found)) for _ in range(2)]
        dist.all_gather(both, torch.cat(found))
        assert torch.equal(*both), (what, "the ranks drifted apart")

# Elsewhere the step unscales, without a second pass over the gradients.
for name in ("adamw", "sgd", "fused", "wrapped-adamw"):
    assert MAKERS[name](make_model().parameters())._step_supports_amp_scaling is True, name
"""


@pytest.mark.filterwarnings("ignore")
def test_an_overflow_on_one_rank_is_seen_by_all(tmp_path: Path) -> None:
    two_ranks(SCRIPT, tmp_path)
