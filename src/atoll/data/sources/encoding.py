"""Text files as plain UTF-8: decompressed and transcoded in a stream, and what is wrong where that fails.

A file in another encoding is never guessed at: bytes that read well in two encodings mean different things.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa

from atoll.contract.errors import SchemaError
from atoll.data.engine import Engine

BLOCK_BYTES = 1 << 20
SAMPLE_LINES = 1000
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def compression(path: Path) -> str:
    """ "gzip", "zstd" or "none", by the file's first bytes."""
    with path.open("rb") as file:
        start = file.read(4)
    return "gzip" if start[:2] == b"\x1f\x8b" else "zstd" if start == b"\x28\xb5\x2f\xfd" else "none"


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed. Raises SchemaError where they break off."""
    packed = compression(path)
    try:
        with path.open("rb") as file:
            if packed == "gzip":
                yield io.BufferedReader(gzip.GzipFile(fileobj=file))
            elif packed == "zstd":
                yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"))
            else:
                yield file
    except (EOFError, OSError):  # BadGzipFile is an OSError
        raise SchemaError(
            "source.unreadable", "the file breaks off, or its compression is damaged", field="path",
            remedy="copy the file again",
        ) from None  # fmt: skip


@contextmanager
def spooled(engine: Engine) -> Iterator[Path]:
    """A new file in the engine's folder, 0600, gone afterwards."""
    number = sum(1 for _ in engine.folder.iterdir())
    path = engine.folder / f"spool-{number}-{os.urandom(8).hex()}"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def as_utf8(path: Path, encoding: str, engine: Engine) -> Iterator[Path]:
    """The file itself where it is UTF-8 without a byte order mark, else a copy that is. Raises SchemaError."""
    name = _codec(encoding)
    with opened(path) as file:
        start = file.read(4)
    if start[:3] == codecs.BOM_UTF8 and name == "utf-8":
        name = "utf-8-sig"
    if name == "utf-8":
        yield path
        return
    with spooled(engine) as copy:
        _transcode(path, name, copy)
        yield copy


def check_utf8(path: Path) -> None:
    """Raises SchemaError where the file is not UTF-8, naming a likely encoding or the first line in another one."""
    with opened(path) as file:
        if error := _mixture(file, "utf-8"):
            raise error


def _codec(encoding: str) -> str:
    try:
        found = codecs.lookup(encoding)
        "".encode(encoding)  # refuses codecs that are not of text, such as "base64"
    except (LookupError, UnicodeError, ValueError):
        raise SchemaError(
            "source.encoding", "the source names an unknown encoding", field="encoding",
            remedy="use a name such as utf-8, gb18030, big5, latin-1, windows-1252 or utf-16",
        ) from None  # fmt: skip
    return "utf-8" if found.name == "utf-8-sig" else "gb18030" if found.name in ("gbk", "gb2312") else found.name


def _transcode(path: Path, name: str, copy: Path) -> None:
    decoder = codecs.getincrementaldecoder(name)()
    wide = name.startswith(("utf-16", "utf-32"))
    suspicious = False
    try:
        with opened(path) as file, copy.open("wb") as out:
            while block := file.read(BLOCK_BYTES):
                suspicious = suspicious or not (wide or (block.isascii() and b"\0" not in block))
                out.write(decoder.decode(block).encode())
            out.write(decoder.decode(b"", final=True).encode())
    except UnicodeError:
        with opened(path) as file:
            raise (None if wide else _mixture(file, name)) or _wrong(name, file) from None
    if suspicious and name != "utf-8-sig":
        with opened(path) as file:
            if error := _mixture(file, name):
                raise error


def _mixture(file: IO[bytes], name: str) -> SchemaError | None:
    """What is wrong with lines that should all be in the encoding *name*; None if nothing is.

    Almost no line of another encoding happens to be valid UTF-8, so such a line is taken to be UTF-8;
    of Chinese encodings, if it has a character of three bytes.
    """
    double = name in ("gb18030", "big5", "big5hkscs", "shift_jis", "cp932", "euc_kr", "cp949", "euc_jp")
    strangers = natives = first = 0
    sample: list[bytes] = []
    for number, line in enumerate(file, 1):
        if line.isascii() and b"\0" not in line:
            continue
        if b"\0" in line:
            fits = False
        elif name.startswith("utf-8"):
            fits = decodes(line, "utf-8-sig")
        else:
            fits = decodes(line, name) and not (decodes(line, "utf-8") and _wide_enough(line, double))
        natives += fits
        if not fits:
            strangers, first = strangers + 1, first or number
            if len(sample) < SAMPLE_LINES:
                sample.append(line)
    if not strangers:
        return None
    likely = _likely(b"".join(sample))
    if natives:
        return SchemaError(
            "source.encoding", f"line {first} is not in the same encoding as others", field="encoding",
            remedy=f"write the whole file in one encoding; that line may be {likely}",
        )  # fmt: skip
    return _error(likely)


def _wide_enough(line: bytes, double: bool) -> bool:
    return not double or max(map(len, (character.encode() for character in line.decode()))) > 2


def _wrong(name: str, file: IO[bytes]) -> SchemaError:
    return _error(_likely(file.read(BLOCK_BYTES)))


def _error(likely: str) -> SchemaError:
    return SchemaError(
        "source.encoding", "the file is not in the encoding that the source says", field="encoding",
        remedy=f"its bytes look like {likely}: set the source's encoding, or write the file as UTF-8",
    )  # fmt: skip


def decodes(data: bytes, encoding: str) -> bool:
    """Is it text in that encoding?"""
    try:
        data.decode(encoding)
    except UnicodeError:
        return False
    return True


def _likely(data: bytes) -> str:
    """The encoding that bytes look like."""
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return encoding
    if b"\0" in data:
        even, odd = data[::2].count(0), data[1::2].count(0)
        return "utf-16-be" if even > odd else "utf-16-le"
    if decodes(data, "utf-8"):
        return "utf-8"
    if _common(data, "gb18030", "gb2312", 0xB0, 0xF7):
        return "gb18030"
    if _common(data, "big5", "big5", 0xA4, 0xC6):
        return "big5"
    return "windows-1252"


def _common(data: bytes, encoding: str, frequent: str, lowest: int, highest: int) -> bool:
    """Are nine in ten characters beyond ASCII those of everyday text (in *frequent*, first byte in the range)?"""
    text = [c for c in data.decode(encoding, "replace") if not c.isascii()]
    codes = [c.encode(frequent, "ignore") for c in text]
    everyday = sum(len(c) == 2 and (lowest <= c[0] <= highest or c[0] in (0xA1, 0xA3)) for c in codes)
    return everyday >= 0.9 * len(text)
