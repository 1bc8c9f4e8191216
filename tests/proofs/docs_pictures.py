"""Run the code blocks of a documentation page on a trained model and keep the pictures they make.

python tests/proofs/docs_pictures.py --model PIPELINE --page docs/pipelines.md --output
docs/images
"""

import argparse
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--page", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument(
        "--blocks", type=int, nargs="+", help="numbers of the blocks; all if not given"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    blocks = re.findall(r"```python\n(.*?)```", Path(args.page).read_text(), re.DOTALL)
    output = Path(args.output).resolve()
    model = Path(args.model).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.symlink(model, "my-model")
        for number, block in enumerate(blocks):
            if args.blocks is not None and number not in args.blocks:
                continue
            exec(compile(block, args.page, "exec"), {})
            for picture in Path(folder).glob("*.png"):
                shutil.copy(picture, output / picture.name)
                print(picture.name, picture.stat().st_size, flush=True)
                picture.unlink()


if __name__ == "__main__":
    main()
