"""Encrypted sums beside ``phe``: values a second of encrypt + add + decrypt, by three sites, at 3,072 bits.

Peer: phe 1.5.0 with gmpy2, in an environment of its own (``.venvs/phe``, made on the first run), one value a
ciphertext, on one core as it comes. Both work by turns on the same machine, and medians of the turns are compared.
Tables of powers are made before, as a site does once a key; their cost has rows of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import gmpy2
import numpy as np

from atoll.crypto.ckks import Ckks, CkksPublic, error_bound
from atoll.crypto.fixed_base import FixedBase
from atoll.crypto.packing import Packing, add_mod, masks
from atoll.crypto.paillier import DEFAULT_BITS, Ciphertexts, PrivateKey, PublicKey
from atoll.crypto.prg import Stream, fresh_key
from atoll.crypto.threads import num_cores
from benchmarks.table import Row, main

SEED = 0
SITES = 3
PEER = ("phe==1.5.0", "gmpy2==2.3.2")
PEER_TURN = """
import json, random, sys, time
from phe import paillier
from phe.util import HAVE_GMP
assert HAVE_GMP
public, private = paillier.generate_paillier_keypair(n_length=int(sys.argv[1]))
sites, random = int(sys.argv[2]), random.Random(0)
for line in sys.stdin:
    vectors = [[random.randrange(2**32) for _ in range(int(line))] for _ in range(sites)]
    times = [time.perf_counter()]
    encrypted = [[public.encrypt(value) for value in vector] for vector in vectors]
    times.append(time.perf_counter())
    sums = [sum(column[1:], column[0]) for column in zip(*encrypted)]
    times.append(time.perf_counter())
    assert [private.decrypt(c) for c in sums] == [sum(column) for column in zip(*vectors)]
    times.append(time.perf_counter())
    print(json.dumps([(b - a) / int(line) for a, b in zip(times, times[1:])]), flush=True)
"""
Times = np.ndarray[Any, np.dtype[np.float64]]
"""Seconds a value: [encrypt at all sites, add, decrypt]."""


def peer_python() -> Path:
    """The interpreter of phe's environment, made when it is not there."""
    folder = Path(__file__).parent.parent / ".venvs" / "phe"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEER], check=True)
    return python


@contextmanager
def peer() -> Iterator[Callable[[int], Times]]:
    """Gives a function that lets phe sum a number of values."""
    command = [str(peer_python()), "-c", PEER_TURN, str(DEFAULT_BITS), str(SITES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        given, told = process.stdin, process.stdout
        if given is None or told is None:
            raise RuntimeError("phe's process has no pipes")

        def turn(num_values: int) -> Times:
            given.write(f"{num_values}\n")
            given.flush()
            return np.array(json.loads(told.readline()))

        yield turn
        given.close()


def _vectors(num_values: int) -> list[np.ndarray[Any, np.dtype[np.uint64]]]:
    random = np.random.default_rng(SEED)
    return [random.integers(0, 2**32, num_values, dtype=np.uint64) for _ in range(SITES)]


def packed(key: PrivateKey, publics: list[PublicKey], num_values: int) -> Times:
    """One packed and masked sum of 32-bit values, as it travels: bytes in between."""
    n, packing, vectors = int(key.public.n), Packing(key.public.bits, 34, SITES), _vectors(num_values)
    cells = packing.num_cells(num_values)
    secret = [masks(Stream(fresh_key()).bytes, cells, n) for _ in range(SITES - 1)]
    last = [-sum(column) % n for column in zip(*secret, strict=True)]
    times, sent = [time.perf_counter()], []
    for public, vector, mask in zip(publics, vectors, [*secret, last], strict=True):
        sent.append(public.encrypt(add_mod(packing.pack(vector), mask, n)).to_array())
    times.append(time.perf_counter())
    total = key.public.add(*(Ciphertexts.from_array(key.public, array) for array in sent)).to_array()
    times.append(time.perf_counter())
    found = packing.unpack(key.decrypt(Ciphertexts.from_array(key.public, total)), num_values)
    times.append(time.perf_counter())
    if not np.array_equal(found, np.sum(vectors, axis=0)):
        raise RuntimeError("the packed sum is wrong")
    return np.diff(times) / num_values


def single(key: PrivateKey, publics: list[PublicKey], num_values: int) -> Times:
    """One value a ciphertext, nothing masked, as phe does."""
    vectors = [vector.tolist() for vector in _vectors(num_values)]
    times = [time.perf_counter()]
    encrypted = [public.encrypt(vector) for public, vector in zip(publics, vectors, strict=True)]
    times.append(time.perf_counter())
    total = key.public.add(*encrypted)
    times.append(time.perf_counter())
    found = key.decrypt(total)
    times.append(time.perf_counter())
    if found != [sum(column) for column in zip(*vectors, strict=True)]:
        raise RuntimeError("the sum is wrong")
    return np.diff(times) / num_values


@contextmanager
def one_core() -> Iterator[None]:
    """Only one of the cores that this process may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def sums(key: PrivateKey, quick: bool) -> list[Row]:
    """Packed and unpacked sums beside phe's."""
    turns, num_packed, num_single = (3, 1_800, 24) if quick else (7, 9_000, 120)
    publics = [PublicKey.from_bytes(key.public.to_bytes()) for _ in range(SITES)]
    began = time.perf_counter()
    for public in publics:
        public.prepare(10**6)
    table = (time.perf_counter() - began) / SITES
    key.encrypt([0] * 1000)  # the holder's own tables
    taken: dict[str, list[Times]] = {name: [] for name in ("phe", "packed", "single", "packed, one core", "holder")}
    with peer() as turn:
        for _ in range(turns):
            taken["phe"].append(turn(4 if quick else 10))
            taken["packed"].append(packed(key, publics, num_packed))
            taken["single"].append(single(key, publics, num_single))
            with one_core():
                taken["packed, one core"].append(packed(key, publics, num_packed))
            began = time.perf_counter()
            key.encrypt([secrets.randbelow(2**32) for _ in range(num_single)])
            taken["holder"].append(np.array([(time.perf_counter() - began) / num_single]))
    spent = {name: median(float(t.sum()) for t in listed) for name, listed in taken.items()}
    parts = {name: [float(x) for x in np.median(listed, axis=0)] for name, listed in taken.items()}
    slots, cores = Packing(key.public.bits, 34, SITES).slots_per_cell, f"{num_cores()} cores; phe: one"
    least = spent["phe"] / parts["single"][2]

    def ratio(name: str, limit: float | None, note: str = "") -> Row:
        told = f"{spent['phe'] / spent[name]:.3g} times as fast as phe{note}"
        return Row("the same, ratio", spent[name] / spent["phe"], "×", None, limit, told)

    def speed(what: str, name: str, note: str) -> Row:
        return Row(what, 1 / spent[name], "values/s", 1 / spent["phe"], None, note)

    return [
        speed(f"packed sum of 32-bit values, {SITES} sites: encrypt + add + decrypt", "packed",
              f"{slots} a cell, masked; {cores}"),
        ratio("packed", 1 / 200),
        speed("the same on one core", "packed, one core", ""),
        ratio("packed, one core", None),
        speed("one value a ciphertext", "single", cores),
        ratio("single", 1 / 30, f"; {least:.2g} if all but decryption were free"),
        Row("encrypt a cell", 1e3 * parts["single"][0] / SITES, "ms", 1e3 * parts["phe"][0] / SITES, None, cores),
        Row("the same by the key holder, who has p and q", 1e3 * spent["holder"], "ms", 1e3 * parts["phe"][0] / SITES),
        Row("add a site's cell", 1e3 * parts["single"][1] / (SITES - 1), "ms",
            1e3 * parts["phe"][1] / (SITES - 1)),
        Row("decrypt a cell", 1e3 * parts["single"][2], "ms", 1e3 * parts["phe"][2], None, cores),
        Row("bytes a packed value, one way", key.public.ciphertext_bytes / slots, "B", key.public.ciphertext_bytes),
        Row("table of powers, once a key", table, "s", None, None, "8-bit window; all cores"),
    ]  # fmt: skip


def windows(key: PrivateKey, quick: bool) -> list[Row]:
    """What a table costs and brings, on all cores."""
    rows, size = [], (key.public.bits + 128) // 8
    count = 16 if quick else 64
    exponents = np.frombuffer(secrets.token_bytes(count * size), np.uint8).reshape(count, size)
    for window, wanted in ((0, 0), (4, 25), (6, 200), (8, 10**6)):
        base = FixedBase(gmpy2.mpz(key.public.hs), key.public.n_squared, size)
        if window:
            base.prepare(wanted)
        before = base.window
        times = []
        for _ in range(3):
            began = time.perf_counter()
            base.powers(exponents if before else exponents[:3])
            times.append((time.perf_counter() - began) / (count if before else 3))
        memory = f"{base.table_bytes(base.window) / 1e6:.3g} MB" if base.window else "no table"
        rows.append(Row(f"h_s^r, window of {base.window} bits", 1e3 * median(times), "ms", None, None, memory))
    return rows


def whole(key: PrivateKey, quick: bool) -> Row:
    """A first sum, where each site makes its table."""
    num_values = 9_000 if quick else 100_000
    publics = [PublicKey.from_bytes(key.public.to_bytes()) for _ in range(SITES)]
    spent = float(packed(key, publics, num_values).sum()) * num_values
    return Row(f"first sum of {num_values:,} values, {SITES} tables included", spent, "s", None, None, "one machine")


def ckks(quick: bool) -> list[Row]:
    """The approximate alternative."""
    num_values, turns, bound = (40_960, 3, 1.0) if quick else (409_600, 5, 1.0)
    vectors = np.random.default_rng(SEED).uniform(-bound, bound, (SITES, num_values))
    times, worst, nbytes = [], 0.0, 0
    for _ in range(turns):
        holder = Ckks()
        public = CkksPublic(holder.public)
        began = time.perf_counter()
        sent = [public.encrypt(vector, bound) for vector in vectors]
        found = holder.decrypt(public.add(*sent), num_values, bound, SITES)
        times.append((time.perf_counter() - began) / num_values)
        worst, nbytes = max(worst, float(np.abs(found - vectors.sum(axis=0)).max())), sent[0].nbytes
    return [
        Row(f"CKKS sum of float64: encrypt + add + decrypt, {SITES} sites", 1 / median(times), "values/s"),
        Row("the same, bytes a value, one way", nbytes / num_values, "B"),
        Row("the same, largest error", worst, "", None, error_bound(bound, SITES), "values within ±1"),
    ]


def keys(quick: bool) -> tuple[PrivateKey, Row]:
    """A key, and how long one takes."""
    times = []
    for _ in range(3 if quick else 9):
        began = time.perf_counter()
        key = PrivateKey.generate()
        times.append(time.perf_counter() - began)
    return key, Row(f"generate a key of {DEFAULT_BITS} bits", median(times), "s", None, 3.0, "median")


def measure(quick: bool) -> list[Row]:
    """All rows."""
    key, generated = keys(quick)
    return [*sums(key, quick), *windows(key, quick), whole(key, quick), generated, *ckks(quick)]


if __name__ == "__main__":
    main("paillier", ["atoll", "gmpy2", "numpy", "tenseal"], measure, SEED)
