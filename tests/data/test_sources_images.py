"""Images: folders with a table of labels, and arrays."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

GREY = {"image": {"dtype": "image", "shape": [3, 4]}, "label": {"dtype": "integer", "values": [0, 1], "role": "label"}}
COLOUR = {"image": {"dtype": "image", "shape": [3, 4, 3]}, "label": GREY["label"]}
PIXELS = np.random.default_rng(1).integers(0, 256, (5, 3, 4), np.uint8)


def folder(path: Path, images: dict[str, np.ndarray], table: str = "labels.csv") -> None:
    path.mkdir(exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels).save(path / name)
    lines = [f"{name},{number % 2}" for number, name in enumerate(images)]
    (path / table).write_text("\n".join(["file,label", *lines]) + "\n")


def test_a_folder(tmp_path: Path, read_table: Any) -> None:
    folder(tmp_path / "x", {f"{i}.png": pixels for i, pixels in enumerate(PIXELS)})
    table = read_table(GREY, path="x", format="images")
    assert np.array_equal(table["image"], PIXELS)
    assert table["label"].tolist() == [0, 1, 0, 1, 0]
    with_file = read_table({**GREY, "file": {"dtype": "text", "role": "entity"}}, path="x", format="images")
    assert with_file["file"].tolist()[0] == "0.png"
    colour = np.stack([PIXELS] * 3, axis=-1)
    folder(tmp_path / "c", {f"{i}.png": pixels for i, pixels in enumerate(colour)}, "other.csv")
    assert np.array_equal(read_table(COLOUR, path="c", format="images", table="other.csv")["image"], colour)
    folder(tmp_path / "j", {"a.jpg": np.full((3, 4), 7, np.uint8)})
    assert np.array_equal(read_table(GREY, path="j", format="images")["image"], np.full((1, 3, 4), 7))


def test_images_that_are_not_there_not_readable_or_of_another_size(tmp_path: Path, refused: Any) -> None:
    folder(tmp_path / "x", {"a.png": PIXELS[0], "b.png": PIXELS[0][:2], "c.png": np.stack([PIXELS[0]] * 3, axis=-1)})
    (tmp_path / "out.png").write_bytes((tmp_path / "x" / "a.png").read_bytes())
    (tmp_path / "x" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n 7731977.31")
    with (tmp_path / "x" / "labels.csv").open("a") as file:
        file.write("../out.png,0\nnone7731977.31.png,1\nbad.png,1\n,1\n")
    error = refused(GREY, path="x", format="images")
    assert error.code == "source.images"
    assert "of 7 images, 2 are not of shape [3, 4]" in error.message
    assert "3 are not in the folder, 1 are not readable" in error.message
    (tmp_path / "x" / "labels.csv").write_text("picture,label\na.png,0\n")
    assert refused(GREY, path="x", format="images").code == "source.no-file-column"
    (tmp_path / "x" / "labels.csv").unlink()
    assert refused(GREY, path="x", format="images").code == "source.missing-file"
    assert refused({"label": GREY["label"]}, path="x", format="images").code == "source.no-image-column"


def test_a_truncated_image(tmp_path: Path, refused: Any) -> None:
    """Its header is sound, its pixels are not."""
    big = np.random.default_rng(2).integers(0, 256, (64, 64), np.uint8)
    folder(tmp_path / "x", {"a.png": big})
    data = (tmp_path / "x" / "a.png").read_bytes()
    (tmp_path / "x" / "a.png").write_bytes(data[: len(data) // 2])
    columns = {**GREY, "image": {"dtype": "image", "shape": [64, 64]}}
    assert refused(columns, path="x", format="images").code == "source.images"


NPZ = {"columns": {"image": "x", "label": "y"}}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays(tmp_path: Path, read_table: Any, save: Any) -> None:
    save(tmp_path / "t.npz", x=PIXELS, y=np.array([[0], [1], [1], [0], [1]], np.uint8), z=np.arange(9))
    table = read_table(GREY, path="t.npz", **NPZ)
    assert np.array_equal(table["image"], PIXELS)
    assert table["label"].tolist() == [0, 1, 1, 0, 1]
    save(tmp_path / "s.npz", x=PIXELS, y=np.array(["a", "b", "", "d", "中"]))
    columns = {**GREY, "label": {"dtype": "text"}}
    assert read_table(columns, path="s.npz", **NPZ)["label"].tolist() == ["a", "b", None, "d", "中"]


@pytest.mark.parametrize(
    ("x", "y", "code"),
    [
        (PIXELS[:, :2], np.zeros(5), "source.bad-array"),
        (PIXELS.astype(np.int16), np.zeros(5), "source.bad-array"),
        (np.asfortranarray(PIXELS), np.zeros(5), "source.bad-array"),
        (PIXELS, np.zeros(4), "source.bad-array"),
        (PIXELS, np.zeros((5, 2)), "source.bad-array"),
        (PIXELS, np.array([1, None, 2, 3, 4], object), "source.bad-array"),
        (PIXELS, np.float64(1), "source.unreadable"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, refused: Any, x: Any, y: Any, code: str) -> None:
    np.savez(tmp_path / "t.npz", x=x, y=y)
    assert refused(GREY, path="t.npz", **NPZ).code == code


def test_an_array_that_claims_more_than_it_holds(tmp_path: Path, refused: Any) -> None:
    """Nothing is allocated by what a header says."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 3, 4)})
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as packed:
        packed.writestr("x.npy", header.getvalue() + bytes(12))
        packed.writestr("y.npy", b"7731977.31")
    assert refused(GREY, path="t.npz", **NPZ).code == "source.bad-array"
    (tmp_path / "b.npz").write_bytes(b"7731977.31")
    assert refused(GREY, path="b.npz", **NPZ).code == "source.unreadable"
    np.savez(tmp_path / "n.npz", y=np.zeros(3))
    assert refused(GREY, path="n.npz", **NPZ).code == "source.bad-array"


def test_real_x_rays(atoll_data: Path, read_table: Any) -> None:
    columns = {**GREY, "image": {"dtype": "image", "shape": [28, 28]}}
    names = {"columns": {"image": "train_images", "label": "train_labels"}}
    table = read_table(columns, atoll_data / "pneumonia-mnist", path="pneumoniamnist.npz", **names)
    with np.load(atoll_data / "pneumonia-mnist" / "pneumoniamnist.npz", allow_pickle=False) as arrays:
        assert np.array_equal(table["image"], arrays["train_images"])
        assert np.array_equal(table["label"], arrays["train_labels"][:, 0])
