"""A replica in a stack is what it is alone, a network is what its name says, and each can learn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.evidence.networks.autoencoders import Autoencoder, VariationalAutoencoder
from bench.evidence.networks.classifiers import ConvNet
from bench.evidence.networks.lstm import LSTM
from bench.evidence.networks.stack import Batch, Network, starts
from bench.evidence.networks.transformers import GPT, Masked

NETWORKS: dict[str, Network] = {
    "conv": ConvNet(8, (4, 6), (1, 2)),
    "lstm": LSTM(vocabulary=11, embedding=5, width=6),
    "gpt": GPT(vocabulary=11, width=8, layers=2, heads=2, context=9),
    "masked": Masked(vocabulary=11, width=8, layers=2, heads=2, context=9),
    "autoencoder": Autoencoder(size=8, channels=4, code=3),
    "variational": VariationalAutoencoder(size=8, channels=4, code=3),
}
SEEDS = (5, 6, 7)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch_for(kind: str, replicas: int) -> Batch:
    generator = torch.Generator().manual_seed(3)

    def text(*shape: int, high: int = 11) -> Tensor:
        return torch.randint(high, (replicas, *shape), generator=generator)

    if kind == "conv":
        return torch.rand(replicas, 4, 1, 8, 8, generator=generator), text(4, high=10)
    if kind in ("lstm", "gpt"):
        return (text(4, 8),)
    if kind == "masked":
        return text(4, 8), text(4, 2, high=8), text(4, 2)
    patches = torch.rand(replicas, 4, 3, 8, 8, generator=generator)
    return (patches,) if kind == "autoencoder" else (patches, torch.randn(replicas, 4, 3, generator=generator))


def gradients(network: Network, parameters: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: p.double().requires_grad_() for name, p in parameters.items()}
    wide = tuple(part.double() if part.is_floating_point() else part for part in batch)
    losses = network.losses(leaves, wide)
    return losses.detach(), dict(zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values())), strict=True))


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_no_replica_sees_another(kind: str) -> None:
    network, batch = NETWORKS[kind], batch_for(kind, len(SEEDS))
    losses, together = gradients(network, starts(network, SEEDS), batch)
    assert len(set(losses.tolist())) == len(SEEDS)
    for r, seed in enumerate(SEEDS):
        loss, alone = gradients(network, starts(network, [seed]), tuple(part[r : r + 1] for part in batch))
        assert losses[r].item() == pytest.approx(loss.item(), rel=1e-9)
        for name, gradient in alone.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(together[name][r : r + 1], gradient, rtol=1e-7, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_a_replica_that_diverged_takes_no_other_with_it(kind: str) -> None:
    network, batch = NETWORKS[kind], batch_for(kind, len(SEEDS))
    parameters = starts(network, SEEDS)
    _, sound = gradients(network, parameters, batch)
    for p in parameters.values():
        p[1] = torch.nan
    losses, broken = gradients(network, parameters, batch)
    assert losses.isfinite().tolist() == [True, False, True]
    for name, gradient in sound.items():
        for r in (0, 2):
            torch.testing.assert_close(broken[name][r], gradient[r], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_only_matrices_have_two_dimensions(kind: str) -> None:
    network = NETWORKS[kind]
    one = network.start(torch.Generator().manual_seed(1))
    assert network.hidden <= one.keys()
    for name, p in one.items():
        assert (p.ndim == 2 and 1 not in p.shape) if name in network.hidden else p.ndim >= 2, name


def test_the_lstm_is_torchs() -> None:
    network, (text,) = LSTM(vocabulary=11, embedding=5, width=6), batch_for("lstm", 1)
    parameters = {name: p.double() for name, p in starts(network, [1]).items()}
    torchs = nn.LSTM(5, 6, batch_first=True).double()

    def reordered(p: Tensor) -> Tensor:  # enter, forget, leave, new to torch's enter, forget, new, leave
        enter, forget, leave, new = (p[0][..., at : at + 6] for at in range(0, 24, 6))
        return torch.cat([enter, forget, new, leave], -1).T

    with torch.no_grad():
        weights = (
            reordered(parameters["input"]),
            reordered(parameters["recurrent"]),
            reordered(parameters["bias"])[:, 0],
        )
        for theirs, ours in zip(torchs.parameters(), [*weights, torch.zeros(24)], strict=True):
            theirs.copy_(ours)
        states, _ = torchs(parameters["token"][0][text[0]])
        expected = states @ parameters["output"][0] + parameters["output_bias"][0]
    torch.testing.assert_close(network.logits(parameters, text)[0], expected)


def test_attention_is_heads_of_softmax_and_looks_where_it_may() -> None:
    (text,) = batch_for("gpt", 1)
    other = text.clone()
    other[..., -1] = (text[..., -1] + 1) % 11
    for kind, sees_ahead in (("gpt", False), ("masked", True)):
        network = NETWORKS[kind]
        assert isinstance(network, GPT)
        parameters = starts(network, [1])
        changed = (network.features(parameters, text) - network.features(parameters, other)).abs().amax((0, 1, 3))
        assert changed[-1] > 1e-4
        assert bool((changed[:-1] > 1e-6).all()) == sees_ahead
        assert sees_ahead or not changed[:-1].any()


def test_the_masked_model_is_judged_at_the_places_hidden() -> None:
    network, (text, places, hidden) = NETWORKS["masked"], batch_for("masked", 1)
    assert isinstance(network, Masked)
    parameters = starts(network, [1])
    features = network.features(parameters, text)[0]
    logits = torch.stack([features[b, places[0, b]] for b in range(4)]) @ parameters["token"][0].T
    expected = F.cross_entropy(logits.flatten(0, 1), hidden.flatten())
    assert network.losses(parameters, (text, places, hidden)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_scores_are_points_and_squared_errors() -> None:
    conv, batch = NETWORKS["conv"], batch_for("conv", 2)
    assert isinstance(conv, ConvNet)
    parameters = starts(conv, SEEDS[:2])
    right = conv.logits(parameters, batch[0]).argmax(-1)
    batch[1][:] = right
    batch[1][1, 0] = (right[1, 0] + 1) % 10
    assert conv.scores(parameters, batch)["accuracy"].tolist() == [100.0, 75.0]
    plain, patches = NETWORKS["autoencoder"], batch_for("autoencoder", 1)
    assert isinstance(plain, Autoencoder)
    parameters = starts(plain, [1])
    error = (plain.decode(parameters, plain.encode(parameters, patches[0])) - patches[0]).square().mean()
    assert plain.scores(parameters, patches)["error"].item() == pytest.approx(error.item(), rel=1e-5)


def test_the_variational_bound_has_the_divergence_of_its_normals() -> None:
    network, (patches, noise) = NETWORKS["variational"], batch_for("variational", 1)
    assert isinstance(network, VariationalAutoencoder)
    parameters = {name: p.double() for name, p in starts(network, [1]).items()}
    mean, log_variance = network.encode(parameters, patches.double()).chunk(2, -1)
    deviation = (log_variance / 2).exp()
    normal, standard = torch.distributions.Normal(mean, deviation), torch.distributions.Normal(0.0, 1.0)
    drawn = network.decode(parameters, mean + deviation * noise)
    # Of one patch: the log-likelihood's part that depends on the pixels, and the divergence.
    pixels = ((drawn - patches).square() / (2 * 0.1**2)).flatten(2).sum(2)
    divergence = torch.distributions.kl_divergence(normal, standard).sum(2)
    expected = (pixels + divergence).mean() / (3 * 8 * 8)
    found = network.losses(parameters, (patches.double(), noise.double()))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_a_start_is_that_of_its_seed(kind: str) -> None:
    both, second = starts(NETWORKS[kind], [1, 2]), starts(NETWORKS[kind], [2])
    assert all(torch.equal(p[1:], second[name]) for name, p in both.items())
    assert any(not torch.equal(p[0], p[1]) for p in both.values())


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_it_learns_a_batch_by_heart(kind: str) -> None:
    network, batch = NETWORKS[kind], batch_for(kind, 2)
    leaves = {name: p.requires_grad_() for name, p in starts(network, [1, 2]).items()}
    optimizer = torch.optim.Adam(leaves.values(), 0.02)
    before = network.losses(leaves, batch).detach()
    for _ in range(60):
        optimizer.zero_grad()
        network.losses(leaves, batch).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert (network.losses(leaves, batch) < 0.75 * before).all()
