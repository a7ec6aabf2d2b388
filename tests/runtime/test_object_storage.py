"""What the library of a storage raises becomes one error that says where and why; what may pass is tried again, and a refusal is not."""

from __future__ import annotations

import io
import logging
import pickle

import pytest

from tests.faulty_storage import ERRORS, counts, create, set_faults
from w1train.config.errors import UserError
from w1train.runtime import object_storage
from w1train.runtime.masking import mask
from w1train.runtime.object_storage import ATTEMPTS, ObjectStorage, StorageError, WrongSizeError, require_protocol

REFUSED = ("PermissionError", "ClientError denied", "HttpError denied")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A directory with the file ``x`` of ten bytes, which a faulty storage shows."""
    waits: list[float] = []
    monkeypatch.setattr(object_storage.time, "sleep", waits.append)
    create(tmp_path / "bucket")
    (tmp_path / "bucket/x").write_bytes(b"0123456789")
    return tmp_path / "bucket", ObjectStorage(f"faulty://{tmp_path}/bucket/"), waits


def actions(storage, tmp_path):
    """Each method, with the kind of operation that it fails with."""
    x = f"{storage.root}/x"
    return {
        "list": [lambda: storage.names(storage.root)],
        "info": [lambda: storage.exists(x), lambda: storage.info(x)],
        "get": [lambda: storage.read(x, 100), lambda: storage.download(x, io.BytesIO(), 10)],
        "put": [
            lambda: storage.write(x, b"0123456789"),
            lambda: storage.upload(tmp_path / "bucket/x", f"{storage.root}/y", lambda: None),
            lambda: storage.rename(f"{storage.root}/y", f"{storage.root}/z"),
        ],
        "remove": [lambda: storage.remove_file(x), lambda: storage.remove_directory(storage.root)],
    }


@pytest.mark.parametrize("error", ERRORS)
def test_each_error_of_a_library_is_one_error_with_the_url_and_what_to_check(bucket, tmp_path, error):
    directory, storage, waits = bucket
    for kind, methods in actions(storage, tmp_path).items():
        for method in methods:
            set_faults(directory, failing={kind: 1.0}, error=error)
            with pytest.raises(StorageError) as raised:
                method()
            message = str(raised.value)
            assert message.startswith(f"faulty://{tmp_path}/bucket: could not ")
            assert "\n" not in message
            assert type(ERRORS[error]()).__name__ in message
            assert ("Check the credentials" if error in REFUSED else "Check the URL, the credentials and the network") in message
            assert counts(directory)[kind] == (1 if error in REFUSED else ATTEMPTS)
            assert str(pickle.loads(pickle.dumps(raised.value))) == message, "rank 0 sends it to the others"
    assert sorted({*waits}) == ([] if error in REFUSED else [1.0, 2.0, 4.0, 8.0])


@pytest.mark.parametrize("error", sorted({*ERRORS} - {*REFUSED}))
def test_what_passes_is_met_with_another_attempt_and_said(bucket, tmp_path, error, caplog):
    directory, storage, _ = bucket
    for kind, methods in actions(storage, tmp_path).items():
        for method in methods:
            set_faults(directory, failing={kind: 1.0}, error=error, num_failures=ATTEMPTS - 1)
            caplog.clear()
            method()
            assert caplog.text.count("trying again") == ATTEMPTS - 1


def test_what_is_not_there_is_asked_for_once(bucket):
    directory, storage, waits = bucket
    missing = f"{storage.root}/nothing"
    assert not storage.exists(missing)
    assert storage.names(missing) == []
    storage.remove_file(missing)
    storage.remove_directory(missing)
    for method in (storage.info, lambda path: storage.read(path, 10), lambda path: storage.download(path, io.BytesIO(), 10)):
        with pytest.raises(FileNotFoundError, match=f"{directory}: could not .*nothing: it is not there"):
            method(missing)
    assert waits == []


def test_a_download_is_as_long_as_it_should_be(bucket):
    directory, storage, waits = bucket
    x = f"{storage.root}/x"
    file = io.BytesIO(b"what a broken attempt has left behind")
    storage.download(x, file, 10)
    assert file.getvalue() == b"0123456789"
    for expected in (0, 9, 11):
        with pytest.raises(WrongSizeError, match=f"x has 10 bytes, expected {expected}$"):
            storage.download(x, file, expected)
    assert waits == [], "the storage has said so: another attempt would find the same"
    for content, came in (("01234", "5 bytes came"), ("0123456789ABC", "more than the expected 10 bytes came")):
        set_faults(directory, contents={"x": content})
        with pytest.raises(WrongSizeError, match=f"could not fetch .*, {ATTEMPTS} times in a row: {came}"):
            storage.download(x, file, 10)
        assert len(file.getvalue()) <= 10
    assert storage.read(x, 3) == b"0123", "a byte more than the limit shows that there is more"


def test_a_full_local_disk_is_not_the_storages_fault(bucket):
    _, storage, waits = bucket
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        storage._do("fetch", "x", lambda files: object_storage._copy(files, f"{storage.root}/x", Full(full), 10))
    assert waits == []


class Full:
    """/dev/full, which cannot be truncated."""

    name = "/dev/full"

    def __init__(self, file):
        self.write, self.tell = file.write, lambda: 0

    def seek(self, offset):
        pass

    def truncate(self):
        pass


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ftp://me:secret@host/x", "ftp://me:***@host/x"),
        ("ftp://:secret@host/x", "ftp://:***@host/x"),
        ("two: a://u:p@h, b://v:q@h/x", "two: a://u:***@h, b://v:***@h/x"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("https://host:80/x", "https://host:80/x"),
    ],
)
def test_passwords_are_in_no_message(text, shown, caplog, monkeypatch):
    assert mask(text) == shown
    monkeypatch.setattr(object_storage, "retry_seconds", 0.0)
    storage = ObjectStorage("nosuch://me:secret@host/x")
    assert storage.url == "nosuch://me:***@host/x"
    with caplog.at_level(logging.INFO), pytest.raises(StorageError) as raised:
        storage.names("/")
    assert "secret" not in caplog.text + str(raised.value)


def test_an_unknown_protocol_is_a_mistake():
    with pytest.raises(UserError, match=r"^checkpoint.upload: nosuch://a:\*\*\*@b/x: .*nosuch"):
        require_protocol("checkpoint.upload", "nosuch://a:secret@b/x")
    require_protocol("checkpoint.upload", "file:///tmp/x")


def test_the_connection_is_opened_when_it_is_needed(monkeypatch):
    import fsspec

    def refuse(url):
        raise RuntimeError("no network")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    monkeypatch.setattr(object_storage, "retry_seconds", 0.0)
    storage = ObjectStorage("faulty:///x")
    with pytest.raises(StorageError, match="could not open it, 5 times in a row: RuntimeError: no network"):
        storage.names("/x")
