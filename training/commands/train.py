"""`ddim-schedulers train`: train a diffusion model."""

HELP = "Train a UNet2DModel on your images, with or without classes."


def main(argv: list[str]) -> int:
    """Run the trainer's own command line, which its settings generate."""
    from ddim_schedulers.training.train import main as train_main

    return train_main(argv)
