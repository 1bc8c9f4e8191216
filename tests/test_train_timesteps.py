"""How timesteps are drawn: uniform, stratified, in proportion to the loss."""

from collections import defaultdict

import pytest
import torch

from ddim_schedulers.training.data.batches import Draws
from ddim_schedulers.training.objectives.timestep_sampling import (
    LossAwareTimesteps,
    UniformTimesteps,
    make_timestep_sampler,
)


def test_uniform_covers_all_timesteps_alike():
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    t, weight = UniformTimesteps(8).draw(u)
    assert t.dtype == torch.int64 and weight is None
    assert torch.bincount(t).tolist() == [500] * 8
    # u just below 1 times T rounds to T in floating point; it must not leave the range.
    assert (
        int(UniformTimesteps(10**5).draw(torch.tensor([1 - 2**-53], dtype=torch.float64))[0])
        == 99999
    )


def test_stratified_puts_one_draw_into_each_interval_in_random_order():
    draws = Draws(0, 16, True, False, False)
    u = draws.small(3)[0]
    assert sorted((u * 16).long().tolist()) == list(range(16))
    assert (u * 16).long().tolist() != list(range(16))
    plain = Draws(0, 16, False, False, False).small(3)[0]
    assert sorted((plain * 16).long().tolist()) != list(range(16))


def reference(updates, history):
    """Improved DDPM's code in words: the last `history` losses at each t, oldest dropped."""
    kept = defaultdict(list)
    for t, loss in updates:
        kept[t] = [*kept[t], loss][-history:]
    return kept


@pytest.mark.parametrize("history", [1, 3])
def test_history_keeps_the_last_losses_at_each_t(history):
    random = torch.Generator().manual_seed(0)
    sampler, updates = LossAwareTimesteps(5, history, 0.1), []
    for _ in range(7):
        t = torch.randint(0, 5, (12,), generator=random)
        loss = torch.rand(12, generator=random, dtype=torch.float64)
        loss[4] = torch.nan  # is left out
        sampler.update(t, loss)
        updates += [
            (int(a), float(b)) for n, (a, b) in enumerate(zip(t, loss, strict=True)) if n != 4
        ]
    kept = reference(updates, history)
    for t in range(5):
        assert sorted(sampler.losses[t].tolist()) == pytest.approx(sorted(kept[t]))
    assert sampler.seen[:-1].tolist() == [sum(a == t for a, _ in updates) for t in range(5)]


def test_probabilities_are_those_of_the_paper():
    sampler = LossAwareTimesteps(3, 2, 0.1)
    sampler.update(torch.tensor([0, 1, 2]), torch.tensor([3.0, 0.0, 1.0]))
    assert sampler.probabilities().tolist() == pytest.approx([1 / 3] * 3)  # not yet enough
    sampler.update(torch.tensor([0, 1, 2]), torch.tensor([4.0, 0.0, 1.0]))
    size = torch.tensor([12.5**0.5, 0.0, 1.0], dtype=torch.float64)  # sqrt of the mean square
    expected = 0.9 * size / size.sum() + 0.1 / 3
    torch.testing.assert_close(sampler.probabilities(), expected)


def test_weighted_losses_have_the_uniform_expectation():
    sampler = LossAwareTimesteps(4, 1, 0.05)
    losses = torch.tensor([5.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    sampler.update(torch.arange(4), losses)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t, weight = sampler.draw(u)
    share = torch.bincount(t, minlength=4) / len(u)
    torch.testing.assert_close(share.double(), sampler.probabilities(), atol=1e-5, rtol=0)
    assert float((losses[t] * weight).mean()) == pytest.approx(float(losses.mean()), rel=1e-4)
    assert abs(float(losses[t].mean()) - float(losses.mean())) > 0.5  # without weights it is biased


def test_all_losses_zero_fall_back_to_uniform():
    sampler = LossAwareTimesteps(4, 1, 0.0)
    sampler.update(torch.arange(4), torch.zeros(4))
    assert sampler.probabilities().tolist() == [0.25] * 4


def test_state_comes_back():
    sampler = make_timestep_sampler("loss_aware", 4, 2, 0.1, "cpu")
    sampler.update(torch.arange(4), torch.rand(4))
    other = make_timestep_sampler("loss_aware", 4, 2, 0.1, "cpu")
    other.load_state_dict({k: v.clone() for k, v in sampler.state_dict().items()})
    assert torch.equal(other.losses, sampler.losses) and torch.equal(other.seen, sampler.seen)
    assert make_timestep_sampler("stratified", 4, 2, 0.1, "cpu").state_dict() == {}
