"""Paired timing: two callables in turn, so that a machine whose speed drifts gives a ratio."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def paired(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    repeats: int = 15,
    inner: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Times both in turn `repeats` times, each over `inner` calls, after one warm-up of both.

    `clock` is `time.process_time` where other programs keep the cores busy.

    Returns:
        min, median and max of the ratio ours / theirs over the pairs, the median seconds, and the
        ratio of the fastest runs, which other programs disturbed least.
    """
    runs = []
    for repeat in range(repeats + 1):
        pair = []
        # which one goes first changes from pair to pair: the second finds warmer caches
        for call in (ours, theirs) if repeat % 2 else (theirs, ours):
            begun = clock()
            for _ in range(inner):
                call()
            pair.append((clock() - begun) / inner)
        runs.append(pair if repeat % 2 else pair[::-1])
    runs = runs[1:]
    ratios = sorted(a / b for a, b in runs)
    return {
        "ratio_min": ratios[0],
        "ratio_median": statistics.median(ratios),
        "ratio_max": ratios[-1],
        "ratio_fastest": min(a for a, _ in runs) / min(b for _, b in runs),
        "ours_seconds": statistics.median(a for a, _ in runs),
        "theirs_seconds": statistics.median(b for _, b in runs),
        "pairs": repeats,
        "calls_in_each": inner,
    }


def parser(text: str) -> argparse.ArgumentParser:
    """Returns a parser with what every benchmark takes."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--json", type=Path, help="write the figures here as well")
    made.add_argument("--repeats", type=int, default=15, help="pairs of runs")
    made.add_argument("--threads", type=int, default=1, help="threads of torch")
    made.add_argument(
        "--cpu_time", action="store_true", help="processor time, for a machine that is not idle"
    )
    return made


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """Returns the clock that was asked for."""
    return time.process_time if args.cpu_time else time.perf_counter


def report(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Prints one line a row, the ratio first, and writes JSON with the versions."""
    for row in rows:
        fastest = f"fastest {row['ratio_fastest']:.3f}  " if "ratio_fastest" in row else ""
        named = ", ".join(f"{k} {v}" for k, v in row.items() if k in row["labels"])
        print(
            f"{row['ratio_median']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f})  "
            f"{row['ours_seconds'] * 1e6:10.1f} us against {row['theirs_seconds'] * 1e6:10.1f} us"
            f"  {fastest}{named}",
            flush=True,
        )
    if path is not None:
        write_json(path, rows)


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes figures with the versions that they were measured with."""
    import diffusers
    import torch

    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    path.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")
