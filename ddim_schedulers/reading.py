"""The one bounded reader of files that others wrote, or that a disk or a hand may have harmed.

Whatever is wrong with a file is one `DamagedFileError` with the file's name: not there, not a
file, too large, not text, nested too deep, cut short, or declared larger than it is. Sizes are
compared before anything of that size is allocated, and nothing that is read can run code.

`plain_files` reads bytes, text, JSON and YAML; `archives` reads arrays and tensors.
"""

from .archives import (
    ENTRIES,
    EXPANSION,
    FREE_BYTES,
    NPY_HEADER,
    check_archive,
    npz_names,
    read_npy,
    read_npz,
    read_safetensors,
    safetensors_header,
    safetensors_shapes,
)
from .plain_files import (
    DEPTH,
    INTEGERS,
    JSON_BYTES,
    NUMBER_LENGTH,
    YAML_BYTES,
    YAML_NODES,
    DamagedFileError,
    Place,
    opened,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
)

__all__ = [
    "DEPTH",
    "ENTRIES",
    "EXPANSION",
    "FREE_BYTES",
    "INTEGERS",
    "JSON_BYTES",
    "NPY_HEADER",
    "NUMBER_LENGTH",
    "YAML_BYTES",
    "YAML_NODES",
    "DamagedFileError",
    "Place",
    "check_archive",
    "npz_names",
    "opened",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_npy",
    "read_npz",
    "read_safetensors",
    "read_text",
    "read_yaml",
    "safetensors_header",
    "safetensors_shapes",
]
