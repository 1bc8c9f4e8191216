"""The Accelerate engine of a run: built once, refused where it would not do what it says."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from diffusers.optimization import get_scheduler

from ddim_schedulers.training.common.processes import check_joined, on_cpu
from ddim_schedulers.training.config import OptimisationConfig, TrainingConfig

_REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Set up DDP, mixed precision and trackers from the settings and `accelerate launch`.

    Raises:
        ValueError: launched with FSDP, DeepSpeed or Megatron-LM, several processes that do not see
            each other, a compiler of Accelerate's own, a tracker that is not installed, or fp16 on
            the CPU.
    """
    for variable, name in _REFUSED.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise ValueError(_refusal(name))
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    # Accelerate keeps its state for the whole process. An earlier run in this one, with another
    # precision or device, would otherwise decide those of this run or be an error.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision=None if config.mixed_precision == "auto" else config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        cpu=on_cpu(config.cpu),
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(Path(config.output_dir) / "logs"),
    )
    check_joined(accelerator.num_processes)
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            "`dynamo_backend` is set in Accelerate's config (or ACCELERATE_DYNAMO_BACKEND); it "
            "must be off: set `compile` and `compile_backend` instead"
        )
    if accelerator.distributed_type in _SHARDED:
        raise ValueError(_refusal(accelerator.distributed_type.value))
    if config.tracker != "none" and not accelerator.log_with:
        raise ValueError(
            f"`tracker` is {config.tracker!r}, which is not installed; install it, "
            "or choose another one"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(
            "`mixed_precision` is 'fp16', which does nothing on the CPU; set it to 'bf16' or 'no'"
        )
    return accelerator


def _refusal(name: str) -> str:
    return (
        f"`distributed_type` is {name}; it must be MULTI_GPU, plain data parallelism, in the "
        "accelerate config: models of this size fit on one device"
    )


def make_optimizer(
    parameters: list[torch.nn.Parameter], config: OptimisationConfig
) -> torch.optim.AdamW:
    """Make a fused AdamW, which can skip a step on the device (`found_inf`)."""
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


class LearningRate:
    """The learning rate as a function of the step, 0-based, from diffusers' schedules.

    Nothing is counted: Accelerate's wrapped scheduler advances once for each process, and a counter
    would have to be restored on resume.
    """

    def __init__(self, config: OptimisationConfig) -> None:
        self.peak, self.warmup = config.lr, config.lr_warmup_steps
        unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=config.lr)
        # "constant" in diffusers has no warm-up; the other name is the same with it.
        name = {"constant": "constant_with_warmup"}.get(config.lr_schedule, config.lr_schedule)
        schedule = get_scheduler(
            name,
            unused,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self._factor = schedule.lr_lambdas[0]

    def __call__(self, step: int) -> float:
        """Return the rate of the update that step `step` (from 0) makes."""
        # Warm-up counts from 1: a first step with rate 0 would be a wasted batch.
        return self.peak * float(self._factor(step + 1 if step < self.warmup else step))
