"""Atomic writes: a file is complete or absent, and a failed write leaves the old file."""

import sys

import pytest

from tda_lightning.stores.arguments import absolute_path
from tda_lightning.stores.integrity import durable
from tda_lightning.stores.integrity.durable import atomic_write


def test_a_file_is_complete_and_the_only_one(tmp_path):
    for content in ("old", "new"):
        with atomic_write(tmp_path / "file.txt") as partial:
            partial.write_text(content)
            assert partial.name == ".file.txt.partial"
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [
            ("file.txt", content)
        ]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["while writing", "while syncing"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error, moment):
    def fail(path):
        raise error

    def write():
        with atomic_write(tmp_path / "file.txt") as partial:
            partial.write_text("new")
            if moment == "while writing":
                fail(partial)

    (tmp_path / "file.txt").write_text("old")
    if moment == "while syncing":
        monkeypatch.setattr(durable, "make_durable", fail)
    with pytest.raises(error):
        write()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file.txt", "old")]


def test_a_missing_folder_is_named_and_the_temporary_file_is_not(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"There is no folder `.*nowhere` for `file\.txt`;"),
        atomic_write(tmp_path / "nowhere/file.txt"),
    ):
        pass


def test_the_content_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    synced = []

    def sync(path):
        synced.append((path.name, sorted(file.name for file in tmp_path.iterdir())))

    monkeypatch.setattr(durable, "make_durable", sync)
    with atomic_write(tmp_path / "file.txt") as partial:
        partial.touch()
    assert synced == [
        (".file.txt.partial", [".file.txt.partial"]),
        (tmp_path.name, ["file.txt"]),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="other names are possible there")
@pytest.mark.parametrize("name", ["run\0.tda", "run\ud800.tda"])
def test_a_name_that_no_file_can_have_is_refused(name):
    """The second cannot be written in UTF-8, as an umlaut cannot in the locale `C`."""
    with pytest.raises(ValueError, match=r"has characters that no file can have .* Rename it"):
        absolute_path(name)
