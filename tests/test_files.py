from __future__ import annotations

import pytest

from monai_conres.files import atomic_path


def test_a_file_is_replaced_when_complete(tmp_path):
    file = tmp_path / "a" / "table.md"
    for text in ("first", "second"):
        with atomic_path(file) as temporary:
            temporary.write_text(text)
            assert temporary.suffix == ".md"
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == text
    assert list(file.parent.iterdir()) == [file]


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
