"""The trainer: `train(config)`, or `python -m ddim_schedulers.training.train --config FILE`.

Under `accelerate launch -m` or `torchrun -m` the same module trains on several devices. How a step
is kept the same on any number of processes: `batches.py`. What a checkpoint holds:
`checkpoints.py`.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ddim_schedulers.training.common.failures import sentence
from ddim_schedulers.training.config import TrainingConfig

if TYPE_CHECKING:
    from ddim_schedulers.training.trainer.result import TrainingResult


def train(config: TrainingConfig) -> "TrainingResult":
    """Train as `config` says, from the start or from a checkpoint.

    Returns:
        Where the pipeline is, the averaged network, the loss of every step, and what else happened.

    Raises:
        ValueError: bad settings or data, before training begins.
        CheckpointError: a checkpoint cannot be written (the last good one is kept), or no
            checkpoint can be read.
        NonFiniteError: a step was not finite and `on_nonfinite` is 'stop'. The step was not
            applied.
        FolderInUseError: another process owns the folder.
    """
    from ddim_schedulers.training.common.processes import settle
    from ddim_schedulers.training.trainer.saving import push
    from ddim_schedulers.training.trainer.trainer import open_trainer

    try:
        with open_trainer(config) as trainer:
            result = trainer.run()
    finally:
        settle()
    push(trainer, result.pipeline_dir)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; see `--help`.

    Returns:
        0 if the run is complete or was stopped on request, 1 if it failed.

    Raises:
        ValueError: bad settings or data.
    """
    from ddim_schedulers.training.parsing import parse_args

    config, dry_run = parse_args(sys.argv[1:] if argv is None else argv)
    from ddim_schedulers.training.common.processes import settle
    from ddim_schedulers.training.networks.checkpoints import CheckpointError
    from ddim_schedulers.training.trainer.result import NonFiniteError
    from ddim_schedulers.training.trainer.saving import push
    from ddim_schedulers.training.trainer.trainer import open_trainer

    pipeline_dir: Path | None = None
    try:
        with open_trainer(config, owns=not dry_run) as trainer:
            if dry_run:
                from ddim_schedulers.training.trainer.dry_run import report

                lines = report(trainer)
            else:
                result = trainer.run()
                lines, pipeline_dir = result.summary(), result.pipeline_dir
    except (CheckpointError, NonFiniteError) as error:
        print(f"ddim-schedulers train: {error}", file=sys.stderr)
        return 1
    finally:
        settle()
    if trainer.accelerator.is_main_process:
        print(lines)
    trainer.accelerator.end_training()
    push(trainer, pipeline_dir)  # at the end: the other processes have ended
    return 0


class _Callable(ModuleType):
    """This module, which `ddim_schedulers.training.train` names as well as the function."""

    def __call__(self, config: TrainingConfig) -> "TrainingResult":
        return train(config)

    __call__.__doc__ = train.__doc__


sys.modules[__name__].__class__ = _Callable


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"{Path(sys.argv[0]).stem}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{Path(sys.argv[0]).stem}: error: {sentence(error)}", file=sys.stderr)
        sys.exit(1)
