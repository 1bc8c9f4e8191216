"""A run that is killed in the middle of anything ends as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

PROOF = Path(__file__).parent / "proofs" / "kill_and_resume.py"


def test_two_kills_change_nothing():
    """The same script with `--kills 20` is the long proof."""
    words = [sys.executable, str(PROOF), "--kills", "2", "--steps", "16"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "EQUAL after 2 kills" in done.stdout
    assert done.stdout.count("leaving ") == 2
