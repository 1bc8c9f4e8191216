"""The rows of a stored sampler from its differences, and back, and as columns of a step's table.

`solver_tables` says what the two are.
"""

from collections.abc import Sequence

import torch

from .multistep import multistep_weights
from .sigmas import sigma_eta
from .solver_tables import SOLVER_BASE, SolverTable
from .transition import direction


def analytic_steps(
    timesteps: Sequence[int], alpha_bar: torch.Tensor, alpha_bar_end: float, eta: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the analytic steps of `SOLVER_BASE`, x_{i+1} = a_i x_i + sum_j b_ij x0_j + std_i z.

    Args:
        timesteps: S of them, strictly decreasing.
        alpha_bar: of the process, float64 (T,).
        alpha_bar_end: where the last step lands.
        eta: the member.

    Returns:
        a (S,), b (S, S) and std (S,), float64.
    """
    a_t = alpha_bar[list(timesteps)]
    a_s = torch.cat([a_t[1:], a_t.new_tensor([alpha_bar_end])])
    std = sigma_eta(a_t, a_s, eta)
    carry = direction(a_s, std) / (1 - a_t).sqrt()
    solver = SOLVER_BASE
    weights = multistep_weights(
        solver["solver_form"],
        solver["solver_order"],
        a_t,
        a_s,
        std,
        solver["solver_corrector"],
        solver["lower_order_final"],
        solver["solver_variable"],
        solver["solver_weights"],
        solver["solver_corrector_order"],
    )
    own = torch.diag(a_s.sqrt() - carry * a_t.sqrt())
    memory = weights.shape[2]
    for i in range(len(a_t)):
        for j in range(1, min(i, memory) + 1):
            weight = weights[min(i, memory), i, j - 1]
            own[i, i - j] += weight
            own[i, i] -= weight
    return carry, own, std


def full_rows(
    table_weights: Sequence[Sequence[float]], carry: torch.Tensor, own: torch.Tensor
) -> list[torch.Tensor]:
    """Return the rows c_i of a deterministic sampler, float64, from the stored differences.

    Args:
        table_weights: S rows of differences.
        carry: a of `analytic_steps`.
        own: b of `analytic_steps`.
    """
    state = carry.new_tensor([1.0])
    rows = []
    for i, differences in enumerate(table_weights):
        row = carry.new_tensor(list(differences))
        row[:-1] += carry[i] * state
        row[1:] += own[i, : i + 1]
        rows.append(row)
        state = row
    return rows


def differences_of(
    rows: Sequence[torch.Tensor], carry: torch.Tensor, own: torch.Tensor
) -> list[torch.Tensor]:
    """Return what is stored of the rows c_i of a deterministic sampler: `full_rows`, undone."""
    state = carry.new_tensor([1.0])
    found = []
    for i, row in enumerate(rows):
        differences = row.clone()
        differences[:-1] -= carry[i] * state
        differences[1:] -= own[i, : i + 1]
        found.append(differences)
        state = row
    return found


def difference_columns(
    table: SolverTable, num_train_timesteps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns of the differences, (T, S + 1), and the place of each timestep, (T,).

    The columns are the weights of x_T and of the predictions, the newest first. The place is i for
    the planned timestep i, and -1 for every other.
    """
    calls = len(table.timesteps)
    columns = torch.zeros(num_train_timesteps, calls + 1, dtype=torch.float64, device="cpu")
    place = torch.full((num_train_timesteps,), -1, dtype=torch.int64, device="cpu")
    for i, (t, row) in enumerate(zip(table.timesteps, table.weights, strict=True)):
        newest_first = [row[0], *row[:0:-1]]
        columns[t, : i + 2] = torch.tensor(newest_first, dtype=torch.float64, device="cpu")
        place[t] = i
    return columns, place
