"""Files that mean harm, or came to it: one sentence with the file's name, in little memory."""

import io
import json
import os
import pickle
import resource
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save

from ddim_schedulers import reading
from ddim_schedulers.reading import DamagedFileError
from ddim_schedulers.training.sharing.convert import load_checkpoint

MEMORY = 64 << 20  # bytes that a refusal may take at most, whatever a file declares


def laughs(entry, times=9, levels=9):
    """YAML whose aliases write out to times ** levels values."""
    letters = "abcdefghijklmnop"
    lines = [f"a: &a {entry}"]
    for i in range(levels):
        inner = ",".join([f"*{letters[i]}"] * times)
        merged = f"{{<<: [{inner}]}}" if entry.startswith("{") else f"[{inner}]"
        lines.append(f"{letters[i + 1]}: &{letters[i + 1]} {merged}")
    return "\n".join(lines)


def npy(shape, data=b"\0" * 10, version=(1, 0), descr="'|u1'", length=None):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = len(text) if length is None else length
    width = 2 if version == (1, 0) else 4
    return b"\x93NUMPY" + bytes(version) + size.to_bytes(width, "little") + text + data


def archive(entries, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        for name, data in entries:
            made.writestr(name, data)
    return file.getvalue()


def tensors(header, data=b""):
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def zeros_in(entry, count):
    """An archive of `count` zeros of 8 bits, without so many in memory."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        with made.open(entry, "w", force_zip64=True) as stream:
            stream.write(npy(f"({count},)", b""))
            for _ in range(count // 10**6):
                stream.write(bytes(10**6))
    return file.getvalue()


F32 = '"dtype": "F32", "shape": '
HOSTILE = {
    ("json", "nested deeper than 64"): (
        b"[" * 10**6,
        b"[" * 70 + b"]" * 70,
        b'{"a":' * 10**5,
    ),
    ("json", "not valid JSON"): (
        b"",
        b"{",
        b"{}{}",
        b'{"a": 1,}',
        b'{"a": 01}',
        b'{"a": "\x01"}',
        b'{"a": ' + b"9" * 5000 + b"}",
    ),
    ("json", "key 'a' appears twice"): (b'{"a": 1, "a": 2}', b'{"b": {"a": 1, "a": 1}}'),
    ("json", "integer of"): (b'{"a": 1' + b"0" * 400 + b"}", b'{"a": -9223372036854775809}'),
    ("json", "not finite"): (b'{"a": NaN}', b'{"a": [-Infinity]}', b'{"a": 1e999}'),
    ("json", "not UTF-8"): (b"\xff\xfe{}", b'{"a": "\xe9"}', os.urandom(64) + b"\xff"),
    ("json", "surrogate"): (b'{"a": "\\ud800"}', b'{"\\udfff": 1}'),
    ("json", "must hold a JSON object, not"): (b"[]", b"5", b"null", b'"a"', b"true"),
    ("json", "at most 4194304 are read"): (b" " * (1 << 23) + b"{}",),
    ("yaml", "once its aliases are written out"): (
        laughs("[l,l,l,l,l,l,l,l,l]").encode(),
        laughs("{x: 1}").encode(),
        laughs("x").encode(),
    ),
    ("yaml", "nested deeper than 64"): (
        b"a: &a [*a, *a]",
        b"a: &a {b: *a}",
        b"[" * 10**5,
        b"{a: " * 30000,
        b"- " * 60000,
        b"\n".join(b" " * i + b"a:" for i in range(300)),
    ),
    ("yaml", "not valid YAML"): (
        b"a: !!python/object/apply:os.system [id]",
        b"a: !!python/name:os.system",
        b"a: !made_up 5",
        b"a: *unknown",
        b"a: 1\n---\nb: 2",
        b"\ta: 1",
        b"a: \x01",
        b"a: [1",
        b"? [a]\n: b",
        b"a: {}: b",
    ),
    ("yaml", "key 'a' appears twice"): (b"a: 1\na: 2", b"b: {a: 1, a: 1}"),
    ("yaml", "holds a value that is none"): (
        b"a: 2001-99-99",
        b"a: !!timestamp x",
        b"a: !!bool maybe",
        b"a: !!int ''",
        b"a: !!float x",
    ),
    ("yaml", "number of|integer of"): (
        b"a: 1" + b":1" * 60000,
        b"a: 0x" + b"f" * 100000,
        b"a: 1" + b"0" * 300,
    ),
    ("yaml", "not UTF-8"): (b"a: \xff", os.urandom(64) + b"\xff"),
    ("yaml", "at most 131072 are read"): (b"a: 1\n" * 30000,),
    ("npz", "declares .* at most"): (zeros_in("a.npy", 10**8),),
    ("npz", "does not fit its"): tuple(
        archive([("a.npy", npy(shape))])
        for shape in (
            "(10**12,)".replace("10**12", "1" + "0" * 12),
            "(-10,)",
            "(-5, -2)",
            "(9,)",
            "(0, 5)",
        )
    ),
    ("npz", "not numbers"): (
        archive([("a.npy", npy("(1,)", pickle.dumps([{}]), descr="'|O'"))]),
        archive([("a.npy", npy("(10,)", descr="[('x', '|O'), ('y', '|u1')]"))]),
        archive([("a.npy", npy("(" + "9" * 12 + ",)", b"", descr="'|V0'"))]),
    ),
    ("npz", "no array of its own"): (
        archive([("a.txt", b"x")]),
        archive([("../a", b"x")]),
    ),
    ("npz", "a way numpy never does"): (
        archive([("a.npy", npy("(10,)"))], zipfile.ZIP_BZIP2),
        archive([("a.npy", npy("(10,)"))], zipfile.ZIP_LZMA),
    ),
    ("npz", "header"): (
        archive([("a.npy", npy("(" * 500))]),
        archive([("a.npy", npy("(10.5,)"))]),
        archive([("a.npy", npy("(10,)", descr="'nonsense'"))]),
        archive([("a.npy", npy("(10,)", version=(2, 0), length=2**31))]),
        archive([("a.npy", npy("(10,)", length=60000))]),
    ),
    ("npz", "version"): (archive([("a.npy", npy("(10,)", version=(9, 0)))]),),
    ("npz", "cannot be read"): (
        b"",
        b"PK\x03\x04",
        pickle.dumps({}),
        os.urandom(2000),
        archive([("a.npy", npy("(10,)"))])[:-30],
        archive([("a.npy", b"")]),
    ),
    ("npy", "does not fit its"): (npy("(" + "9" * 12 + ",)"), npy("(-10,)"), npy("(9,)")),
    ("npy", "cannot be read"): (b"", pickle.dumps({}), os.urandom(2000), npy("(" * 500)),
    ("safetensors", "no whole safetensors file"): (
        b"",
        b"{}",
        (2**63).to_bytes(8, "little") + b"{}",
        save({"a": torch.arange(9.0)})[:-1],
        save({"a": torch.arange(9.0)}) + b"\0",
        tensors('{"a": 5}'),
        tensors('{"a": {%s[1000000000], "data_offsets": [0, 4000000000]}}'.replace("%s", F32)),
        tensors('{"a": {%s[-1], "data_offsets": [0, 4]}}'.replace("%s", F32), b"\0" * 4),
        tensors('{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}', b"\0" * 4),
        tensors('{"a": {%s[2], "data_offsets": [0, 4]}}'.replace("%s", F32), b"\0" * 4),
    ),
    ("safetensors", "must hold a JSON object"): (tensors("[]"), tensors("5")),
    ("safetensors", "nested deeper"): (tensors("[" * 3000),),
    ("safetensors", "not UTF-8"): (tensors(b"\xff" * 20),),
    ("safetensors", "metadata do not map"): (
        tensors('{"__metadata__": 5}'),
        tensors('{"__metadata__": {"a": 5}}'),
    ),
}
CASES = [
    pytest.param(kind, reason, data, id=f"{kind}-{reason[:20]}-{i}")
    for (kind, reason), files in HOSTILE.items()
    for i, data in enumerate(files)
]
READERS = {
    "json": lambda path: reading.read_json(path, finite=True),
    "yaml": reading.read_yaml,
    "npz": reading.read_npz,
    "npy": reading.read_npy,
    "safetensors": reading.read_safetensors,
}


@pytest.mark.parametrize(("kind", "reason", "data"), CASES)
def test_a_hostile_file_is_one_sentence_in_little_memory(tmp_path, kind, reason, data):
    path = tmp_path / f"file.{kind}"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError, match=reason) as caught:
            READERS[kind](path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"'{path}' cannot be read: ") and message.endswith(".")
    assert "\n" not in message and len(message) < 600
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # from a worker process


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_file_is_not_opened(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    places = {
        tmp_path: "a folder",
        tmp_path / "pipe": "no regular file",  # opening it would wait for ever
        "/dev/zero": "no regular file",  # reading it would never end
        tmp_path / "none": "there is no such file",
        "nu\0ll": "null byte",
        tmp_path / ("x" * 300): "too long",
    }
    for place, reason in places.items():
        with pytest.raises(DamagedFileError, match=reason):
            READERS[kind](place)


def test_whole_files_are_read(tmp_path):
    path = tmp_path / "file"
    value = {"a": [1, 2.5, None, True, "ü"], "b": {"c": -(2**63), "d": 2**64 - 1}}
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(json.dumps(value), encoding=encoding)
        assert reading.read_json(path) == value
        path.write_text("a: &x {b: 1e-3}\nc: {<<: *x, b: 2}\nd: *x\n", encoding=encoding)
        assert reading.read_yaml(path) == {"a": {"b": "1e-3"}, "c": {"b": 2}, "d": {"b": "1e-3"}}
    path.write_text("")
    assert reading.read_yaml(path) is None
    path.write_text('{"a": -Infinity}')  # diffusers writes it into the config of DPM-Solver
    assert reading.read_json(path) == {"a": float("-inf")}
    arrays = {
        "images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        "seeds": np.arange(2),
        "fortran": np.asfortranarray(np.ones((3, 5), np.float32)),
        "none": np.zeros((0, 5)),
        "scalar": np.array(5.0),
        "large": np.zeros(200_000, np.uint8),
    }
    for pack in (np.savez, np.savez_compressed):
        with open(path, "wb") as file:
            pack(file, **arrays)
        assert reading.npz_names(path) == list(arrays)
        found = reading.read_npz(path)
        assert all(
            np.array_equal(found[k], v) and found[k].dtype == v.dtype for k, v in arrays.items()
        )
        assert list(reading.read_npz(path, ["seeds"], limit=16)) == ["seeds"]
        with pytest.raises(DamagedFileError, match="at most"):
            reading.read_npz(path, limit=16)
        with pytest.raises(DamagedFileError, match="not 'labels'"):
            reading.read_npz(path, ["labels"])
    with open(path, "wb") as file:
        np.save(file, arrays["images"])
    for mapped in (False, True):
        assert np.array_equal(reading.read_npy(path, mapped=mapped), arrays["images"])
    path.write_bytes(save({"w": torch.arange(3), "e": torch.zeros(0, 2)}, {"k": "v"}))
    found, metadata = reading.read_safetensors(path)
    assert torch.equal(found["w"], torch.arange(3)) and found["e"].shape == (0, 2)
    assert metadata == {"k": "v"}


def test_every_flipped_bit_of_an_archive_is_found(tmp_path):
    path = tmp_path / "shard.npz"
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 1), dtype=np.uint8)
    with open(path, "wb") as file:
        np.savez_compressed(file, images=images)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = reading.read_npz(path)
        except DamagedFileError:
            continue
        # a time, a version or a flag that says nothing of the contents
        assert list(found) == ["images"] and np.array_equal(found["images"], images)


def test_an_archive_for_other_readers_is_no_bomb(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.zeros(10**5)}, path)
    reading.check_archive(path)
    path.write_bytes(b"no archive")
    with pytest.raises(DamagedFileError, match="no PyTorch file of tensors alone"):
        reading.check_archive(path)
    path.write_bytes(zeros_in("data/0", 10**8))
    with pytest.raises(DamagedFileError, match="declares .* at most"):
        reading.check_archive(path)


def files_of_pickle(path, stream):
    """The same pickle as the contents of both kinds of file that `torch.load` reads."""
    torch.save({"w": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, stream if name.endswith("data.pkl") else content)
    yield path
    torch.save({"w": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    with open(path, "rb") as file:
        start = [pickle.load(file) for _ in range(3)]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in start) + stream)
    yield path


BILLION = b"\x8a\x05" + (10**9).to_bytes(5, "little")
CALLS = {  # each is made by torch itself, though it loads weights alone
    "bytearray": b"cbuiltins\nbytearray\n(" + BILLION + b"tR",
    "of Python 2": b"c__builtin__\nbytearray\n(" + BILLION + b"tR",
    "tensor": b"ctorch\nTensor\n(" + BILLION + b"tR",
    "storage": b"ctorch.storage\nUntypedStorage\n(" + BILLION + b"tR",
    "code": b"cos\nsystem\n(X\x04\x00\x00\x00truetR",
    "by stack": b"\x8c\x02os\x8c\x06system\x93(tR",
    "instance": b"(ios\nsystem\n",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_pickle_makes_nothing_but_tensors(call, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in files_of_pickle(tmp_path / "model.ckpt", b"\x80\x02" + call + b"."):
        with pytest.raises(DamagedFileError, match="tensors alone: it names"):
            reading.check_archive(path)
        with pytest.raises(ValueError, match="tensors alone: it names"):
            load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_pickles_of_tensors_pass(tmp_path):
    path = tmp_path / "model.ckpt"
    half = torch.nn.Parameter(torch.ones(2).half())
    state = {"w": torch.zeros(2), "p": half, "s": torch.ones(3).to_sparse(), "d": torch.float64}
    for zipped in (True, False):
        torch.save(
            [OrderedDict(state), {"step": 3}, 1.5], path, _use_new_zipfile_serialization=zipped
        )
        reading.check_archive(path)
        torch.load(path, weights_only=True)
