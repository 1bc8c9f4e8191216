"""Training runs of a few seconds: their networks, their settings, and what they leave."""

from pathlib import Path

from ddim_schedulers.training.config import TrainingConfig
from ddim_schedulers.training.networks import checkpoints

PLAIN_UNET = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
UNET = {
    **PLAIN_UNET,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
}
QUICK = {
    "cpu": True,
    "batch_size": 8,
    "lr": 1e-3,
    "lr_warmup_steps": 2,
    "ema_decay": 0.9,
    "progress_bar": False,
    "log_every": 4,
    "checkpoint_every": 0,
}


def quick_config(folder, name, **changes):
    """Returns the settings of a quick run in `folder`, which holds the network as `unet.json`."""
    places = {"output_dir": str(folder / name), "model": str(folder / "unet.json")}
    return TrainingConfig(**QUICK | places | changes)


def checkpoint(config, step):
    """Returns the folder of a run's checkpoint."""
    return checkpoints.folder_of(Path(config.output_dir) / "checkpoints", step)


def same_files(one, two, step):
    """Tells whether two runs have the same bytes in every tensor file of a checkpoint."""
    a, b = (checkpoint(config, step) for config in (one, two))
    names = sorted(p.relative_to(a) for p in a.rglob("*.safetensors"))
    assert len(names) >= 3
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in names)
