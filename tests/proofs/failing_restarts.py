"""Starts a run again and again that fails on steps that are not finite; no good checkpoint may go.

python tests/proofs/failing_restarts.py --restarts 20
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from ddim_schedulers.training import train
from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.networks import checkpoints
from ddim_schedulers.training.trainer.result import NonFiniteError
from ddim_schedulers.training.trainer.trainer import Trainer

torch.set_num_threads(1)
BROKEN_FROM = 8
real = Trainer._loss


def broken(self, *args):
    return real(self, *args) * (torch.nan if self.step >= BROKEN_FROM else 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restarts", type=int, default=20)
    args = parser.parse_args()
    Trainer._loss = broken
    survived = tried = 0
    for on_nonfinite, good in (("stop", {6, 8}), ("count", {6})):
        with tempfile.TemporaryDirectory() as folder:
            config = TrainingConfig(
                output_dir=folder,
                cpu=True,
                batch_size=4,
                max_train_steps=1000,
                log_every=2,
                checkpoint_every=2,
                keep_last=2,
                resume="latest",
                progress_bar=False,
                on_nonfinite=on_nonfinite,
                nonfinite_limit=6,
            )
            for _ in range(args.restarts):
                tried += 1
                try:
                    train.train(config)
                except NonFiniteError:
                    found = checkpoints.listed(Path(folder) / "checkpoints")
                    whole = {checkpoints.step_of(p) for p in found if not checkpoints.verify(p)}
                    survived += good <= whole and len(found) == 2
        print(f"{on_nonfinite}: {survived} of {tried}", flush=True)
    return int(survived != tried)


if __name__ == "__main__":
    sys.exit(main())
