"""The storage of the tests fails as it is told to, and only so."""

from __future__ import annotations

import fsspec
import pytest

from tests.faulty_storage import ERRORS, counts, create, set_faults


@pytest.fixture
def storage(tmp_path):
    """A file system with one checkpoint's directory in it; its root, and the local directory."""
    files, root = fsspec.core.url_to_fs(create(tmp_path / "bucket"))
    (tmp_path / "bucket/step_1").mkdir()
    files.pipe_file(f"{root}/step_1/manifest.json", b"{}")
    return files, root, tmp_path / "bucket"


def test_what_fails_follows_from_the_seed_and_is_counted(storage):
    def failures(seed: int) -> list[int]:
        files, root, bucket = storage
        set_faults(bucket, failing={"put": 0.3}, seed=seed)
        failed = []
        for number in range(100):
            try:
                files.pipe_file(f"{root}/x", b"x")
            except OSError:
                failed.append(number)
        assert counts(bucket)["put failed"] == len(failed)
        assert files.cat_file(f"{root}/x") == b"x"
        return failed

    first = failures(1)
    assert first == failures(1) != failures(2)
    assert 15 < len(first) < 45


@pytest.mark.parametrize("error", ERRORS)
def test_it_raises_what_libraries_raise_and_passes(storage, error):
    files, root, bucket = storage
    set_faults(bucket, failing={"get": 1.0}, num_failures=1, error=error)
    with pytest.raises(type(ERRORS[error]())):
        files.cat_file(f"{root}/step_1/manifest.json")
    assert files.cat_file(f"{root}/step_1/manifest.json") == b"{}"


def test_listings_and_contents_lie(storage):
    files, root, bucket = storage
    set_faults(bucket, omitted=["step_1"], invented=["step_7"], contents={"*/manifest.json": "[]"})
    assert [name.rsplit("/", 1)[1] for name in files.ls(root, detail=False)] == ["step_7"]
    assert files.exists(f"{root}/step_1/manifest.json")
    assert not files.exists(f"{root}/step_7")
    assert files.cat_file(f"{root}/step_1/manifest.json") == b"[]"
    set_faults(bucket, gone=["step_1*"])
    assert files.ls(root, detail=False) == [f"{root}/step_1"]
    with pytest.raises(FileNotFoundError):
        files.cat_file(f"{root}/step_1/manifest.json")
