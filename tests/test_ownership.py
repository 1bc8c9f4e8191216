"""A folder has one owner: the dead are replaced, the living are named, and the replaced stop."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddim_schedulers.pipelines import alive, ownership
from ddim_schedulers.pipelines.files import remove_leftovers, write_bytes
from ddim_schedulers.pipelines.ownership import FolderInUseError, OwnershipLostError, own

# The packages around the module are empty there: importing diffusers takes seconds.
HOLD = """
import sys, time, types
for name, folder in (("ddim_schedulers", None), ("ddim_schedulers.pipelines", sys.argv[2])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from ddim_schedulers.pipelines.ownership import own
with own(sys.argv[1], "train"):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that owns `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run", Path(ownership.__file__).parent],
        cwd=tmp_path,  # not the repo's root, where a folder shadows an installed wheel
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def record_of(folder, rank=0):
    return folder / f".owner-{rank}.json"


def plant(folder, **changes):
    """Leaves the record of an owner that is none of this process's, as a dead one would."""
    folder.mkdir(exist_ok=True)
    values = alive.identity() | {"verb": "train", "token": "other", "rank": 0}
    values |= {"world_size": 1, "launch": "x", "parts": None} | changes
    record_of(folder).write_text(json.dumps(values))
    return record_of(folder)


def test_a_second_process_is_refused_and_told_who_and_when(tmp_path, holder):
    folder = tmp_path / "run"
    before = sorted(p.name for p in folder.iterdir())
    # a stopped owner is an owner
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(FolderInUseError) as caught, own(folder, "sample"):
        pass
    text = str(caught.value)
    assert f"`train` on host {socket.gethostname()}, process {holder.pid}" in text
    assert "last sign of life 20" in text
    assert sorted(p.name for p in folder.iterdir()) == before
    # around it and in it too, but not beside it
    for place in (tmp_path, folder / "images"):
        with pytest.raises(FolderInUseError), own(place, "sample"):
            pass
    with own(tmp_path / "other", "sample"):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_releases(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    # the shell is told of the signal, as without a lock
    assert holder.returncode in (-number, 130 if number == signal.SIGINT else -number)
    assert not (tmp_path / "run").exists()  # it was made for this, and stayed empty


def test_a_killed_owner_is_replaced_at_once(holder, tmp_path):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie: nobody has asked yet
    with own(tmp_path / "run", "train") as owner:
        assert json.loads(owner.record.read_text())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_number_that_went_to_another_process_is_not_the_owner(tmp_path):
    record = plant(tmp_path / "run", pid=os.getppid(), started="1")
    with own(tmp_path / "run", "train") as owner:
        owner.check()
    assert not record.exists()


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"host": "other", "system": "another boot pid:[1]"},
        # containers: the same name of the host, other process numbers
        {"system": f"{str(alive.system()).partition(' ')[0]} pid:[1]", "pid": 1},
        {"system": None},
    ],
)
def test_an_owner_elsewhere_is_replaced_after_its_silence_alone(tmp_path, monkeypatch, elsewhere):
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.01)
    record = plant(tmp_path / "run", **{"pid": 2**22 + 1, **elsewhere})
    at = time.time() - ownership.SILENCE_SECONDS + 60
    os.utime(record, (at, at))
    with (
        pytest.raises(FolderInUseError, match="try again after 120 s"),
        own(record.parent, "train"),
    ):
        pass
    at -= 61
    os.utime(record, (at, at))
    with own(record.parent, "train") as owner:
        owner.check()


def test_a_silent_owner_whose_clock_was_wrong_is_seen_alive(tmp_path, monkeypatch):
    record = plant(tmp_path / "run", host="other", system="another boot")
    os.utime(record, (1e9, 1e9))
    # it gives a sign of life while it is watched
    monkeypatch.setattr(ownership.time, "sleep", lambda seconds: os.utime(record))
    with pytest.raises(FolderInUseError), own(record.parent, "train"):
        pass


def test_who_was_replaced_stops(tmp_path):
    with own(tmp_path / "run", "train") as owner:
        owner.check()
        record = plant(tmp_path / "run", verb="sample", host="other", pid=7)
        with pytest.raises(
            OwnershipLostError, match="belongs to `sample` on host other, process 7"
        ):
            owner.check()
    assert json.loads(record.read_text())["token"] == "other"  # not ours to remove
    with own(tmp_path / "next", "train") as owner:
        owner.record.unlink()
        with pytest.raises(OwnershipLostError, match="its record is gone"):
            owner.check()


def test_a_sign_of_life_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.01)
    with own(tmp_path / "run", "train") as owner:
        os.utime(owner.record, (1e9, 1e9))
        for _ in range(1000):
            if owner.record.stat().st_mtime > 1e9 + 1:
                break
            time.sleep(0.01)
        assert owner.record.stat().st_mtime > 1e9 + 1


def test_one_process_enters_its_folder_again(tmp_path):
    with (
        own(tmp_path / "run", "demo") as outer,
        own(tmp_path / "run" / "training", "train") as inner,
    ):
        assert inner is outer
        assert (tmp_path / "run" / "training").is_dir()
        with own(tmp_path / "run", "sample"):
            pass
        inner.check()
    assert not (tmp_path / "run").exists()


def test_shares_of_one_launch_go_together_and_no_others(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("MASTER_PORT", "1")
    record = plant(folder, launch=ownership._launch(), rank=1, world_size=2, pid=os.getppid())
    record.rename(record_of(folder, 1))
    monkeypatch.setattr(ownership, "is_gone", lambda *_: False)
    with own(folder, "sample", rank=0, world_size=2):
        pass
    for rank, size, port in ((1, 2, "1"), (0, 3, "1"), (0, 2, "2"), (0, 1, "1")):
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(FolderInUseError), own(folder, "sample", rank=rank, world_size=size):
            pass


def test_parts_leave_the_rest_to_others(tmp_path):
    plant(tmp_path / "run", parts=["pipeline"], pid=os.getppid(), started=None)
    record = record_of(tmp_path / "run")
    values = json.loads(record.read_text())
    values["started"] = alive.started_at(os.getppid())
    record.write_text(json.dumps(values))
    with own(tmp_path / "run" / "samples", "sample"):
        pass
    with pytest.raises(FolderInUseError), own(tmp_path / "run" / "pipeline", "push"):
        pass


@pytest.mark.parametrize("content", ["", "[1]", "{}", "[" * 100_000, '{"pid": "x", "system": 1}'])
def test_a_record_that_says_nothing_still_counts(tmp_path, content):
    (tmp_path / "run").mkdir()
    record_of(tmp_path / "run").write_text(content)
    with pytest.raises(FolderInUseError, match="unknown|`"), own(tmp_path / "run", "train"):
        pass


def test_a_pipe_as_a_record_is_not_waited_for(tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(record_of(tmp_path / "run"))
    with pytest.raises(FolderInUseError), own(tmp_path / "run", "train"):
        pass


def test_without_flock_a_file_does(tmp_path, monkeypatch):
    import filelock

    def none(self, *args, **kwargs):
        raise OSError(ownership.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    with own(tmp_path / "run", "train") as owner:
        owner.check()
    assert not (tmp_path / "run").exists()


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Whoever guesses the temporary name gains nothing."""
    from ddim_schedulers.pipelines import files

    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * 2 * size)
    (tmp_path / "precious").write_text("mine")
    planted = tmp_path / f".a.json.0-{'0' * 12}.tmp"
    planted.symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "a.json", b"theirs")
    assert (tmp_path / "precious").read_text() == "mine"
    remove_leftovers(tmp_path, 0, 1)
    write_bytes(tmp_path / "a.json", b"whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "precious"]


def test_a_write_that_fails_leaves_nothing_and_names_the_file(tmp_path):
    from ddim_schedulers.pipelines.files import write_atomically
    from ddim_schedulers.training.common.failures import sentence

    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        write_atomically(tmp_path / "a.json", full)
    assert list(tmp_path.iterdir()) == []
    assert sentence(caught.value) == f"No space left on device: {str(tmp_path / 'a.json')!r}"
