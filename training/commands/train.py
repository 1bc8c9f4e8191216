"""`ddim-schedulers train`: train an unconditional diffusion model."""

HELP = "Train an unconditional UNet2DModel on your images."


def main(argv: list[str]) -> int:
    """Run the trainer's own command line, which its settings generate."""
    from ddim_schedulers.training.train import main as train_main

    return train_main(argv)
