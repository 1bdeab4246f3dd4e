"""A file that grows by steps is whole or set back to its last step, wherever the process dies, and ends the
same to the byte.
"""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys

import h5py
import pytest

from repae_lite.data import journal
from repae_lite.data.journal import ResumableH5
from repae_lite.utils import locks
from repae_lite.utils.locks import locked

STEPS = 6


class Killed(BaseException):
    """The process died here."""


def accept(file, state):
    assert len(file) == 2 * state["steps"]


def work(folder, *, steps=STEPS, size=5000, check=accept):
    """Adds what is missing, two byte strings a step, and returns the steps done anew."""
    with locked(folder):
        file = ResumableH5(folder, "print", {"steps": 0}, check)
        start = file.state["steps"]
        for i in range(start, steps):
            with file.step() as step:
                step.add(f"a{i}", bytes([i + 1]) * size)
                step.add(f"b{i}", bytes([i + 101]) * 10)
                file.commit(step, steps=i + 1)
        file.finish(folder.parent / "data.h5")
    return steps - start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    work(path / "data.h5.partial")
    return (path / "data.h5").read_bytes()


def dies_at_call(monkeypatch, owner, name, number, *, before=True):
    """The process dies before or after the numbered call."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == number and before:
            raise Killed
        result = original(*args, **kwargs)
        if len(calls) == number:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, call)


MOMENTS = [
    *((journal, "add_bytes", number, True) for number in (1, 2, 3, 8, 12)),  # in a step
    *(
        (journal, "write_text", number, before) for number in (1, 2, 6) for before in (True, False)
    ),  # around the commit
    *((ResumableH5, "_lay_over", number, before) for number in (1, 4, 6) for before in (True, False)),
    *((os, "pwrite", number, before) for number in (1, 5, 20) for before in (True, False)),
    (os, "replace", STEPS + 1, True),  # STEPS journals before
]


@pytest.mark.parametrize("owner, name, number, before", MOMENTS)
def test_a_run_killed_at_any_moment_ends_like_any_other(
    tmp_path, monkeypatch, whole, owner, name, number, before
):
    folder = tmp_path / "data.h5.partial"
    with monkeypatch.context() as patched:
        dies_at_call(patched, owner, name, number, before=before)
        with pytest.raises(Killed):
            work(folder)
    assert not (tmp_path / "data.h5").exists()
    entry = folder / "journal.json"
    done = json.loads(entry.read_text())["state"]["steps"] if entry.exists() else 0
    with open(folder / "data.h5", "ab") as file:
        file.write(b"what the last step left behind")
    assert work(folder) == STEPS - done
    assert (tmp_path / "data.h5").read_bytes() == whole
    assert [f.name for f in tmp_path.iterdir()] == ["data.h5"]


def test_a_journal_is_laid_over_again_without_harm(tmp_path, monkeypatch, whole):
    """Killed between the journal and the file, twice: the patches are the only place where a step's tables
    are.
    """
    folder = tmp_path / "data.h5.partial"
    for number in (4, 2):
        with monkeypatch.context() as patched:
            dies_at_call(patched, ResumableH5, "_lay_over", number)
            with pytest.raises(Killed):
                work(folder)
    entry = json.loads((folder / "journal.json").read_text())
    assert entry["patches"] and entry["patches"][0][0] == 0  # the superblock at least
    work(folder)
    assert (tmp_path / "data.h5").read_bytes() == whole


def test_the_file_is_that_of_plain_hdf5(tmp_path):
    work(tmp_path / "data.h5.partial", size=300_000)
    with h5py.File(tmp_path / "data.h5") as file:
        assert sorted(file) == sorted(f"{letter}{i}" for letter in "ab" for i in range(STEPS))
        for i in range(STEPS):
            assert (
                file[f"a{i}"][()] == bytes([i + 1]) * 300_000 and file[f"b{i}"][()] == bytes([i + 101]) * 10
            )


@pytest.mark.parametrize("owner, allowed", [("pwrite", 12), ("fsync", 7)])
def test_a_full_disk_is_one_sentence_and_costs_only_the_step(tmp_path, monkeypatch, whole, owner, allowed):
    folder, calls = tmp_path / "data.h5.partial", []
    original = getattr(os, owner)

    def full(*args):
        calls.append(args)
        if len(calls) > allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, owner, full)
        with pytest.raises(
            OSError, match=r"\(No space left on device\): make room .* the same command goes on"
        ) as caught:
            work(folder)
    assert caught.value.errno is None
    assert 0 < work(folder) < STEPS
    assert (tmp_path / "data.h5").read_bytes() == whole


@pytest.mark.parametrize(
    "changed",
    [
        {"head": "2 16\n"},
        {"names": ["a/1.png", "c.png"]},
        {"names": ["b/ü\udce9.png", "a/1.png"]},  # the order counts
        {"labels": [0, 4]},
        {"more": [b"other pixels"]},
        {"more": []},
    ],
)
def test_everything_that_a_file_is_made_of_is_in_its_fingerprint(changed):
    made_of = {"head": "1 16\n", "names": ["a/1.png", "b/ü\udce9.png"], "labels": [0, 3], "more": [b"pixels"]}

    def of(head, names, labels, more):
        return journal.fingerprint(head, names, labels, *more)

    assert of(**made_of) != of(**made_of | changed)


def test_fingerprints_stay_what_they_are_so_that_unfinished_work_goes_on():
    found = journal.fingerprint("1 16\n", ["a/1.png", "b/ü\udce9.png"], [0, 3])
    assert found == "b22b6e0fd1f3c6a5bc1b5ab1d10202089c89146cee34e3600870afdd367e92f2"
    with pytest.raises(ValueError):
        journal.fingerprint("1 16\n", ["a/1.png", "b.png"], [0])


@pytest.mark.parametrize(
    ("state", "fits"),
    [
        ({"done": 3, "labelled": False}, True),
        ({"done": 5, "labelled": False, "unreadable": {"1": "broken", "2": "broken"}}, True),
        ({"done": 2, "labelled": False}, False),
        ({"done": 3, "labelled": False, "unreadable": {"1": "broken"}}, False),
        ({"done": 3, "labelled": True}, False),  # the labels are not there
    ],
)
def test_an_unfinished_file_holds_what_its_journal_says(tmp_path, state, fits):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        for i in range(3):
            file[f"0000{i // 2}/{i}"] = b"bytes"
        if fits:
            journal.check_count(file, state)
            file["dataset.json"] = b"labels"
            state = state | {"labelled": False}
        with pytest.raises(ValueError, match=r"^3 items instead of"):
            journal.check_count(file, state)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not name open files")
def test_bytes_are_on_the_disk_before_the_journal_counts_them_and_the_file_before_it_is_in_place(
    tmp_path, monkeypatch
):
    """A power cut may lose whatever was not synced, in any order."""
    events = []
    originals = {name: getattr(os, name) for name in ("fsync", "replace", "pwrite")}

    def note(name):
        def call(*args):
            path = args[0] if name == "replace" else os.readlink(f"/proc/self/fd/{args[0]}")
            events.append((name, "journal" if str(path).endswith(".partial") else "file"))
            return originals[name](*args)

        return call

    for name in originals:
        monkeypatch.setattr(os, name, note(name))
    work(tmp_path / "data.h5.partial", steps=2)
    order = [event for i, event in enumerate(events) if i == 0 or events[i - 1] != event]
    step = [("pwrite", "file"), ("fsync", "file"), ("fsync", "journal"), ("replace", "journal")]
    assert order == [*step, *step, ("fsync", "file"), ("replace", "file")]


def damage_journal(folder):
    (folder / "journal.json").write_text('{"fingerprint": "print"')


def damage_tail(folder):
    os.truncate(folder / "data.h5", (folder / "data.h5").stat().st_size - 100)


def damage_last_byte(folder):
    os.truncate(folder / "data.h5", (folder / "data.h5").stat().st_size - 1)


def damage_head(folder):
    with open(folder / "data.h5", "rb+") as file:
        file.write(bytes(5000))


def damage_all(folder):
    (folder / "data.h5").unlink()


@pytest.mark.parametrize("damage", [damage_journal, damage_tail, damage_last_byte, damage_head, damage_all])
def test_a_damaged_run_starts_over_and_says_so(tmp_path, monkeypatch, caplog, whole, damage):
    folder = tmp_path / "data.h5.partial"
    with monkeypatch.context() as patched:
        dies_at_call(patched, journal, "add_bytes", 9)
        with pytest.raises(Killed):
            work(folder)
    entry = json.loads((folder / "journal.json").read_text())
    if damage is damage_head:  # the journal holds these pages of the last step, so nothing is lost
        entry["patches"] = []
        (folder / "journal.json").write_text(json.dumps(entry))
    damage(folder)
    assert work(folder) == STEPS
    assert "is damaged" in caplog.text
    assert (tmp_path / "data.h5").read_bytes() == whole


def test_a_disk_that_cannot_be_read_is_no_reason_to_start_over(tmp_path, monkeypatch):
    folder = tmp_path / "data.h5.partial"
    with monkeypatch.context() as patched:
        dies_at_call(patched, journal, "add_bytes", 9)
        with pytest.raises(Killed):
            work(folder)

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(ResumableH5, "_lay_over", refuse)
        with pytest.raises(OSError, match=r"\(Input/output error\)"):
            work(folder)
    assert work(folder) == 2


def killed_in_step(folder, monkeypatch, call=9):
    with monkeypatch.context() as patched:
        dies_at_call(patched, journal, "add_bytes", call)
        with pytest.raises(Killed):
            work(folder)


def test_a_file_that_another_program_holds_is_no_reason_to_start_over(tmp_path, monkeypatch):
    folder = tmp_path / "data.h5.partial"
    killed_in_step(folder, monkeypatch)
    original = h5py.File

    def busy(file, *arguments, **options):
        if file == folder / "data.h5":
            raise BlockingIOError(errno.EAGAIN, "unable to lock file")
        return original(file, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(h5py, "File", busy)
        with pytest.raises(OSError, match=r"partial/data\.h5 is open in another program"):
            work(folder)
    assert work(folder) == 2


@pytest.mark.parametrize("text", [
    "[]",
    "3",
    "[" * 100_000,
    '{"fingerprint": "print"}',
    '{"fingerprint": "print", "size": 0, "written": 0, "patches": [], "state": {}}',
    '{"fingerprint": "print", "size": -1, "written": 0, "patches": [[9, "zz"]], "state": {"steps": 1}}',
])  # fmt: skip
def test_odd_journals_start_over(tmp_path, monkeypatch, caplog, whole, text):
    folder = tmp_path / "data.h5.partial"
    killed_in_step(folder, monkeypatch)
    (folder / "journal.json").write_text(text)
    assert work(folder) == STEPS and "is damaged" in caplog.text
    assert (tmp_path / "data.h5").read_bytes() == whole


def test_damage_that_shows_only_later_is_one_sentence(tmp_path, monkeypatch):
    folder = tmp_path / "data.h5.partial"
    killed_in_step(folder, monkeypatch)
    content = bytearray((folder / "data.h5").read_bytes())
    content[:8] = b"notHDF5!"
    (folder / "data.h5").write_bytes(content)
    entry = json.loads((folder / "journal.json").read_text())
    (folder / "journal.json").write_text(json.dumps(entry | {"patches": []}))
    with monkeypatch.context() as patched:
        patched.setattr(journal, "open_h5", lambda _: contextlib.nullcontext())
        with pytest.raises(
            ValueError, match=r"data\.h5 is not a whole HDF5 file .*: remove .*partial, and run"
        ):
            work(folder, check=lambda *_: None)


def test_what_others_put_into_the_folder_is_kept(tmp_path, whole):
    folder = tmp_path / "data.h5.partial"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    work(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "data.h5").read_bytes() == whole


def test_another_run_is_refused_or_discarded(tmp_path, monkeypatch):
    folder = tmp_path / "data.h5.partial"
    with monkeypatch.context() as patched:
        dies_at_call(patched, journal, "add_bytes", 9)
        with pytest.raises(Killed):
            work(folder)
    with pytest.raises(
        ValueError, match=r"unfinished run with other images or options: .* or discard it with --overwrite"
    ):
        ResumableH5(folder, "other", {"steps": 0}, accept)
    assert ResumableH5(folder, "other", {"steps": 0}, accept, discard=True).state == {"steps": 0}
    assert work(folder) == STEPS


def test_two_runs_at_once_are_refused(tmp_path):
    with locked(tmp_path / "data.h5.partial"):
        with pytest.raises(ValueError, match="another run is writing into"):
            work(tmp_path / "data.h5.partial")
    work(tmp_path / "data.h5.partial")


def test_a_file_system_without_locks_is_mentioned(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    work(tmp_path / "data.h5.partial")
    assert "cannot be locked (No locks available): make sure that no other run" in caplog.text
    assert (tmp_path / "data.h5").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"cannot write in .*file.* \(Not a directory\): choose another output folder$"
    ):
        work(tmp_path / "file" / "data.h5.partial")


def test_a_forked_process_does_not_hold_the_lock_of_a_killed_one(tmp_path):
    """As a loader's processes do, which notice late that the run is gone."""
    script = (
        "import multiprocessing, os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from repae_lite.utils.locks import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    child.start()\n"
        "    time.sleep(0.3)\n"
        "    print(child.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        with pytest.raises(ValueError, match="another run is writing"), locked(tmp_path / "run"):
            pass
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is still there
        with locked(tmp_path / "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
