"""Time of imports and of `ddim-schedulers --help`, each in a fresh process.

python tests/benchmarks/bench_import.py --json import.json

Run it on an installed package, outside the repository. The package is compared with the least that
a user of diffusers' DDIM imports: the loading utilities of its pipelines and two schedulers.
"""

import subprocess
import sys
import tempfile

from pairing import paired, parser, report

STOCK = (
    "import diffusers.pipelines.pipeline_loading_utils\n"
    "from diffusers import DDIMScheduler, DDPMScheduler"
)
CASES = {
    "import ddim_schedulers": "import ddim_schedulers",
    "import ddim_schedulers.pipelines": "import ddim_schedulers.pipelines",
    "ddim-schedulers --help": "from ddim_schedulers.training.cli import main\n"
    "try:\n    main(['--help'])\nexcept SystemExit:\n    pass",
    "ddim-schedulers train --help": "from ddim_schedulers.training.cli import main\n"
    "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass",
}


def fresh(code):
    """Returns a call that runs the code in a new interpreter, away from the repository."""
    folder = tempfile.gettempdir()

    def call():
        subprocess.run(
            [sys.executable, "-c", code], check=True, cwd=folder, stdout=subprocess.DEVNULL
        )

    return call


def main():
    """Runs every case against the same stock imports."""
    args = parser(__doc__.splitlines()[0]).parse_args()
    rows = []
    for name, code in CASES.items():
        figures = paired(fresh(code), fresh(STOCK), args.repeats)
        rows.append({"labels": ["case"], "case": name, **figures})
        rows[-1]["seconds_above"] = figures["ours_seconds"] - figures["theirs_seconds"]
        report(rows[-1:], None)
    if args.json:
        report(rows, args.json)


if __name__ == "__main__":
    main()
