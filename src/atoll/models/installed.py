"""Weights installed at a party: a backbone, trained elsewhere, that a federation starts from.

A model's spec refers to them as ``base: {name: …, sha256: …}``: the file ``name.safetensors`` in the folder that the
environment variable ATOLL_MODELS names, else in ``models`` in the home folder. The hash stands in the plan, which every
party approves, so that all mean the same weights; it is checked before they are used. The format holds names, shapes
and numbers only: reading it runs no code.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load

from atoll.contract.errors import IntegrityError, PlanError
from atoll.contract.wire import Array


class Adapters(BaseModel):
    """What is learned of a base that stays as it is (``models/lora.py``). rank: r. alpha: α; what an adapter adds
    counts α / r times. layers: linear layers with an adapter, by patterns of their names (* is any run of characters).
    heads: layers, by the beginning of their names, that are learned whole, and that the base need not have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=4, ge=1, le=256)
    alpha: float = Field(default=8.0, gt=0, allow_inf_nan=False)
    layers: tuple[str, ...] = Field(default=("*",), min_length=1)
    heads: tuple[str, ...] = ("head",)


class Base(BaseModel):
    """name: of the file, without its ending. sha256: of its bytes, in hexadecimal. frozen: layers, by the beginning of
    their names, that stay as they are there: they are no weights of the model, and never travel. adapters: all stays,
    and what is learned stands beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    frozen: tuple[str, ...] = ()
    adapters: Adapters | None = None

    @model_validator(mode="after")
    def _frozen_already(self) -> Self:
        if self.frozen and self.adapters is not None:
            raise ValueError("with adapters all of the base is frozen: leave frozen out")
        return self

    def read(self) -> Mapping[str, Array]:
        """The installed arrays by name, not to be written to. Raises PlanError "model.no-base" or "model.bad-base",
        and IntegrityError "model.base-changed"."""
        return _read(installed_at(self.name), self.sha256)


def installed_at(name: str, folder: Path | None = None) -> Path:
    """Where the base *name* is looked for (or would be in *folder*)."""
    named = os.environ.get("ATOLL_MODELS", "")
    return (folder or (Path(named) if named else Path.home() / "models")) / f"{name}.safetensors"


@lru_cache(maxsize=2)
def _read(path: Path, sha256: str) -> Mapping[str, Array]:
    try:
        content = path.read_bytes()
    except OSError:
        raise PlanError(
            "model.no-base", "the model's base is not installed here", field="model.base",
            remedy="put the .safetensors file of that name into the folder that ATOLL_MODELS names",
        ) from None  # fmt: skip
    if hashlib.sha256(content).hexdigest() != sha256:
        raise IntegrityError(
            "model.base-changed", "the installed base is not the one that the plan names", field="model.base",
            remedy="install the file with the plan's sha256, or agree on another plan",
        )  # fmt: skip
    try:
        found = load(content)
    except (SafetensorError, KeyError, TypeError):  # the latter two: a dtype that numpy does not have
        raise PlanError(
            "model.bad-base", "the model's base cannot be read", field="model.base",
            remedy="save it as safetensors, in float32",
        ) from None  # fmt: skip
    for array in found.values():
        array.flags.writeable = False
    return found
