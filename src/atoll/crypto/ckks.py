"""CKKS: approximate sums of long encrypted vectors, by TenSEAL (extra ``he``).

Real vectors are encrypted under the key holder's public key, 4,096 values to a ciphertext of 229,376 bytes (56 bytes a
value), added by anyone, and decrypted by the key holder. Addition is all that is done, so that neither relinearisation
nor rotation keys exist. Ring degree 8,192 and moduli of 48 + 48 + 48 = 144 bits, where the HomomorphicEncryption.org
standard (2018) allows 218 for 128-bit security; fresh for each run.

Error. A value is divided by the declared bound and scaled by 2^84: noise and rounding stay below 2^-48 of
(sites · bound). Decrypted values of CKKS tell of the secret key by their noise (Li & Micciancio 2021, On the Security
of Homomorphic Encryption on Approximate Numbers), and the coordinator, who has the ciphertexts, would compute it
from a single one. So the key holder adds Gaussian noise of 2^-26 · sites · bound before it tells: about 2^20 times what
depends on the key. By the argument of Li, Micciancio, Schultz & Sorrell 2022 (Securing Approximate Homomorphic
Encryption Using Differential Privacy) we estimate that at about 40 bits of statistical security a ciphertext; their
proof does not cover our float arithmetic, and many sums under one key need more: a fresh key a run, and few rounds.
This noise is the error: below :func:`error_bound` = 2^-23 · sites · bound but for one value in 10^15.

What each party learns: the coordinator sums, the key holder sums, others nothing. Not covered: a coordinator
that sends the key holder one site's ciphertext instead of the sum, and key holder and coordinator together.

TenSEAL parses in C++. What is received is checked for its length before, and for its parameters after; what it
refuses is a ProtocolError. Of 300 altered ciphertexts it refused or accepted every one without a crash, which is no
proof: take ciphertexts from parties only whose signatures verify. An altered ciphertext that still parses decrypts
to noise.
"""

from __future__ import annotations

import importlib
import math
import os
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.contract.errors import PlanError, ProtocolError

Bytes = NDArray[np.uint8]
Values = NDArray[np.float64]

DEGREE = 8192
SLOTS = DEGREE // 2
MODULI_BITS = (48, 48, 48)
"""Two for ciphertexts; the third is SEAL's own, for keys."""
SCALE = 2.0**84
MAX_SITES = 1024
"""Sums of so many stay below half the modulus: 2^84 · 2^10 < 2^95."""
CIPHERTEXT_BYTES = 224 << 10
"""A row that travels: four bytes of length, the ciphertext (about 224,200 bytes, compressed), zeros."""
MAX_PUBLIC_BYTES = 400 << 10
FLOOD = 2.0**-26
ERROR = 2.0**-23
"""Both of sites · bound; ERROR is eight standard deviations of FLOOD."""


def error_bound(bound: float, num_sites: int) -> float:
    """How much a decrypted sum of *num_sites* values within ±*bound* may differ from the true one."""
    return ERROR * bound * num_sites


class CkksPublic:
    """The public part, from the key holder's *data*: encrypts and adds.

    Raises ProtocolError when *data* is not such a key, and PlanError without the extra.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) > MAX_PUBLIC_BYTES:
            raise _no_key("is too long")
        tenseal = _tenseal()
        try:
            self._context = tenseal.context_from(data)
            sound = (
                self._context.seal_context().data.key_parms_id() == _parameters()
                and self._context.is_public()
                and self._context.has_public_key()
                and self._context.global_scale == SCALE
            )
        except Exception:  # the library's errors are of many kinds
            raise _no_key("cannot be read") from None
        if not sound:
            raise _no_key("is of other parameters")

    def encrypt(self, values: Values, bound: float) -> Bytes:
        """float64 *values* [k], each within ±*bound*, as uint8 [⌈k / 4096⌉, CIPHERTEXT_BYTES].

        Raises ProtocolError for values that are not.
        """
        if values.ndim != 1 or not (0 < bound < math.inf and bool((np.abs(values) <= bound).all())):
            raise ProtocolError(
                "ckks.value", "a value to encrypt is not within its declared bound", field="values",
                remedy="clip values to their declared bounds before they are encrypted",
            )  # fmt: skip
        padded = np.zeros((_rows(len(values)), SLOTS))
        padded.reshape(-1)[: len(values)] = values / bound
        return _array([_tenseal().ckks_vector(self._context, row.tolist()) for row in padded])

    def add(self, *arrays: Bytes) -> Bytes:
        """The sum of encrypted vectors. Raises ProtocolError for what is not one, or of different lengths."""
        if len({len(array) for array in arrays}) != 1:
            raise _malformed("are of different numbers")
        added = []
        for rows in zip(*arrays, strict=True):
            total = _parsed(self._context, rows[0])
            for row in rows[1:]:
                total.add_(_parsed(self._context, row))
            added.append(total)
        return _array(added)


class Ckks:
    """The key holder's: a fresh key, or one that :meth:`to_bytes` kept. ``public`` is for :class:`CkksPublic`. Raises
    PlanError without the extra."""

    def __init__(self, kept: bytes = b"") -> None:
        self._context = _tenseal().context_from(kept) if kept else _fresh()
        self.public: bytes = self._context.serialize(
            save_public_key=True, save_secret_key=False, save_galois_keys=False, save_relin_keys=False
        )

    def to_bytes(self) -> bytes:
        """The key, to be kept as secret as the data that it opens."""
        return bytes(
            self._context.serialize(
                save_public_key=True, save_secret_key=True, save_galois_keys=False, save_relin_keys=False
            )
        )

    def decrypt(self, array: Bytes, num_values: int, bound: float, num_sites: int) -> Values:
        """The sum [num_values] over *num_sites* vectors within ±*bound*, to within :func:`error_bound`, in which
        the noise is that hides the key.

        Raises ProtocolError for what is not *num_values* encrypted values, PlanError for more sites than 1,024.
        """
        if not 1 <= num_sites <= MAX_SITES:
            raise PlanError(
                "ckks.sites", f"a sum over {num_sites} sites", field="num_sites",
                remedy=f"at most {MAX_SITES}; choose secagg for larger cohorts",
            )  # fmt: skip
        if len(array) != _rows(num_values):
            raise _malformed("are not as many as the values take")
        key = self._context.secret_key()
        rows = [_parsed(self._context, row).decrypt(key) for row in array]
        total = np.array(rows, np.float64).reshape(-1)[:num_values]
        return (total + FLOOD * num_sites * _gaussian(num_values)) * bound

    def __reduce__(self) -> str:
        raise TypeError("a private key is not pickled")

    def __repr__(self) -> str:
        return "Ckks()"


def _tenseal() -> Any:
    try:
        return importlib.import_module("tenseal")
    except ImportError:
        raise PlanError(
            "ckks.missing", "protection ckks needs TenSEAL, which is not installed", field="protection",
            remedy="pip install 'atoll[he]'",
        ) from None  # fmt: skip


def _fresh() -> Any:
    tenseal = _tenseal()
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(MODULI_BITS))
    context.global_scale = SCALE
    return context


@cache
def _parameters() -> Any:
    """SEAL's hash of the scheme, degree and moduli."""
    return _fresh().seal_context().data.key_parms_id()


def _rows(num_values: int) -> int:
    return -(-num_values // SLOTS)


def _array(vectors: list[Any]) -> Bytes:
    array = np.zeros((len(vectors), CIPHERTEXT_BYTES), np.uint8)
    for row, vector in zip(array, vectors, strict=True):
        data = vector.serialize()
        row[:4] = np.frombuffer(len(data).to_bytes(4, "little"), np.uint8)
        row[4 : 4 + len(data)] = np.frombuffer(data, np.uint8)
    return array


def _parsed(context: Any, row: Bytes) -> Any:
    if row.dtype != np.uint8 or row.shape != (CIPHERTEXT_BYTES,):
        raise _malformed("are not an array of bytes, one ciphertext a row")
    size = int.from_bytes(row[:4].tobytes(), "little")
    if size > CIPHERTEXT_BYTES - 4:
        raise _malformed("are longer than their row")
    try:
        vector = _tenseal().ckks_vector_from(context, row[4 : 4 + size].tobytes())
        parts = vector.ciphertext()
        sound = (
            vector.size() == SLOTS
            and len(parts) == 1
            and parts[0].size() == 2
            and parts[0].scale == SCALE
            and parts[0].parms_id() == context.seal_context().data.first_parms_id()
            and not parts[0].is_transparent()
        )
    except Exception:  # the library's errors are of many kinds
        raise _malformed("cannot be read") from None
    if not sound:
        raise _malformed("are of other parameters")
    return vector


def _gaussian(count: int) -> Values:
    """Standard normal numbers from the operating system's randomness (Box & Muller 1958)."""
    words = np.frombuffer(os.urandom(16 * count), "<u8").reshape(2, count) >> np.uint64(11)
    uniform = (words + 0.5) * 2.0**-53
    drawn: Values = np.sqrt(-2 * np.log(uniform[0])) * np.cos(2 * math.pi * uniform[1])
    return drawn


def _malformed(what: str) -> ProtocolError:
    return ProtocolError(
        "ckks.ciphertexts", f"ciphertexts {what}", field="ciphertexts",
        remedy="use the same Atoll version and key at every site; do not go on with a party that alters them",
    )  # fmt: skip


def _no_key(why: str) -> ProtocolError:
    return ProtocolError(
        "ckks.public-key", f"a CKKS public key {why}", field="public_key",
        remedy="use the same Atoll and TenSEAL versions at every site",
    )  # fmt: skip
