"""The images in a folder: what is found, what is not used and why, and which split is meant.

Nothing is opened but files without a suffix, which only their first bytes can tell; pipes, sockets
and devices never are.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddim_schedulers.pipelines.image_files import BadImageError, Reading, opened

# Suffix -> Pillow's format, and the feature that must be built in for it.
_ALWAYS = "png apng jpg jpeg jpe jfif mpo bmp dib gif tif tiff ppm pgm pbm pnm qoi tga".split()
_SOMETIMES = {
    "webp": ("WEBP", "webp"),
    **dict.fromkeys(("avif", "avifs"), ("AVIF", "avif")),
    **dict.fromkeys(("jp2", "j2k", "jpc", "jpf", "jpx", "j2c"), ("JPEG2000", "jpg_2000")),
    **dict.fromkeys(("heic", "heif", "hif", "heics", "heifs"), ("HEIF", None)),
}
IMAGE_SUFFIXES = frozenset(f".{name}" for name in (*_ALWAYS, *_SOMETIMES))

# As `datasets` reads them from file names, and what other collections are divided into.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "trainval": ("trainval",),
    "extra": ("extra",),
    "holdout": ("holdout", "heldout"),
    "unlabeled": ("unlabeled", "unlabelled"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_SAY_NOTHING = frozenset(
    "image images img imgs picture pictures photo photos set data split".split()
)


@dataclass
class Found:
    """The files of a folder.

    Attributes:
        paths: images of the split, sorted.
        sizes: of these files, in bytes.
        left_out: how many files are not used, by the reason.
        names: of folders that were split or not: what was understood, or ''.
        suffixes: of the files that are no images, with their number.
        classes: folder of the class of each image; '' for one that is in none.
    """

    paths: list[Path] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    understood: str = ""
    suffixes: Counter[str] = field(default_factory=Counter)
    classes: list[str] = field(default_factory=list)


def find_images(folder: Path, split: str) -> Found:
    """Return the images in a folder and its sub-folders, of the split that is wanted.

    A folder is divided into splits if all its sub-folders that hold images are named as such
    (`train`, `val`, `Test`, `train_images` beside `test_images`, ...); so may be each class in it.
    `split` is one of them, several joined by '+', or 'all'.

    Raises:
        ValueError: the folder has no such split.
    """
    found, sizes = Found(), {}
    for path, status in _walk(folder, found.left_out):
        if reason := _not_an_image(path, found.suffixes):
            found.left_out[reason] += 1
        else:
            sizes[path] = status.st_size
    items = {path: path.relative_to(folder).parts for path in sorted(sizes)}
    splits = _Splits(split, folder)
    chosen = splits.choose(items, found)
    found.paths = [path for path in items if path in chosen]
    found.classes = _classes([splits.without(items[path]) for path in found.paths])
    found.sizes = [sizes[path] for path in found.paths]
    return found


def files_of(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Return the image files of a folder itself, sorted; `left_out` counts the rest."""
    images = []
    for path, _ in _walk(folder, left_out, deep=False):
        if reason := _not_an_image(path, Counter()):
            left_out[reason] += 1
        else:
            images.append(path)
    return images


def _walk(
    folder: Path, left_out: Counter[str], *, deep: bool = True
) -> list[tuple[Path, os.stat_result]]:
    """Walk over regular files that are not hidden, with their status; follow each link once."""
    files, todo, seen = [], [folder], set()
    while todo:
        place = todo.pop()
        try:
            status = place.stat()
            if (key := (status.st_dev, status.st_ino)) in seen:
                left_out["link to a folder that is read already"] += 1
                continue
            seen.add(key)
            entries = sorted(place.iterdir())
        except OSError as error:
            left_out[f"folder that cannot be read ({error.strerror})"] += 1
            continue
        for path in entries:
            if path.name.startswith(".") or path.name == "__MACOSX":
                left_out["hidden"] += 1
                continue
            try:
                status = path.stat()
            except OSError:
                broken = path.is_symlink()
                left_out["link that leads nowhere" if broken else "file that cannot be read"] += 1
                continue
            if stat.S_ISDIR(status.st_mode):
                if deep:
                    todo.append(path)
                else:
                    left_out["folder"] += 1
            elif stat.S_ISREG(status.st_mode):
                files.append((path, status))
            else:
                left_out["pipe, socket or device"] += 1
    return files


def _not_an_image(path: Path, suffixes: Counter[str]) -> str | None:
    """Return why a regular file is not an image; None if it is one."""
    from PIL import Image, features

    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        kind, feature = _SOMETIMES.get(suffix[1:], (None, None))
        if kind is None:
            return None
        Image.init()
        if kind in Image.OPEN and (feature is None or features.check(feature) is not False):
            return None
        return f"{suffix}, which Pillow cannot read here"
    if suffix:
        suffixes[suffix] += 1
        plain = len(suffix) <= 8 and suffix[1:].isascii() and suffix[1:].isalpha()
        return f"no image by its name ({suffix})" if plain else "no image by its name"
    try:
        with opened(path, path.name, Reading()):
            return None
    except BadImageError:
        suffixes[""] += 1
        return "no image, and without a suffix"


def _classes(folders: list[tuple[str, ...]]) -> list[str]:
    """Return the class of each image from the folders that it is in, those of splits left out.

    It is the outermost folder that is not the same for all, so that folders around the classes and
    within them do not matter.
    """
    depth = 0
    while folders and all(len(f) > depth + 1 and f[depth] == folders[0][depth] for f in folders):
        depth += 1
    return [f[depth] if len(f) > depth else "" for f in folders]


class _Splits:
    """Chooses the images of a split from a tree of paths."""

    def __init__(self, wanted: str, folder: Path) -> None:
        self.wanted, self.folder = wanted, folder
        self.parts = [part.strip() for part in wanted.split("+")]
        self.names: set[str] = set()
        self.classes: set[str] = set()
        self.divided: set[tuple[str, ...]] = set()  # folders whose sub-folders are splits

    def choose(self, items: dict[Path, tuple[str, ...]], found: Found) -> set[Path]:
        """Return the chosen paths; `found` tells the others and how the split was understood.

        Raises:
            ValueError: none is of the split.
        """
        chosen = self._chosen(items, 0, True, found.left_out)
        names = ", ".join(sorted(self.names))
        if items and not chosen:
            raise ValueError(
                f"`split` is {self.wanted!r}, but the splits of {self.folder} are {names}; name "
                "one, several joined by +, or all"
            )
        if items and not self.names and self.wanted not in ("train", "all"):
            raise ValueError(
                f"`split` is {self.wanted!r}, but {self.folder} has no folders that are named as "
                "splits (train, validation, test); leave split out, or name the folder itself"
            )
        if self.names:
            found.understood = f"split {self.wanted} of {names}"
        elif self.classes:
            same = ", ".join(sorted(self.classes))
            found.understood = f"{same} taken as a class, since not all folders beside are splits"
        return set(chosen)

    def without(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Return the folders of an image, without the one that is a split."""
        return tuple(p for i, p in enumerate(parts[:-1]) if parts[:i] not in self.divided)

    def _chosen(
        self, items: dict[Path, tuple[str, ...]], depth: int, top: bool, left_out: Counter[str]
    ) -> list[Path]:
        children: dict[str, dict[Path, tuple[str, ...]]] = {}
        loose = []
        for path, parts in items.items():
            if len(parts) == depth + 1:
                loose.append(path)
            else:
                children.setdefault(parts[depth], {})[path] = parts
        splits = _splits_among(list(children))
        # deeper down a lone folder that is called `test` is more likely a class than a split
        if splits and (top or len(set(splits.values())) > 1):
            self.names |= set(splits)
            self.divided.add(next(iter(items.values()))[:depth])
            chosen = []
            for name, inside in children.items():
                if self._means(name, splits):
                    chosen += list(inside)
                else:
                    left_out[f"of {name}, another split"] += len(inside)
            if loose and self.wanted != "all":
                left_out["beside the folders of splits"] += len(loose)
                loose = []
            return loose + chosen
        self.classes |= {name for name in children if _split_named(name, frozenset())}
        alone = top and len(children) == 1 and not loose
        for inside in children.values():
            loose += self._chosen(inside, depth + 1, alone, left_out)
        return loose

    def _means(self, name: str, splits: dict[str, str]) -> bool:
        exact = {n.casefold() for n in splits}
        for part in self.parts:
            if part == "all" or part.casefold() == name.casefold():
                return True
            # `val` means the folder `validation`, unless there is one that is called `val`
            if part.casefold() not in exact and _SPLIT_OF.get(part.casefold()) == splits[name]:
                return True
        return False


def _splits_among(names: Sequence[str]) -> dict[str, str] | None:
    """Return folder name -> split, if all folders have names of splits; else None."""
    words = [set(_words(name)) for name in names]
    common = set.intersection(*words) - set(_SPLIT_OF) if len(words) > 1 else set()
    splits = {name: _split_named(name, frozenset(common)) for name in names}
    known = {name: split for name, split in splits.items() if split is not None}
    return known if known and len(known) == len(names) else None


def _split_named(name: str, common: frozenset[str]) -> str | None:
    words = [w for w in _words(name) if len(w) > 1 and w not in _SAY_NOTHING | common]
    return _SPLIT_OF.get(words[0]) if len(words) == 1 else None


def _words(name: str) -> list[str]:
    return [word.casefold() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]
