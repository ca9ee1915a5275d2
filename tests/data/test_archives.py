"""Images in a zip or tar beside the table, read where they are."""

import io
import tarfile
import zipfile

import pytest
from data_sets import load, png, write_jsonl

from apo_lora.data.archives import Member
from apo_lora.data.examples import drop_undecodable

FILES = {"set/images/a.png": png("red"), "set/images/b.png": png("blue", size=(20, 40))}


def archive(path, files):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as made:
            for name, content in files.items():
                made.writestr(name, content)
        return
    with tarfile.open(path, f"w:{path.suffix[1:]}" if path.suffix != ".tar" else "w") as made:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
        outside = tarfile.TarInfo("set/images/link.png")
        outside.type, outside.linkname = tarfile.SYMTYPE, "/etc/hostname"
        made.addfile(outside)


@pytest.mark.parametrize("name", ["images.zip", "images.tar", "images.tar.gz", "images.tar.xz"])
def test_images_are_found_by_their_path_or_its_end(name, tmp_path):
    archive(tmp_path / name, FILES)
    before = sorted(tmp_path.iterdir())
    paths = ["set/images/a.png", "images/b.png", "a.png", "more/set/images/b.png", "images/c.png", "images/link.png"]
    path = write_jsonl(tmp_path / "data.jsonl", [{"problem": "?", "answer": "1", "image": image} for image in paths])
    loaded = drop_undecodable(load(path))
    assert [example.images[0].size for example in loaded.examples] == [(60, 30), (20, 40)] * 2
    assert isinstance(loaded.examples[0].images[0].source, Member)
    assert loaded.examples[1].images[0].open().getpixel((0, 0)) == (0, 0, 255)
    assert [row for row, _ in loaded.dropped["image missing"]] == [5, 6]
    assert sorted(tmp_path.iterdir()) == sorted([*before, path])  # nothing was unpacked


def test_a_file_comes_before_an_archive_and_another_archive_is_no_guess(tmp_path):
    archive(tmp_path / "one.zip", {"x/a.png": png("red"), "c.png": png("red")})
    archive(tmp_path / "two.zip", {"y/a.png": png("blue"), "c.png": png("blue")})
    (tmp_path / "c.png").write_bytes(png("lime"))
    rows = [{"problem": "?", "answer": "1", "image": image} for image in ("c.png", "x/a.png", "y/a.png", "a.png")]
    loaded = load(write_jsonl(tmp_path / "data.jsonl", rows))
    colors = [example.images[0].open().getpixel((0, 0)) for example in loaded.examples]
    assert colors == [(0, 255, 0), (255, 0, 0), (0, 0, 255)]
    assert "may be one of 2 files" in loaded.dropped["image missing"][0][1]


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK and nothing else")
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"problem": "?", "answer": "1", "image": image} for image in ("a.png", "a.png", "b.png")]
    loaded = load(write_jsonl(tmp_path / "data.jsonl", rows))
    assert "images.zip beside the data cannot be read" in loaded.dropped["image missing"][0][1]
