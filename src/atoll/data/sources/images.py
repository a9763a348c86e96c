"""Images: a folder of PNG or JPEG files with a table of labels, or an .npz of uint8 arrays.

The contract's image column says how large an image is; none is resized, and none is read that claims
another size. In a folder, the table (labels.csv, or the source's ``table``) names each row's file in its
column ``file``; files that no row names are not read. In an .npz, every array that the contract knows is a
column, [num_rows, …]; the source's ``columns`` says which.
"""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from PIL import Image

from atoll.contract.errors import SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.engine import Engine
from atoll.data.frame import ROW
from atoll.data.sources import SourceSpec, source
from atoll.data.sources.csv import open_csv

LABELS = "labels.csv"
FILE = "file"
BATCH_BYTES = 8 << 20
_MODES = {1: ("L", "1"), 3: ("RGB", "P"), 4: ("RGBA",)}
"""By number of channels, what is taken; a palette becomes colours, black and white become 0 and 255."""


@source("images", ".npz")
def open_images(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
    """The image column as height·width·channels bytes (row by row), the others as cells."""
    found = {spec.columns.get(n, n): c.shape for n, c in (schema.columns if schema else {}).items() if c.shape}
    if schema is None or len(found) != 1:
        raise SchemaError(
            "source.no-image-column", "images need a schema with one column of dtype image", field="columns",
            remedy="declare the image column with its shape",
        )  # fmt: skip
    [(name, shape)] = found.items()
    if path.is_dir():
        return _folder(spec, path, schema, engine, name, shape)
    try:
        with zipfile.ZipFile(path) as packed:
            return _arrays(
                packed, {spec.columns.get(n, n) for n in schema.columns}, schema.max_rows, engine, name, shape
            )
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError):  # ValueError: of a .npy header
        raise SchemaError(
            "source.unreadable", "the .npz file is damaged, or holds something else than plain arrays", field="path",
            remedy="write it with numpy.savez, without objects",
        ) from None  # fmt: skip


# ---------------------------------------------------------------- a folder


def _folder(
    spec: SourceSpec, folder: Path, schema: TableSchema, engine: Engine, name: str, shape: tuple[int, ...]
) -> ir.Table:
    path = folder / (spec.table or LABELS)
    if not path.is_file():
        raise SchemaError(
            "source.missing-file", f"the folder has no table of labels {path.name}", field="table",
            remedy="write one with a column file, or name it in the source's table",
        )  # fmt: skip
    table = open_csv(spec, path, schema, engine)
    if FILE not in table.columns or name in table.columns:
        raise SchemaError(
            "source.no-file-column", "the table of labels has no column file, or one named as the images are",
            field="table", remedy="name each row's image in a column file",
        )  # fmt: skip
    labels = pa.Table.from_batches(list(engine.batches(table)), table.schema().to_pyarrow())
    files = [folder / str(cell or "").strip() for cell in labels.column(FILE).to_pylist()]
    _check_files(files, folder, shape)
    kept = [n for n in labels.column_names if n not in (ROW, *(() if FILE in schema.columns else (FILE,)))]
    kinds = pa.schema([*(labels.schema.field(n) for n in kept), (name, pa.binary())])
    size = max(1, BATCH_BYTES // math.prod(shape))
    failed: list[Path] = []

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(files), size):
            cells = labels.select(kept).slice(start, size).combine_chunks()
            columns = [c.combine_chunks() for c in cells.columns]
            pixels = [_pixels(file, shape, failed) for file in files[start : start + size]]
            yield pa.record_batch([*columns, pa.array(pixels, pa.binary())], schema=kinds)

    try:
        return engine.load(pa.RecordBatchReader.from_batches(kinds, batches()))
    except SchemaError as error:
        raise (_refused(Counter(unreadable=1), len(files), shape) if failed else error) from None


def _check_files(files: list[Path], folder: Path, shape: tuple[int, ...]) -> None:
    """Refuse images that are not there, not readable, or of another size: from their headers, before any is decoded."""
    inside = folder.resolve()
    wrong: Counter[str] = Counter()
    for file in files:
        if not (file.is_file() and file.resolve().is_relative_to(inside)):
            wrong["missing"] += 1
            continue
        try:
            with Image.open(file, formats=("PNG", "JPEG")) as image:
                sized = image.size == (shape[1], shape[0]) and image.mode in _MODES.get(math.prod(shape[2:]), ())
        except Exception:
            wrong["unreadable"] += 1
        else:
            wrong["sized"] += not sized
    if wrong.total():
        raise _refused(wrong, len(files), shape)


def _refused(wrong: Counter[str], number: int, shape: tuple[int, ...]) -> SchemaError:
    what = {"missing": "not in the folder", "unreadable": "not readable as PNG or JPEG",
            "sized": f"not of shape {list(shape)}, 8 bits a channel"}  # fmt: skip
    told = ", ".join(f"{count} are {what[reason]}" for reason, count in wrong.items() if count)
    return SchemaError(
        "source.images", f"of {number} images, {told}", field="path",
        remedy="resize or convert the images, and correct the table of labels",
    )  # fmt: skip


def _pixels(file: Path, shape: tuple[int, ...], failed: list[Path]) -> bytes:
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:  # its size was checked
            return image.convert(_MODES[math.prod(shape[2:])][0]).tobytes()
    except Exception:
        failed.append(file)
        raise


# ---------------------------------------------------------------- an .npz


def _arrays(
    packed: zipfile.ZipFile, wanted: set[str], max_rows: int, engine: Engine, name: str, shape: tuple[int, ...]
) -> ir.Table:
    there = {member.filename.removesuffix(".npy"): member for member in packed.infolist()}
    if name not in there:
        raise _bad_array(f"there is no array {name!r}")
    with packed.open(there[name]) as file:
        rows, dtype, (num_rows, *size) = _header(file)
        header = file.tell()
    if dtype != np.uint8 or tuple(size) != tuple(shape) or not rows:
        raise _bad_array(f"the array {name!r} is not uint8 of shape [rows, {', '.join(map(str, shape))}]")
    wide = math.prod(shape)
    if num_rows > max_rows or there[name].file_size != header + num_rows * wide:
        raise _bad_array(f"the array {name!r} has more rows than the schema's max_rows, or fewer bytes than it says")
    cells = {n: _cells(packed, there[n], num_rows) for n in there if n in wanted and n != name}
    kinds = pa.schema([*((n, c.type) for n, c in cells.items()), (name, pa.binary())])
    step = max(1, BATCH_BYTES // wide)

    def batches() -> Iterator[pa.RecordBatch]:
        with packed.open(there[name]) as file:
            file.read(header)
            for start in range(0, num_rows, step):
                number = min(step, num_rows - start)
                buffer, ends = pa.py_buffer(file.read(number * wide)), np.arange(number + 1, dtype=np.int32) * wide
                pixels = pa.Array.from_buffers(pa.binary(), number, [None, pa.py_buffer(ends.astype("<i4")), buffer])
                yield pa.record_batch([*(c.slice(start, number) for c in cells.values()), pixels], schema=kinds)

    return engine.load(pa.RecordBatchReader.from_batches(kinds, batches()))


def _header(file: IO[bytes]) -> tuple[bool, np.dtype[Any], tuple[int, ...]]:
    """(row by row?, dtype, shape) of an .npy file; raises ValueError."""
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(file))
    if read is None:
        raise ValueError
    shape, columnwise, dtype = read(file)
    if not shape:
        raise ValueError
    return not columnwise or len(shape) == 1, dtype, shape


def _cells(packed: zipfile.ZipFile, member: zipfile.ZipInfo, num_rows: int) -> pa.Array:
    """An array of numbers or texts, [num_rows] or [num_rows, 1]."""
    name = member.filename.removesuffix(".npy")
    with packed.open(member) as file:
        _, dtype, shape = _header(file)
        if shape not in ((num_rows,), (num_rows, 1)) or dtype.kind not in "biufU" or dtype.itemsize > 4096:
            raise _bad_array(f"the array {name!r} is not one number or text for each of {num_rows} images")
        if member.file_size != file.tell() + num_rows * dtype.itemsize:
            raise _bad_array(f"the array {name!r} has fewer bytes than it says")
        array = np.frombuffer(file.read(num_rows * dtype.itemsize), dtype)
    if dtype.kind == "U":
        return pa.array(array.tolist(), pa.string())
    kind = "f8" if dtype.kind == "f" else "i1" if dtype.kind == "b" else dtype.newbyteorder("=")
    return pa.array(array.astype(kind))


def _bad_array(what: str) -> SchemaError:
    return SchemaError(
        "source.bad-array", what, field="columns",
        remedy="name the arrays in the source's columns; images are uint8 [rows, height, width(, channels)]",
    )  # fmt: skip
