r"""A table of S steps that follows a fine trajectory: least squares step by step, then all at once.

The table is that of `ddim_schedulers.solver_tables`: x_{i+1} = c_i . [x_T, x0_0, ..., x0_i]. It is
fitted in two parts (cf. BNS, arXiv:2403.01329, and S4S, arXiv:2502.17423, which descend gradients):

1. `greedy`: along its own rollout each row is the least-squares fit of the fine trajectory's state
   on the basis, with a ridge toward the row of DDIM's step.
2. `improve`: Levenberg-Marquardt on the end points, over the weights, in directions of the basis
   that are orthonormal over the samples, and over the timesteps. Derivatives are finite differences
   that run the sampler again from the changed step on, so that any network will do.

A few samples begin near a border between two images, and their error is a hundred times that of the
others. A mean of squares is decided by them, differently with every noise. So the mean of a root of
each sample's error is lowered, with weights that are computed again in each iteration.

Samples come in chunks. Whatever is summed over samples is summed within each chunk, then over the
chunks in their order, so that the numbers do not depend on who computes which chunk.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

Tensors = dict[str, torch.Tensor]
# Of (x, t, the chunk of x): x0_hat before any clipping, in the shape and dtype of x.
Predict = Callable[[torch.Tensor, int, int], torch.Tensor]
# Of (what is computed, how of one chunk): the results of all chunks, in order.
Over = Callable[[str, Callable[[int], Tensors]], list[Tensors]]

# Of a step of the table: a direction of its weights, or a shift of its timestep.
Move = tuple[int, torch.Tensor | int]

END = -1
# Below it a sample's weight does not grow any more.
LEAST_ERROR = 1e-12


class Chunk(NamedTuple):
    """Samples that are computed together, (B, ...).

    Attributes:
        x_T: where they start.
        states: of the fine trajectory, by timestep; `END` is its end point.
    """

    x_T: torch.Tensor
    states: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Constants:
    """What the two parts use.

    Attributes:
        power: of each sample's mean squared error, whose mean is lowered; 1 for the mean squared
            error of all, less for less weight of the samples that are furthest off.
        ridge: of the least squares, as a share of each regressor's mean square.
        least_share: directions whose eigenvalue is below this share of the largest are left out.
        nudge: of a weight's direction, in the deviation that it gives a state.
        shift: of a timestep, for its derivative.
        most_shift: that a timestep moves in an iteration.
        damping: the first, of derivatives per unit of a direction and per 100 timesteps.
        iterations: at most.
        least_gain: the share of the loss that an iteration must take off for another to follow.
    """

    power: float = 0.5
    ridge: float = 1e-6
    least_share: float = 1e-6
    nudge: float = 0.04
    shift: int = 10
    most_shift: int = 60
    damping: float = 1e-3
    iterations: int = 8
    least_gain: float = 0.02


class Table(NamedTuple):
    """A sampler: its timesteps and its rows c_i, float64 on the CPU, and its `Fit.loss`."""

    timesteps: list[int]
    rows: list[torch.Tensor]
    loss: float


class Rollout:
    """The run of a table from the x_T of a chunk; a changed table runs again from the change on."""

    def __init__(
        self, predict: Predict, clip: float | None, x_T: torch.Tensor, chunk: int = 0
    ) -> None:
        self.predict, self.clip, self.chunk = predict, clip, chunk
        self.timesteps: list[int] = []
        self.rows: list[torch.Tensor] = []
        self.states = [x_T]
        self.x0s: list[torch.Tensor] = []

    def x0(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Return x0_hat of x at t, clipped if the sampler clips."""
        x0 = self.predict(x, t, self.chunk)
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def follow(self, timesteps: Sequence[int], rows: Sequence[torch.Tensor]) -> None:
        """Run the first steps of a table; `x0s` then reaches to the step after the last row."""
        same = 0
        known = zip(self.timesteps, timesteps, self.rows, rows, strict=False)
        for t, other_t, row, other in known:
            if t != other_t or not torch.equal(row, other):
                break
            same += 1
        # the prediction of the step whose row alone has changed is still that of its timestep
        keep = same
        if len(timesteps) > same < len(self.x0s) and self.timesteps[same] == timesteps[same]:
            keep += 1
        del self.x0s[keep:], self.states[same + 1 :], self.rows[same:]
        self.timesteps = list(timesteps)
        for i in range(same, len(rows)):
            self._predict_at(i)
            self.rows.append(rows[i])
            self.states.append(combine(rows[i], [self.states[0], *self.x0s[: i + 1]]))
        if len(timesteps) > len(rows):
            self._predict_at(len(rows))

    def _predict_at(self, i: int) -> None:
        if len(self.x0s) == i:
            self.x0s.append(self.x0(self.states[i], self.timesteps[i]))

    def end_from(
        self, x: torch.Tensor, timesteps: Sequence[int], rows: Sequence[torch.Tensor], start: int
    ) -> torch.Tensor:
        """Return where a table ends that goes on from the state x before step `start`.

        Several states of the chunk may be side by side in x.
        """
        times = len(x) // len(self.states[0])
        x_T, *x0s = (torch.cat([part] * times) for part in [self.states[0], *self.x0s[:start]])
        for i in range(start, len(rows)):
            x0s.append(self.x0(x, timesteps[i]))
            x = combine(rows[i], [x_T, *x0s])
        return x


def combine(weights: torch.Tensor, basis: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the basis, each times its weight."""
    out = basis[0] * float(weights[0])
    for weight, part in zip(weights[1:].tolist(), basis[1:], strict=True):
        out.add_(part, alpha=weight)
    return out


def _flat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([part.flatten() for part in parts]).double()


class Fit:
    """Fits the table of one number of calls with one clipping.

    Args:
        label: of what it computes, for `over`.
        predict: the network.
        alpha_bar: of the process, float64 (T,) on the CPU.
        alpha_bar_end: where the last step lands.
        clip: limit of |x0_hat| in every step, None for none.
        limit: that end points are clamped to before they are compared, None for none.
        chunks: how many there are.
        chunk: makes one.
        over: computes something of every chunk.
        constants: of the method.
        progress: called with a line of text after each iteration.
        tick: called with a line of text much more often.
        most: samples that the network takes at once; derivatives are computed side by side as far
            as it allows.
    """

    def __init__(
        self,
        label: str,
        predict: Predict,
        alpha_bar: torch.Tensor,
        alpha_bar_end: float,
        clip: float | None,
        limit: float | None,
        chunk: Callable[[int], Chunk],
        over: Over,
        constants: Constants | None = None,
        progress: Callable[[str], object] = lambda line: None,
        tick: Callable[[str], object] = lambda line: None,
        most: int = 1,
    ) -> None:
        self.label, self.predict, self.clip, self.limit = label, predict, clip, limit
        self.alpha_bar, self.alpha_bar_end = alpha_bar, alpha_bar_end
        self.chunk, self.over = chunk, over
        self.constants = Constants() if constants is None else constants
        self.progress, self.tick, self.most = progress, tick, most
        self._rollouts: dict[int, Rollout] = {}
        self._count, self._damping = 0, self.constants.damping

    def _rollout(self, c: int) -> Rollout:
        if c not in self._rollouts:
            self._rollouts[c] = Rollout(self.predict, self.clip, self.chunk(c).x_T, c)
        return self._rollouts[c]

    def _sum(self, what: str, make: Callable[[int], Tensors]) -> Tensors:
        """Return the sum over all chunks; each sum has a name of its own."""
        self._count += 1
        found = self.over(f"{self.label}-{self._count:03d}-{what}", make)
        return {name: torch.stack([part[name] for part in found]).sum(0) for name in found[0]}

    def _clamped(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.limit is None else x.clamp(-self.limit, self.limit)

    def _miss(self, c: int, end: torch.Tensor) -> torch.Tensor:
        """Return how far clamped end points are from those of the fine trajectory."""
        goal = self.chunk(c).states[END]
        return (self._clamped(goal) - self._clamped(end)).double()

    def loss(self, timesteps: Sequence[int], rows: Sequence[torch.Tensor]) -> float:
        """Return the power mean of the samples' mean squared errors at a table's end points."""
        power = self.constants.power

        def of(c: int) -> Tensors:
            rollout = self._rollout(c)
            rollout.follow(timesteps, rows)
            powers = _errors(self._miss(c, rollout.states[-1])).pow(power)
            count = torch.tensor(float(len(powers)), dtype=torch.float64)
            return {"powers": powers.sum().cpu(), "count": count}

        total = self._sum("loss", of)
        return float(total["powers"] / total["count"]) ** (1 / power)

    def greedy(self, timesteps: Sequence[int]) -> Table:
        """Fit row after row to the states of the fine trajectory, which must be there."""
        rows: list[torch.Tensor] = []
        levels = [float(self.alpha_bar[t]) for t in timesteps] + [self.alpha_bar_end]
        for i in range(len(timesteps)):
            target = timesteps[i + 1] if i + 1 < len(timesteps) else END

            def of(c: int, i: int = i, target: int = target) -> Tensors:
                rollout = self._rollout(c)
                rollout.follow(timesteps[: i + 1], rows)
                basis = _flat([rollout.states[0], *rollout.x0s[: i + 1]])
                state = self.chunk(c).states[target].flatten().double()
                count = torch.tensor(float(len(state)), dtype=torch.float64)
                gram, moment = (basis @ basis.T).cpu(), (basis @ state).cpu()
                return {"gram": gram, "moment": moment, "count": count}

            total = self._sum("row", of)
            gram, moment = total["gram"] / total["count"], total["moment"] / total["count"]
            prior = _ddim_row(rows[-1] if rows else None, levels[i], levels[i + 1])
            damped = gram + self.constants.ridge * torch.diag(gram.diagonal())
            # a regressor may be 0, as x0_hat at zero terminal SNR of data with mean 0
            gain = torch.linalg.lstsq(damped, (moment - gram @ prior)[:, None], driver="gelsd")
            rows.append(prior + gain.solution[:, 0])
        return Table(list(timesteps), rows, self.loss(timesteps, rows))

    def improve(self, table: Table, iterations: int) -> Table:
        """Minimise the error of the end points, as long as an iteration gains enough."""
        for _ in range(iterations):
            moves = self._moves(table)
            normal, gradient = self._normal_equations(table, moves)
            unit, best = torch.eye(len(normal), dtype=torch.float64), None
            for factor in (1.0, 10.0, 100.0):
                tried = self._damping * factor
                step = torch.linalg.solve(normal + tried * unit, gradient)
                new = self._moved(table, moves, step)
                if new is not None and (best is None or new.loss < best.loss):
                    best, worked = new, tried
                if best is not None and best.loss < 0.95 * table.loss:
                    break
            if best is None or not best.loss < table.loss:
                break
            self.progress(f"error {table.loss:.3g} -> {best.loss:.3g}")
            gained, self._damping = 1 - best.loss / table.loss, worked / 3
            table = best
            if gained < self.constants.least_gain:
                break
        return table

    def _moves(self, table: Table) -> list[Move]:
        """Return what is changed, by step: directions of its weights, and its timestep's shift."""

        def of(c: int) -> Tensors:
            rollout = self._rollout(c)
            rollout.follow(table.timesteps, table.rows)
            basis = _flat([rollout.states[0], *rollout.x0s])
            count = torch.tensor(float(basis.shape[1]), dtype=torch.float64)
            return {"gram": (basis @ basis.T).cpu(), "count": count}

        total = self._sum("gram", of)
        gram = total["gram"] / total["count"]
        moves: list[Move] = []
        for i, t in enumerate(table.timesteps):
            values, vectors = torch.linalg.eigh(gram[: i + 2, : i + 2])
            kept = values > self.constants.least_share * values.max()
            moves += [(i, v) for v in (vectors[:, kept] / values[kept].sqrt()).T]
            if i:
                below = table.timesteps[i + 1] if i + 1 < len(table.timesteps) else -1
                down = t - self.constants.shift > below
                up = t + self.constants.shift < table.timesteps[i - 1]
                if down or up:
                    moves.append((i, -self.constants.shift if down else self.constants.shift))
        return moves

    def _normal_equations(
        self, table: Table, moves: Sequence[Move]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return J J^T and J r, weighted means over all entries of the end points.

        J has a row for each of `moves`. A sample's weight is the derivative of its part of `loss`
        by its mean squared error, but for a factor.
        """

        def of(c: int) -> Tensors:
            rollout = self._rollout(c)
            rollout.follow(table.timesteps, table.rows)
            end = self._clamped(rollout.states[-1])
            rows: list[torch.Tensor] = []
            for group in _groups(moves, max(1, self.most // len(end))):
                moved = self._moved_ends(rollout, table, group)
                for (_, change), x in zip(group, moved.split(len(end)), strict=True):
                    size = change / 100 if isinstance(change, int) else self.constants.nudge
                    rows.append(((self._clamped(x) - end) / size).flatten())
                self.tick(f"derivative {len(rows)} of {len(moves)}, chunk {c + 1}")
            jacobian, miss = _flat(rows), self._miss(c, rollout.states[-1])
            weights = _errors(miss).clamp(min=LEAST_ERROR).pow(self.constants.power - 1)
            weights = weights.repeat_interleave(miss[0].numel())
            weighted = jacobian * weights
            normal, gradient = (weighted @ jacobian.T).cpu(), (weighted @ miss.flatten()).cpu()
            return {"normal": normal, "gradient": gradient, "count": weights.sum().cpu()}

        total = self._sum("derivatives", of)
        return total["normal"] / total["count"], total["gradient"] / total["count"]

    def _moved_ends(self, rollout: Rollout, table: Table, group: Sequence[Move]) -> torch.Tensor:
        """Return the ends after each move of a group, which all change the same step, in a row."""
        i, change = group[0]
        timesteps = list(table.timesteps)
        if isinstance(change, int):
            timesteps[i] += change
            return rollout.end_from(rollout.states[i], timesteps, table.rows, i)
        basis = [rollout.states[0], *rollout.x0s[: i + 1]]
        x = torch.cat(
            [
                rollout.states[i + 1] + combine(torch.as_tensor(v) * self.constants.nudge, basis)
                for _, v in group
            ]
        )
        return rollout.end_from(x, timesteps, table.rows, i + 1)

    def _moved(self, table: Table, moves: Sequence[Move], step: torch.Tensor) -> Table | None:
        """Return the table after a step, or None where its timesteps do not decrease."""
        rows, timesteps = [row.clone() for row in table.rows], list(table.timesteps)
        most = self.constants.most_shift
        for amount, (i, change) in zip(step.tolist(), moves, strict=True):
            if not math.isfinite(amount):
                return None
            if isinstance(change, int):
                timesteps[i] += round(max(-most, min(most, 100 * amount)))
            else:
                rows[i] += amount * change
        if any(t <= s for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True)):
            return None
        return Table(timesteps, rows, self.loss(timesteps, rows))


def _errors(miss: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each sample."""
    return miss.square().flatten(1).mean(1)


def _groups(moves: Sequence[Move], most: int) -> list[list[Move]]:
    """Put directions of the same step together, at most so many; a shift is alone."""
    groups: list[list[Move]] = []
    for i, change in moves:
        last = groups[-1] if groups else []
        alone = isinstance(change, int) or not last or isinstance(last[0][1], int)
        if alone or last[0][0] != i or len(last) == most:
            groups.append([(i, change)])
        else:
            last.append((i, change))
    return groups


def _ddim_row(before: torch.Tensor | None, alpha_bar_t: float, alpha_bar_s: float) -> torch.Tensor:
    """Return the row of DDIM's step, x_s = r x_t + (sqrt(abar_s) - r sqrt(abar_t)) x0_hat."""
    r = math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t))
    state = torch.ones(1, dtype=torch.float64) if before is None else before
    own = state.new_tensor([math.sqrt(alpha_bar_s) - r * math.sqrt(alpha_bar_t)])
    return torch.cat([r * state, own])
