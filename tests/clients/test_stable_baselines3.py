"""stable-baselines3: the class and its arguments in `policy_kwargs`."""

from __future__ import annotations

from pathlib import Path

import pytest
from plain import same_weights, weights

from lookahead_fused import LookaheadAdam

stable_baselines3 = pytest.importorskip("stable_baselines3")


def test_an_agent_learns_saves_and_acts_on_the_slow_weights(tmp_path: Path) -> None:
    agent = stable_baselines3.PPO(
        "MlpPolicy",
        "CartPole-v1",
        n_steps=64,
        batch_size=32,
        n_epochs=3,
        policy_kwargs={"optimizer_class": LookaheadAdam, "optimizer_kwargs": {"k": 4}},
        device="cpu",
        seed=0,
    )
    start = weights(agent.policy)
    agent.learn(64)
    trained, optimizer = weights(agent.policy), agent.policy.optimizer
    assert type(optimizer) is LookaheadAdam
    # torch's Adam in a policy of PPO has the eps that its authors chose; another class has its own.
    assert {group["eps"] for group in optimizer.param_groups} == {1e-8}
    assert not same_weights(start, trained)
    with optimizer.slow_weights():
        assert not same_weights(weights(agent.policy), trained)
        agent.predict(agent.get_env().reset())
    assert same_weights(weights(agent.policy), trained)

    agent.save(tmp_path / "agent")
    loaded = stable_baselines3.PPO.load(tmp_path / "agent", device="cpu")
    assert same_weights(weights(loaded.policy), trained)
    slow = [own["slow_param"] for own in loaded.policy.optimizer.state.values()]
    assert same_weights(slow, [own["slow_param"] for own in optimizer.state.values()])
