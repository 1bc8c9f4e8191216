"""Gradients of a small UNet2DModel, compiled against eager: run it before a long compiled run.

    python tests/proofs/compiled_gradients.py [--device cuda] [--channels_last] [--plain]

The network is compiled as the trainer does it; with `--plain` as it is, for which the inductor of
torch below 2.14 gives the right loss on the CPU and 0 for the gradients of whole layers
(https://github.com/pytorch/pytorch/issues/185509). Prints, for each parameter that differs, the
relative difference of its gradient and both norms. Exit code 1 when any differs. Takes a minute of
compilation, so it is not collected by pytest.
"""

import argparse
import sys
from pathlib import Path

import torch

from ddim_schedulers.training.trainer.compiling import compile_for_training

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import tiny_unet

TOLERANCE = 1e-4  # relative, of a float32 gradient


def gradients(
    network: torch.nn.Module, unet: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of one batch through `network`, and the gradients of `unet`'s parameters by name."""
    unet.zero_grad()
    loss = (network(batch["x"], batch["t"]).sample - batch["noise"]).square().mean()
    loss.backward()
    named = unet.named_parameters()
    return loss.item(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where to compile (here: %(default)s)")
    parser.add_argument("--channels_last", action="store_true", help="memory format of the network")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--plain", action="store_true", help="compile the network as it is")
    args = parser.parse_args()

    unet = tiny_unet(blocks=(8, 8), add_attention=False).to(args.device)
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    batch = {
        "x": torch.randn(2, 1, 8, 8).to(args.device),
        "noise": torch.randn(2, 1, 8, 8).to(args.device),
        "t": torch.tensor([3, 700], device=args.device),
    }
    loss, eager = gradients(unet, unet, batch)
    if args.plain:
        compiled = torch.compile(unet, backend=args.backend)
    else:
        compiled = compile_for_training(unet, None, args.backend)
    compiled_loss, got = gradients(compiled, unet, batch)

    wrong = 0
    for name, expected in eager.items():
        size = expected.norm().item()
        found = got.get(name, torch.zeros_like(expected))
        difference = (found - expected).norm().item() / max(size, 1e-12)
        if not difference <= TOLERANCE:  # NaN differs, too
            wrong += 1
            norms = f"eager {size:.3g}, compiled {found.norm().item():.3g}"
            print(f"{name}: relative difference {difference:.2g} ({norms})")
    print(
        f"torch {torch.__version__}, {args.backend} on {args.device}: loss {compiled_loss:.7f}, "
        f"eager {loss:.7f}; {wrong} of {len(eager)} gradients differ by more than {TOLERANCE:g}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
