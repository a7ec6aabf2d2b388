"""Datasets of object storage: copied once, whole or not at all, by one process of a machine."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from pathlib import Path

import fsspec
import pytest

from tests.faulty_storage import FaultyFileSystem, create, set_faults
from w1train.data import remote
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.remote import localize
from w1train.runtime import object_storage
from w1train.runtime.object_storage import ObjectStorage, WrongSizeError


@pytest.fixture
def bucket(make_dataset, tmp_path):
    """A dataset in fsspec's storage in memory; its prefix there, and a local copy."""
    local = make_dataset(tmp_path / "x", [[20 + i] * 9 for i in range(30)])
    storage = fsspec.filesystem("memory")
    for suffix in ("bin", "idx", "json"):
        storage.pipe_file(f"/bucket/{tmp_path.name}/x.{suffix}", Path(f"{local.prefix}.{suffix}").read_bytes())
    return f"memory://bucket/{tmp_path.name}/x", local


def test_a_copy_is_the_dataset(bucket, tmp_path, caplog):
    prefix, local = bucket
    with caplog.at_level(logging.INFO):
        copy = TokenDataset.open(localize(prefix, str(tmp_path / "cache")))
    copy.verify_hashes()
    assert copy.read(0, copy.num_tokens).tolist() == local.read(0, local.num_tokens).tolist()
    assert caplog.text.count("copied") == 3
    localize(prefix, str(tmp_path / "cache"))
    assert caplog.text.count("copied") == 3, "what is there is not copied again"


def test_a_changed_file_is_copied_again(bucket, tmp_path):
    prefix, _ = bucket
    copy = Path(localize(prefix, str(tmp_path / "cache")))
    storage = fsspec.filesystem("memory")
    content = storage.cat_file(f"{prefix}.bin")[:-2]
    storage.pipe_file(f"{prefix}.bin", content)
    assert localize(prefix, str(tmp_path / "cache")) == str(copy)
    assert Path(f"{copy}.bin").read_bytes() == content


def test_a_damaged_stamp_is_written_again(bucket, tmp_path, caplog):
    """A crash may leave any bytes in the file that says which version was copied."""
    prefix, _ = bucket
    stamp = Path(f"{localize(prefix, str(tmp_path / 'cache'))}.bin.version")
    content = stamp.read_bytes()
    stamp.write_bytes(b"\xff\0")
    with caplog.at_level(logging.INFO):
        localize(prefix, str(tmp_path / "cache"))
    assert caplog.text.count("copied") == 1
    assert stamp.read_bytes() == content


def test_local_datasets_stay_where_they_are():
    assert localize("data/train", None) == "data/train"


def test_processes_share_one_copy(make_dataset, tmp_path):
    """Through file://, whose storage every process sees."""
    local = make_dataset(tmp_path / "x", [[20 + i] * 9 for i in range(30)])
    cache = tmp_path / "cache"
    log = tmp_path / "log"

    def fill():
        logging.basicConfig(level=logging.INFO, filename=log, force=True)
        localize(f"file://{local.prefix}", str(cache))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text().count("copied") == 3
    assert not list(cache.rglob("*.partial"))


class Breaking:
    """A storage whose reads end early, or fail, a number of times."""

    def __init__(self, content: bytes, num_failures: int) -> None:
        self.content, self.num_failures = content, num_failures

    def invalidate_cache(self):
        pass

    def info(self, path):
        return {"size": len(self.content)}

    def open(self, path, mode):
        self.num_failures -= 1
        return fsspec.implementations.memory.MemoryFile(data=self.content if self.num_failures < 0 else self.content[:5])


def test_a_copy_that_breaks_off_is_tried_again_and_never_half(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(object_storage, "retry_seconds", 0.0)
    target, storage = tmp_path / "x.bin", ObjectStorage("breaking://b/x")
    storage.__dict__["_opened"] = Breaking(b"0123456789", 4), "b/x"
    remote._fill(storage, "b/x.bin", target, "", required=True)
    assert target.read_bytes() == b"0123456789"
    assert caplog.text.count("5 bytes came, expected 10") == 4
    target.unlink()
    storage.__dict__["_opened"] = Breaking(b"0123456789", 5), "b/x"
    with pytest.raises(WrongSizeError, match=r"breaking://b/x: could not fetch b/x\.bin, 5 times in a row: 5 bytes came, expected 10"):
        remote._fill(storage, "b/x.bin", target, "", required=True)
    assert not list(tmp_path.glob("x.bin*"))


@pytest.mark.parametrize(("prefix", "message"), [("memory://nowhere/x", "does not exist"), ("nosuch://bucket/x", "nosuch")])
def test_what_is_not_there_is_named(prefix, message, tmp_path):
    num_threads = threading.active_count()
    with pytest.raises(DatasetError, match=message):
        localize(prefix, str(tmp_path))
    assert threading.active_count() == num_threads


def test_another_password_finds_the_same_copy_and_none_at_all_is_said(bucket, tmp_path, monkeypatch):
    prefix, _ = bucket
    asked, original = [], fsspec.core.url_to_fs

    def file_system(url: str):
        asked.append(url)
        return original(url.replace("user:first@", "").replace("user:second@", ""))

    monkeypatch.setattr(fsspec.core, "url_to_fs", file_system)
    urls = [prefix.replace("://", f"://user:{password}@") for password in ("first", "second", "***")]
    cache = str(tmp_path / "cache")
    assert localize(urls[0], cache) == localize(urls[1], cache)
    assert asked == urls[:2], "the storage is asked with the password"
    with pytest.raises(DatasetError, match=r"\*\*\* stands for a password.*--validation"):
        localize(urls[2], cache)


@pytest.fixture
def faulty(make_dataset, tmp_path, monkeypatch):
    """A dataset in a storage with faults: its URL, and the storage's directory."""
    monkeypatch.setattr(object_storage, "retry_seconds", 0.0)
    url = create(tmp_path / "bucket")
    make_dataset(tmp_path / "bucket/x", [[20 + i] * 9 for i in range(30)])
    return f"{url}/x", tmp_path / "bucket"


@pytest.mark.parametrize("kind", ["info", "get"])
@pytest.mark.parametrize("error", ["OSError", "ClientError", "HttpError denied", "KeyError"])
def test_a_storage_that_fails_is_one_error_of_the_dataset(faulty, tmp_path, kind, error):
    """And not a dataset that does not exist, which fsspec makes of a storage that cannot be reached."""
    url, bucket = faulty
    set_faults(bucket, failing={kind: 1.0}, error=error)
    with pytest.raises(DatasetError, match=f"^{url}: could not .*Check the ") as raised:
        localize(url, str(tmp_path / "cache"))
    assert "\n" not in str(raised.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    set_faults(bucket, failing={kind: 1.0}, error="ClientError", num_failures=4)
    TokenDataset.open(localize(url, str(tmp_path / "cache"))).verify_hashes()


@pytest.mark.parametrize(
    "listed", ["/etc/x_00000.bin", "{root}/../../y_00000.bin", "{root}_00000/../z.bin", "{root}_a.bin", "{root}_00000.bin.bin"]
)
def test_what_a_listing_has_of_elsewhere_is_refused(faulty, tmp_path, monkeypatch, listed):
    url, bucket = faulty
    monkeypatch.setattr(ObjectStorage, "glob", lambda self, pattern: [f"{bucket}/s_00000.bin", listed.format(root=f"{bucket}/s")])
    with pytest.raises(DatasetError, match=r"the storage lists '.*', which is not a shard of this dataset"):
        localize(url.replace("/x", "/s"), str(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("size", "message"), [(10**18, "does not fit into"), (None, "does not say how long"), (-1, "does not say how long")]
)
def test_sizes_that_are_none_or_too_large_are_refused(faulty, tmp_path, monkeypatch, size, message):
    url, _ = faulty
    monkeypatch.setattr(FaultyFileSystem, "info", lambda self, path: {"name": path, "size": size, "type": "file"})
    with pytest.raises(DatasetError, match=message):
        localize(url, str(tmp_path / "cache"))


@pytest.mark.parametrize("url", ["faulty:///", "faulty:///a/.."])
def test_a_url_without_a_name_is_refused(url, tmp_path):
    with pytest.raises(DatasetError, match="does not end in the name of a dataset"):
        localize(url, str(tmp_path / "cache"))
