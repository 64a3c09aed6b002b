"""Files and batches on disk, without HTTP: visibility, ownership, paging, and death at any instant."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest

from trio_llm.errors import ConfigError, InvalidRequestError
from trio_llm.server.batches.batch_store import BatchStore, LineError, LineRecord, PendingLine, read_line
from trio_llm.server.batches.database import Database, is_id, new_id
from trio_llm.server.batches.disk import Disk
from trio_llm.server.batches.file_store import FileStore, Quotas
from trio_llm.server.errors import HttpError

NUM_LINES = 7


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(name="clock")
def _clock() -> Clock:
    return Clock()


@pytest.fixture(name="database")
def _database(tmp_path: Path):
    with Database(tmp_path / "data") as database:
        yield database


@pytest.fixture(name="files")
def _files(database: Database, clock: Clock) -> FileStore:
    return FileStore(database, clock)


@pytest.fixture(name="batches")
def _batches(database: Database, files: FileStore, clock: Clock) -> BatchStore:
    return BatchStore(database, files, clock)


def put(files: FileStore, data: bytes = b"hello\n", **kwargs) -> str:
    """Store a file and return its id."""
    with files.create("in.jsonl", "batch", **kwargs) as writer:
        writer.write(data)
        return writer.commit().id


def contents(files: FileStore, file_id: str) -> bytes:
    """Read a file back."""
    with files.open(file_id) as file:
        return file.read()


def new_batch(batches: BatchStore, input_file_id: str, **kwargs) -> str:
    """Accept a batch and return its id."""
    return batches.create(
        input_file_id=input_file_id,
        endpoint="/v1/completions",
        completion_window="24h",
        window_s=86_400,
        metadata={"a": "b"},
        **kwargs,
    )["id"]


def lines_of(count: int) -> list[PendingLine]:
    """Make a work list."""
    return [PendingLine(line, f"c{line}", 10 * line, 9) for line in range(count)]


def unanswered(line: PendingLine) -> bytes:
    """Make the error line of a line that got no answer."""
    return json.dumps({"custom_id": line.custom_id, "error": "none"}).encode()


def test_a_file_reads_back_what_was_written(files: FileStore) -> None:
    """A committed file has the bytes, the size and the metadata it was given."""
    file_id = put(files, b"x" * 3_000_000)
    stored = files.get(file_id)
    assert stored is not None and stored.bytes == 3_000_000 and stored.purpose == "batch"
    assert contents(files, file_id) == b"x" * 3_000_000
    assert stored.to_openai().object == "file" and not hasattr(stored.to_openai(), "owner")


def test_a_file_not_committed_never_was(files: FileStore, database: Database) -> None:
    """Leaving the writer without a commit leaves neither row nor bytes."""
    with files.create("a", "batch") as writer:
        writer.write(b"half")
    assert files.get(writer.id) is None
    assert list(database.files.iterdir()) == []


def test_what_a_crash_left_is_removed_at_the_next_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that was being written, or deleted, is gone after the next start, which says so; no other file is."""
    with Database(tmp_path) as database:
        files = FileStore(database, Clock())
        kept, deleted = put(files), put(files)
        torn = files.create("a", "batch")
        torn.write(b"half")
        files.path(deleted).unlink()
        files.path(deleted).mkdir()  # unlink fails
        with pytest.raises(OSError, match="directory"):
            files.delete(deleted)
        files.path(deleted).rmdir()
        files.path(deleted).write_bytes(b"still there")
        strangers = ["thesis.tex", new_id("file")]
        for name in strangers:
            (database.files / name).write_bytes(b"the only copy")
    with Database(tmp_path) as database:
        assert {path.name for path in database.files.iterdir()} == {kept, *strangers}
        assert database.connection.execute("SELECT count(*) FROM leftovers").fetchone()[0] == 0
    assert torn.id in caplog.text and deleted in caplog.text
    torn.close()


def test_owners_do_not_see_each_other(files: FileStore, batches: BatchStore) -> None:
    """Another key's file or batch does not exist: not by id, not in a list, not for deletion or cancelling."""
    file_id = put(files, owner="key-a")
    batch_id = new_batch(batches, file_id, owner="key-a")
    assert files.get(file_id, "key-b") is None
    assert not files.delete(file_id, "key-b")
    assert files.page(owner="key-b", limit=10, newest_first=True) == ([], False)
    assert batches.get(batch_id, "key-b") is None
    assert batches.cancel(batch_id, "key-b") is None
    assert batches.page(owner="key-b", limit=10) == ([], False)
    assert files.get(file_id, "key-a") is not None and batches.get(batch_id, "key-a")["status"] == "validating"


def test_paging_shows_every_file_once(files: FileStore) -> None:
    """Following `after` until there is no more yields each file exactly once, in either order."""
    made = [put(files) for _ in range(7)]
    for newest_first in (True, False):
        seen: list[str] = []
        more = True
        while more:
            page, more = files.page(after=seen[-1] if seen else None, limit=3, newest_first=newest_first)
            seen += [stored.id for stored in page]
        assert seen == (made[::-1] if newest_first else made)


def test_paging_shows_every_batch_once(files: FileStore, batches: BatchStore) -> None:
    """Batches page newest first, each once."""
    file_id = put(files)
    made = [new_batch(batches, file_id) for _ in range(5)]
    first, more = batches.page(limit=3)
    second, end = batches.page(after=first[-1]["id"], limit=3)
    assert [batch["id"] for batch in first + second] == made[::-1] and more and not end


def test_a_page_after_what_is_not_there_is_no_end(files: FileStore, batches: BatchStore) -> None:
    """Who deletes what a page showed, and asks for the next one, is told so; others' entries do not count."""
    first, second = put(files), put(files)
    batch_id = new_batch(batches, first)
    assert files.page(after=second, limit=1, newest_first=True)[0][0].id == first
    assert files.delete(second)
    for owner, after in (("", second), ("", "nope"), ("key-b", first)):
        with pytest.raises(InvalidRequestError, match=rf"after = '{after}' is none of the files that there are\."):
            files.page(owner=owner, after=after, limit=1, newest_first=True)
    for owner, after in (("", first), ("key-b", batch_id)):
        with pytest.raises(InvalidRequestError, match=rf"after = '{after}' is none of the batches that there are\."):
            batches.page(owner=owner, after=after, limit=1)


def test_an_expired_file_is_gone(files: FileStore, database: Database, clock: Clock) -> None:
    """After its time a file is neither shown nor kept."""
    file_id = put(files, expires_after_s=60)
    clock.now += 59
    assert files.get(file_id) is not None
    clock.now += 1
    assert files.get(file_id) is None
    assert files.delete_expired() == 1
    assert list(database.files.iterdir()) == []


def test_a_running_batch_keeps_its_expired_input(files: FileStore, batches: BatchStore, clock: Clock) -> None:
    """An input file stays on disk until the batch that reads it has ended."""
    file_id = put(files, expires_after_s=60)
    batch_id = new_batch(batches, file_id)
    clock.now += 61
    assert files.in_use(file_id) and files.delete_expired() == 0
    batches.fail(batch_id, [LineError("empty_file", "no line")])
    assert not files.in_use(file_id) and files.delete_expired() == 1


@pytest.mark.parametrize(
    "name", ["../x", "file-", "file-" + "g" * 32, "file-" + "0" * 33, "/etc/passwd", "file-\x00", ""]
)
def test_only_ids_of_ours_become_paths(files: FileStore, name: str) -> None:
    """No string but a well-formed id reaches the file system."""
    assert not is_id(name)
    with pytest.raises(ValueError, match="not a file id"):
        files.path(name)
    assert files.get(name) is None and not files.delete(name)


def test_a_link_in_place_of_a_file_is_not_followed(files: FileStore, database: Database, tmp_path: Path) -> None:
    """Reading refuses a symbolic link, whatever it points to."""
    file_id = put(files)
    secret = tmp_path / "secret"
    secret.write_text("s")
    files.path(file_id).unlink()
    files.path(file_id).symlink_to(secret)
    with pytest.raises(OSError, match="symbolic"):
        files.open(file_id)


def test_a_directory_serves_one_process(tmp_path: Path) -> None:
    """A second server on the same directory is refused by name instead of running the same batches."""
    with Database(tmp_path), pytest.raises(ConfigError, match="in use by another server"):
        Database(tmp_path)
    Database(tmp_path).close()


def test_a_batch_from_first_line_to_output_file(files: FileStore, batches: BatchStore) -> None:
    """Answers come out in input order, failures in the error file, counts and usage add up."""
    batch_id = new_batch(batches, put(files))
    assert batches.get(batch_id)["status"] == "validating"
    assert batches.add_lines(batch_id, iter(lines_of(4))) == 4
    assert batches.get(batch_id)["status"] == "in_progress"
    batches.record(batch_id, [LineRecord(3, b'{"n":3}', failed=False, prompt_tokens=5, completion_tokens=2)])
    batches.record(batch_id, [LineRecord(1, b'{"n":1}', failed=True), LineRecord(0, b'{"n":0}', failed=False)])
    assert [line.line for line in batches.pending(batch_id, after_line=-1, limit=10)] == [2]
    batches.record(batch_id, [LineRecord(2, b'{"n":2}', failed=False, prompt_tokens=1, cached_tokens=1)])
    batches.finish(batch_id, "completed", unanswered)
    batch = batches.get(batch_id)
    assert batch["status"] == "completed" and batches.unfinished() == []
    assert batch["request_counts"] == {"total": 4, "completed": 3, "failed": 1}
    assert batch["usage"]["input_tokens"] == 6 and batch["usage"]["output_tokens"] == 2
    assert batch["usage"]["input_tokens_details"] == {"cached_tokens": 1}
    assert contents(files, batch["output_file_id"]) == b'{"n":0}\n{"n":2}\n{"n":3}\n'
    assert contents(files, batch["error_file_id"]) == b'{"n":1}\n'


def test_the_first_answer_to_a_line_stands(batches: BatchStore, files: FileStore) -> None:
    """A second record for the same line changes neither the text nor the counts."""
    batch_id = new_batch(batches, put(files))
    batches.add_lines(batch_id, lines_of(1))
    batches.record(batch_id, [LineRecord(0, b"first", failed=False)])
    batches.record(batch_id, [LineRecord(0, b"second", failed=True)])
    batches.finish(batch_id, "completed", unanswered)
    batch = batches.get(batch_id)
    assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert contents(files, batch["output_file_id"]) == b"first\n"


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_lines_never_answered_go_to_the_error_file(batches: BatchStore, files: FileStore, status: str) -> None:
    """A batch cut short keeps the answers it has and accounts for every other line."""
    batch_id = new_batch(batches, put(files))
    batches.add_lines(batch_id, lines_of(3))
    batches.record(batch_id, [LineRecord(1, b"one", failed=False)])
    if status == "cancelled":
        assert batches.cancel(batch_id)["status"] == "cancelling"
    batches.finish(batch_id, status, unanswered)
    batch = batches.get(batch_id)
    assert batch["status"] == status and batch[f"{status}_at"] is not None
    assert batch["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
    errors = [json.loads(line) for line in contents(files, batch["error_file_id"]).splitlines()]
    assert [error["custom_id"] for error in errors] == ["c0", "c2"]


def test_cancelling_an_ended_batch_changes_nothing(batches: BatchStore, files: FileStore) -> None:
    """Cancel is idempotent and never reopens a batch."""
    batch_id = new_batch(batches, put(files))
    batches.fail(batch_id, [LineError("invalid_json_line", "not JSON", 3)])
    batch = batches.cancel(batch_id)
    assert batch["status"] == "failed" and batch["cancelling_at"] is None
    assert batch["errors"]["data"] == [{"code": "invalid_json_line", "message": "not JSON", "line": 3, "param": None}]


def test_two_lines_with_one_custom_id_are_refused(batches: BatchStore, files: FileStore) -> None:
    """The work list of a batch with a duplicate custom_id is not made, not even in part."""
    batch_id = new_batch(batches, put(files))
    with pytest.raises(sqlite3.IntegrityError):
        batches.add_lines(batch_id, [PendingLine(0, "same", 0, 1), PendingLine(1, "same", 1, 1)])
    assert batches.pending(batch_id, after_line=-1, limit=10) == []


def test_a_line_is_read_from_where_it_stands(files: FileStore) -> None:
    """Lines are found by position, so the input is never held whole."""
    with files.open(put(files, b"aaa\nbbbb\ncc\n")) as file:
        assert read_line(file, PendingLine(1, "x", 4, 4)) == b"bbbb"


WORKER = """
import json, os, signal, sys
from pathlib import Path
from trio_llm.server.batches.batch_store import BatchStore, LineRecord, PendingLine
from trio_llm.server.batches.database import Database
from trio_llm.server.batches.file_store import FileStore, Quotas
from trio_llm.server.errors import HttpError

directory, die_at = Path(sys.argv[1]), int(sys.argv[2])
calls = 0

def mortal(function):
    def call(*args):
        global calls
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call

# Everything a process can be killed between: syncs and transaction boundaries.
os.fsync = mortal(os.fsync)
import trio_llm.server.batches.database as module
module.Transaction.__enter__ = mortal(module.Transaction.__enter__)
real_exit = module.Transaction.__exit__
chance = mortal(lambda: None)
module.Transaction.__exit__ = lambda self, *exc: chance() or real_exit(self, *exc) or chance()

with Database(directory) as database:
    files = FileStore(database, lambda: 5.0)
    batches = BatchStore(database, files, lambda: 5.0)
    for batch_id, _ in batches.unfinished():
        if batches.row(batch_id)["status"] == "validating":
            batches.add_lines(batch_id, [PendingLine(i, f"c{i}", 0, 0) for i in range(int(sys.argv[3]))])
        done = -1
        while chunk := batches.pending(batch_id, after_line=done, limit=2):
            batches.record(batch_id, [LineRecord(line.line, json.dumps({"line": line.line, "by": "x"}).encode(),
                                                 failed=line.line == 3) for line in chunk])
            done = chunk[-1].line
        batches.finish(batch_id, "completed", lambda line: b"unanswered")
print(calls)
"""


def run_worker(directory: Path, die_at: int) -> subprocess.CompletedProcess[str]:
    """Work off all batches in a process that kills itself at its die_at-th chance; 0 for never."""
    return subprocess.run(
        [sys.executable, "-c", WORKER, str(directory), str(die_at), str(NUM_LINES)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_batch_killed_anywhere_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """SIGKILL at every sync and every transaction boundary, then a restart: each line stands in the output once."""
    start = tmp_path / "start"
    with Database(start) as database:
        files = FileStore(database, lambda: 5.0)
        batch_id = new_batch(BatchStore(database, files, lambda: 5.0), put(files))
    kills = 0
    for die_at in range(1, 1000):
        directory = tmp_path / f"run{die_at}"
        shutil.copytree(start, directory)
        first = run_worker(directory, die_at)
        if first.returncode == -signal.SIGKILL:
            kills += 1
            assert run_worker(directory, 0).returncode == 0
        else:
            assert first.returncode == 0, first.stderr
        with Database(directory) as database:
            files = FileStore(database, lambda: 5.0)
            batch = BatchStore(database, files, lambda: 5.0).get(batch_id)
            assert batch["status"] == "completed"
            assert batch["request_counts"] == {"total": NUM_LINES, "completed": NUM_LINES - 1, "failed": 1}
            output = [json.loads(line)["line"] for line in contents(files, batch["output_file_id"]).splitlines()]
            assert output == [line for line in range(NUM_LINES) if line != 3]
            assert len(list(database.files.iterdir())) == 3
        shutil.rmtree(directory)
        if first.returncode == 0:
            break
    assert kills > 20


def test_a_commit_that_fails_leaves_no_transaction_open(database: Database) -> None:
    """Where SQLite refuses to commit, everything is rolled back and the next transaction can begin."""
    connection = database.connection
    connection.executescript(
        "PRAGMA foreign_keys = ON; CREATE TABLE a (id PRIMARY KEY);"
        "CREATE TABLE b (a REFERENCES a (id) DEFERRABLE INITIALLY DEFERRED);"
    )
    with pytest.raises(sqlite3.IntegrityError), database.transaction():
        connection.execute("INSERT INTO b VALUES (1)")
    with database.transaction():
        assert connection.execute("SELECT count(*) FROM b").fetchone()[0] == 0


# --- whose directory it is ------------------------------------------------------------------------------------------


def tree(directory: Path) -> dict[str, bytes | None]:
    """Return every path in a directory, and the bytes of files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def write(directory: Path, *names: str) -> None:
    """Make files, and the directories they are in."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"the only copy")


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (("thesis.tex",), "'thesis.tex'"),
        (("files/thesis.tex",), "'files/thesis.tex'"),
        ((".DS_Store", ".bashrc"), "'.bashrc'"),
        ((".git/HEAD",), "'.git'"),
        (("files/.thesis.tex.swp",), "'files/.thesis.tex.swp'"),
        (("files/file-" + "0" * 32, "lock"), "'files/file-000"),
        (("files/file-" + "0" * 32, "trio-llm.sqlite3-wal"), "'files/file-000"),
    ],
)
def test_a_directory_of_somebody_else_is_refused_as_it_is(tmp_path: Path, names: tuple[str, ...], named: str) -> None:
    """Without a database of ours nothing in a directory is ours: it is refused by the name of a file, and unchanged."""
    write(tmp_path, *names)
    before = tree(tmp_path)
    for empty in (False, True):
        if empty:  # A database that was lost: nothing is left in it.
            (tmp_path / "trio-llm.sqlite3").touch()
            before["trio-llm.sqlite3"] = b""
        with pytest.raises(ConfigError, match=re.escape(named)):
            Database(tmp_path)
        assert tree(tmp_path) == before


def test_a_fresh_file_system_is_empty_enough(tmp_path: Path) -> None:
    """What systems put into any directory is nobody's data: such a directory is taken, and they stay."""
    (tmp_path / "lost+found").mkdir()
    write(tmp_path, ".DS_Store", "files/.DS_Store", ".Trash-1000/info", ".nfs0000000000a1b2c300000004")
    there = tree(tmp_path).keys()
    for _ in range(2):
        Database(tmp_path).close()
    assert there <= tree(tmp_path).keys()


def spoil_header(path: Path) -> None:
    """Overwrite all of it."""
    path.write_bytes(b"garbage" * 1000)


def spoil_pages(path: Path) -> None:
    """Leave the first page alone."""
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Lose the second half."""
    os.truncate(path, path.stat().st_size // 2)


def grow(path: Path) -> None:
    """Make it 4 TiB of nothing."""
    path.write_bytes(b"")
    os.truncate(path, 1 << 42)


def of_another_program(path: Path) -> None:
    """Make another database."""
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (url)")


def of_the_future(path: Path) -> None:
    """Make it newer than this program."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 1000")


def loop(path: Path) -> None:
    """Link it to itself."""
    path.unlink()
    path.symlink_to(path)


def pipe(path: Path) -> None:
    """Make a pipe of it."""
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    """Make a directory of it."""
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil", [spoil_header, spoil_pages, cut, grow, of_another_program, of_the_future, loop, pipe, directory]
)
def test_a_spoilt_database_is_one_line(tmp_path: Path, spoil) -> None:
    """Whatever stands where the database should be, it is a ConfigError of one line, and files stay."""
    with Database(tmp_path) as database:
        files = FileStore(database, Clock())
        file_id = put(files)
        new_batch(BatchStore(database, files, Clock()), file_id)
    spoil(tmp_path / "trio-llm.sqlite3")
    with pytest.raises(ConfigError) as caught:
        Database(tmp_path)
    assert "\n" not in str(caught.value) and "server.data_dir" in str(caught.value)
    assert (tmp_path / "files" / file_id).exists()


def of_other_columns(path: Path) -> None:
    """Make a database of another program with tables of the same names."""
    with closing(sqlite3.connect(path)) as connection:
        for name in ("files", "batches", "lines"):
            connection.execute(f"CREATE TABLE {name} (name TEXT)")


@pytest.mark.parametrize("spoil", [spoil_header, of_another_program, of_other_columns, of_the_future])
def test_a_directory_that_is_refused_is_left_as_it_was(tmp_path: Path, spoil) -> None:
    """Neither our lock nor our folder stays in it, and another program's database is not changed."""
    with closing(sqlite3.connect(tmp_path / "trio-llm.sqlite3")) as connection:
        connection.execute("VACUUM")
    spoil(tmp_path / "trio-llm.sqlite3")
    before = tree(tmp_path)
    with pytest.raises(ConfigError):
        Database(tmp_path)
    assert tree(tmp_path) == before


def test_a_database_is_made_at_once(tmp_path: Path) -> None:
    """A start that is killed while it makes the database leaves none that the next one takes for somebody else's."""
    with closing(sqlite3.connect(tmp_path / "trio-llm.sqlite3")) as watcher:
        seen: list[int] = []

        def look(*_: object) -> int:
            seen.append(len(watcher.execute("SELECT name FROM sqlite_master").fetchall()))
            return 0

        connect = sqlite3.connect

        def watched(*args, **kwargs) -> sqlite3.Connection:
            connection = connect(*args, **kwargs)
            if args[0] != ":memory:":
                connection.set_trace_callback(look)
            return connection

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlite3, "connect", watched)
            Database(tmp_path).close()
        assert set(seen) <= {0, max(seen)}


@pytest.mark.parametrize("name", ["lock", "trio-llm.sqlite3-wal", "files"])
@pytest.mark.parametrize("spoil", [loop, pipe])
def test_whatever_stands_in_the_directory_is_one_line(tmp_path: Path, name: str, spoil) -> None:
    """Links in a circle and pipes in place of our files are refused at once; nobody waits for them."""
    Database(tmp_path).close()
    if name == "files":
        (tmp_path / name).rmdir()
    (tmp_path / name).touch()
    spoil(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        Database(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["loop", "file", "file/below", "x" * 300, "nul\0"])
def test_what_is_no_directory_is_one_line(tmp_path: Path, path: str) -> None:
    """A link in a circle, a file, a name that no file system takes."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        Database(tmp_path / path)
    assert "\n" not in str(caught.value) and "None" not in str(caught.value)


def test_nobody_else_can_read_what_is_stored(tmp_path: Path) -> None:
    """Files and database are their owner's alone, also in a directory that others can enter."""
    tmp_path.chmod(0o755)
    with Database(tmp_path) as database:
        put(FileStore(database, Clock()))
        modes = {path.name: path.stat().st_mode & 0o77 for path in tmp_path.rglob("*")}
    assert set(modes.values()) == {0}, modes


def test_quotas(database: Database, clock: Clock) -> None:
    """Bytes count from the first one written until the file is deleted, expired or given up, for each owner and all."""
    files = FileStore(database, clock, Quotas(in_all=100, per_owner=60))
    put(files, b"x" * 60, owner="a", expires_after_s=10)
    with pytest.raises(HttpError, match="--max-stored-bytes-per-key") as caught:
        put(files, b"x", owner="a")
    assert (caught.value.status, caught.value.code) == (413, "storage_quota_exceeded")
    with files.create("spool", "batch", owner="b") as spool:
        spool.write(b"x" * 40)
        with pytest.raises(HttpError, match=r"--max-stored-bytes\)"):
            put(files, b"x", owner="c")
    kept = put(files, b"x" * 40, owner="c")
    with files.create("out", "batch_output", owner="a") as results:
        results.write(b"x" * 1000)  # What exists is never refused.
    for again in (files, FileStore(database, clock, Quotas(in_all=100, per_owner=60))):  # Counted anew at a start.
        with pytest.raises(HttpError):
            put(again, b"x", owner="b")
    clock.now += 10
    assert files.delete_expired() == 1
    put(files, b"x" * 60, owner="a")
    assert files.delete(kept, "c")
    put(files, b"x" * 40, owner="b")


def test_a_user_without_a_home_has_no_default_directory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server of such a user runs without files, and says which flag gives them a place."""
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    disk = Disk(None, 8000)
    disk.open()
    assert not disk.is_open
    assert "There are no files and batches: ~ must be given: there is no home directory (--data-dir)" in caplog.text


def test_each_port_has_a_default_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two servers of one user both store files; one that finds its directory in use says so, and names the flag."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    servers = [Disk(None, port) for port in (8000, 8001, 8000)]
    for disk in servers:
        disk.open()
    assert [disk.is_open for disk in servers] == [True, True, False]
    assert f"{tmp_path}/trio-llm/8000 must not be in use by another server" in caplog.text
    assert "--data-dir" in caplog.text
    for disk in servers:
        disk.close()
