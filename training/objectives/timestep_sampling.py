"""Which t a step trains on: uniform, stratified, or in proportion to the size of its loss.

The random part is `u` in [0, 1), drawn with the batch (`batches.py`; for stratified sampling it is
already spread evenly over the global batch). Here u becomes t by inverting the distribution
function, so that what is drawn never depends on how the batch is divided over processes.
"""

import torch


class UniformTimesteps:
    """t = floor(u T): every timestep alike, for `uniform` and `stratified`."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def draw(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw timesteps (B,) int64; return them and the weights of their losses (None: all 1)."""
        return (u * self.steps).long().clamp_(max=self.steps - 1), None

    def update(self, t: torch.Tensor, loss: torch.Tensor) -> None:
        """Do nothing: there is nothing to learn."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Do nothing: there is nothing to restore."""


class LossAwareTimesteps:
    """Importance sampling p_t ~ sqrt(E[L_t^2]) (Improved DDPM, arXiv:2102.09672, Eq. 18).

    E is the mean over the last `history` losses seen at t. Until every t has that many, t is
    uniform. A share `uniform` of the draws stays uniform, and the losses are weighted by 1 / (T
    p_t), which keeps their expectation. All of it stays on the device; nothing is read back.

    Args:
        steps: T.
        history: losses kept for each t.
        uniform: share of uniform draws, in [0, 1).
        device: where the tables live.
    """

    def __init__(
        self, steps: int, history: int, uniform: float, device: torch.device | str = "cpu"
    ) -> None:
        self.steps, self.history, self.uniform = steps, history, uniform
        # One row and one column more than needed: what must not be kept is written there.
        self.losses = torch.zeros(steps + 1, history, dtype=torch.float64, device=device)
        self.seen = torch.zeros(steps + 1, dtype=torch.int64, device=device)

    def probabilities(self) -> torch.Tensor:
        """Return p, (T,) float64, with the sum 1."""
        size = self.losses[:-1].square().mean(1).sqrt()
        even = torch.full_like(size, 1 / self.steps)
        total = size.sum()
        learned = size / torch.where(total > 0, total, torch.ones_like(total))
        p = torch.where(total > 0, (1 - self.uniform) * learned + self.uniform * even, even)
        return torch.where((self.seen[:-1] >= self.history).all(), p, even)

    def draw(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw timesteps (B,) int64 from p; return them and the weights 1 / (T p_t), float64."""
        p = self.probabilities()
        edges = p.cumsum(0)
        t = torch.searchsorted(edges, u * edges[-1], right=True).clamp_(max=self.steps - 1)
        return t, 1 / (self.steps * p[t])

    def update(self, t: torch.Tensor, loss: torch.Tensor) -> None:
        """Take the losses (n,) seen at t (n,), in the order of the global batch.

        Losses that are not finite are left out.
        """
        dump = torch.full_like(t, self.steps)
        finite = torch.isfinite(loss)
        t = torch.where(finite, t, dump)
        loss = torch.where(finite, loss, torch.zeros_like(loss)).to(torch.float64)
        order = torch.argsort(t, stable=True)
        t, loss = t[order], loss[order]
        count = torch.zeros_like(self.seen).scatter_add_(0, t, torch.ones_like(t))
        first = count.cumsum(0) - count
        rank = torch.arange(len(t), device=t.device) - first[t]
        # Of more than `history` losses at one t the last ones stay; every slot is written once.
        kept = rank >= count[t] - self.history
        slot = (self.seen[t] + rank) % self.history
        row = torch.where(kept, t, torch.full_like(t, self.steps))
        self.losses[row, slot] = torch.where(kept, loss, torch.zeros_like(loss))
        self.seen += count
        self.losses[-1].zero_()
        self.seen[-1].zero_()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the tables; equal on all processes, because every process takes all losses."""
        return {"losses": self.losses, "seen": self.seen}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the tables in place."""
        self.losses.copy_(state["losses"])
        self.seen.copy_(state["seen"])


TimestepSampler = UniformTimesteps | LossAwareTimesteps


def make_timestep_sampler(
    kind: str, steps: int, history: int, uniform: float, device: torch.device | str
) -> TimestepSampler:
    """Return the sampler that the setting `timestep_sampling` names (checked by the config)."""
    if kind == "loss_aware":
        return LossAwareTimesteps(steps, history, uniform, device)
    return UniformTimesteps(steps)
