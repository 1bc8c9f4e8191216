"""What a set of images was found to be: a line when a run starts, and its `data.json`."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ddim_schedulers.pipelines.image_files import Header

_SHOWN = 6  # kinds of one thing that are named in a line
_KEPT = 100  # and in `data.json`


@dataclass
class Inventory:
    """Counts of what lies in a place and of what is used of it.

    Attributes:
        place: the setting `data`.
        understood: what the place was taken for, where that had to be found out.
        found: images and other files that were looked at.
        used: images that are read.
        left_out: what is not used: how many, by the reason.
        sizes: 'HEIGHTxWIDTH', as shown -> images.
        modes: as stored, in Pillow's words -> images.
        becomes: what each image becomes.
        turned: images that their EXIF orientation turns.
        more_frames: images of files that hold several, and the frames of these that are not used.
        alpha: 'composed' or 'kept' -> images.
        background: the colour behind them.
        looked_at: how many images of a stream the counts are of; None where they are of all.
        classes: name -> images, where labels are asked for.
    """

    place: str = ""
    understood: str = ""
    found: int = 0
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    becomes: str = ""
    turned: int = 0
    more_frames: tuple[int, int] = (0, 0)
    alpha: Counter[str] = field(default_factory=Counter)
    background: str = ""
    looked_at: int | None = None
    classes: dict[str, int] = field(default_factory=dict)

    def count(self, headers: Iterable[Header], times: int = 1) -> None:
        """Take the headers of the images that are used, each for `times` images."""
        files, frames = self.more_frames
        for header in headers:
            self.used += times
            self.sizes["x".join(map(str, header.size))] += times
            self.modes[header.stored] += times
            self.turned += header.turned
            files, frames = files + (header.frames > 1), frames + header.frames - 1
            if header.alpha:
                self.alpha[header.alpha] += 1
        self.more_frames = (files, frames)

    def line(self) -> str:
        """Return one line for the terminal."""
        what = "found" if self.looked_at is None else "looked at of a stream"
        parts = [f"data: {self.place}"]
        if self.understood:
            parts[0] += f" ({self.understood})"
        parts[0] += f": {self.found:,} {what}, {self.used:,} used"
        if self.left_out:
            parts.append(f"left out {self.left_out.total():,}: {listed(self.left_out)}")
        parts.append(f"height x width {listed(self.sizes)}, taken {self.becomes}")
        parts.append(f"modes {listed(self.modes)}")
        if self.classes:
            there = {name: n for name, n in self.classes.items() if n}
            parts.append(f"classes {len(self.classes):,}: {listed(there)}")
            if empty := [name for name, n in self.classes.items() if not n]:
                more = f" and {len(empty) - _SHOWN:,} more" if len(empty) > _SHOWN else ""
                parts.append(f"no image of {', '.join(empty[:_SHOWN])}{more}")
        if self.turned:
            parts.append(f"turned by EXIF {self.turned:,}")
        if self.more_frames[0]:
            files, frames = self.more_frames
            parts.append(f"only the first frame used of {files:,}, {frames:,} frames left out")
        if self.alpha["composed"]:
            parts.append(
                f"transparency composed over {self.background} in {self.alpha['composed']:,}"
            )
        if self.alpha["kept"]:
            parts.append(
                f"alpha kept as a channel in {self.alpha['kept']:,}, unseen pixels "
                f"{self.background}"
            )
        return " ".join("; ".join(parts).split())  # names of folders may hold line breaks

    def to_dict(self) -> dict[str, Any]:
        """Return the same for `data.json` of a run."""
        return {"line": self.line(), "place": self.place, **self.counts()}

    def counts(self) -> dict[str, Any]:
        """Return the numbers alone, without a path of this machine."""
        return {
            "understood": self.understood,
            "found": self.found,
            "used": self.used,
            "left_out": dict(self.left_out.most_common(_KEPT)),
            "sizes": dict(self.sizes.most_common(_KEPT)),
            "modes": dict(self.modes.most_common(_KEPT)),
            "turned": self.turned,
            "more_frames": {"files": self.more_frames[0], "left_out": self.more_frames[1]},
            "alpha": dict(self.alpha),
            "background": self.background,
            "looked_at": self.looked_at,
            **({"classes": self.classes} if self.classes else {}),
        }


def listed(counts: Mapping[str, int]) -> str:
    """Return kinds with their numbers, the most frequent first."""
    most = Counter(counts).most_common()
    if len(most) == 1:
        return most[0][0] if most[0][1] == 1 else f"{most[0][0]} ({most[0][1]:,})"
    shown = ", ".join(f"{name} ({number:,})" for name, number in most[:_SHOWN])
    return shown + (f" and {len(most) - _SHOWN:,} more kinds" if len(most) > _SHOWN else "")
