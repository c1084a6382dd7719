"""The simulation of workers in one process does what `process_group` does in several, and counts what that sends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import needs_gloo, on_ranks

import bench
from bench.demo import workers
from bench.demo.workers import Method, Quadratic, run

LOCAL = Method("local SGD", 4)

IN_PROCESSES = """
sys.path.append(BENCH)
from bench.demo.workers import Method, Quadratic, run

problem, method = Quadratic(50), Method("DiLoCo", 4, alpha=0.7, outer_momentum=0.5)
mine = problem.replicas(size)[rank]
outer = {"k": method.k, "alpha": method.alpha, "outer_momentum": method.outer_momentum}
optimizer = problem.optimizer(mine.params, **outer, process_group=dist.group.WORLD)
given = []
all_reduce = dist.all_reduce

def counted(tensor, *args, **kwargs):
    given.append(tensor.nbytes if tensor.is_floating_point() else 0)
    return all_reduce(tensor, *args, **kwargs)

dist.all_reduce = counted
losses, sent = [], []
for step in range(1, 17):
    mine.differentiate()
    optimizer.step()
    if step in (4, 8, 16):
        losses.append(mine.loss())
        sent.append(sum(given))
simulated = run(problem, method, size, 16)
assert (losses, sent) == (simulated.losses, simulated.sent), (losses, sent, simulated)
"""


@needs_gloo
def test_it_is_what_a_process_group_does(tmp_path: Path) -> None:
    """To the bit, losses and bytes: a mean put elsewhere, or an outer step that is another's, gives others."""
    on_ranks(2, f"BENCH = {str(Path(bench.__file__).parents[1])!r}\n{IN_PROCESSES}", tmp_path)


def test_local_sgd_sends_a_kth_and_reaches_the_same_on_a_quadratic() -> None:
    """Its gradients are linear: without the mean, or with that of fewer workers, the noise would be larger."""
    everybody, local = (run(Quadratic(50), method, 4, 32) for method in (Method("data-parallel", None), LOCAL))
    assert local.losses == pytest.approx(everybody.losses, rel=1e-4)
    assert [4 * sent for sent in local.sent] == everybody.sent == [8 * 200, 16 * 200, 32 * 200]
    alone = run(Quadratic(50), LOCAL, 1, 32)
    assert alone.sent == [0, 0, 0]
    assert alone.losses[-1] != local.losses[-1]


def test_workers_of_the_text_start_alike_and_see_other_batches() -> None:
    text = workers.Text(width=8, layers=1, context=8, batch=2, max_bytes=1 << 18)
    first, second = text.replicas(2)
    assert all(torch.equal(p, q) for p, q in zip(first.params, second.params, strict=True))
    for replica in (first, second):
        replica.differentiate()
    assert any(not torch.equal(p.grad, q.grad) for p, q in zip(first.params, second.params, strict=True))
    again = text.replicas(1)[0]
    again.differentiate()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(first.params, again.params, strict=True))


def test_the_loss_is_told_where_the_workers_agree() -> None:
    with pytest.raises(ValueError, match="multiple of k=4, got 20"):
        run(Quadratic(5), LOCAL, 2, 20)


@pytest.mark.slow
def test_it_prints_loss_against_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert workers.main(["--quick"]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    for table, title, counts in zip(tables, ("Noisy quadratic", "GPT"), ("14", "12"), strict=False):
        lines = table.splitlines()
        assert title in lines[0]
        for count in counts:
            of_count = [line for line in lines if line.split()[0] == count]
            assert len(of_count) == len(workers.METHODS)
            assert all(len(line.split("  ")) > 6 for line in of_count)
