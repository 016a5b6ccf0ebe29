from __future__ import annotations

import pytest

from monai_conres.files import atomic_path, find_files


def test_a_file_is_replaced_when_complete(tmp_path):
    file = tmp_path / "a" / "table.md"
    for text in ("first", "second"):
        with atomic_path(file) as temporary:
            temporary.write_text(text)
            assert temporary.suffix == ".md"
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == text
    assert list(file.parent.iterdir()) == [file]


def test_hidden_files_are_not_found(tmp_path):
    for name in ("scan.nii", "._scan.nii", ".scan.nii"):  # as macOS leaves them on other file systems
        (tmp_path / name).touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "scan.nii").touch()
    assert find_files(tmp_path, "*.nii") == [tmp_path / "scan.nii"]


def test_a_folder_appears_when_complete(tmp_path):
    with atomic_path(tmp_path / "data") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("x")
        assert not (tmp_path / "data").exists()
    assert (tmp_path / "data" / "file").read_text() == "x"
    with pytest.raises(OSError, match="not empty"), atomic_path(tmp_path / "data") as temporary:
        temporary.mkdir()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_of_what_was_interrupted(tmp_path, error):
    def write() -> None:
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_linked_folders_are_looked_into_once(tmp_path):
    """A data set may be links to cases that are kept elsewhere."""
    for folder in ("elsewhere/case1", "elsewhere/case2", "data/case3"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "scan.nii.gz").touch()
        (tmp_path / folder / "notes.txt").touch()
    (tmp_path / "data" / "case1").symlink_to(tmp_path / "elsewhere" / "case1")
    (tmp_path / "data" / "case2").symlink_to(tmp_path / "elsewhere" / "case2")
    (tmp_path / "data" / "case2" / "back").symlink_to(tmp_path / "data")
    expected = [tmp_path / "data" / case / "scan.nii.gz" for case in ("case1", "case2", "case3")]
    assert find_files(tmp_path / "data", "*.nii*") == expected
