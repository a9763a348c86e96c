"""A model as a run leaves it: a folder with ``model.json``, what it is, and ``model.safetensors``, its numbers.

The numbers are named arrays: a network's layers, float32, each in its own shape; a linear model's scaled "weights",
with the "middle" and "half" range of each feature, float64. ``model.json`` has the model's spec, the schema of the
table that it is applied to, and in "model" as "layers" the arrays' names in the order in which they make one vector of
weights. Neither file can hold code.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialised

from atoll.contract.errors import PlanError
from atoll.contract.schema import TableSchema
from atoll.contract.settings import validate
from atoll.contract.wire import Array, Json
from atoll.models.allowed import allow
from atoll.models.model import Predictor, from_spec

ABOUT, NUMBERS = "model.json", "model.safetensors"


def save(folder: Path, about: Mapping[str, Json], arrays: Mapping[str, Array]) -> None:
    """Write both files. about: at least "model" with "spec" and "layers", and "schema"."""
    folder.mkdir(parents=True, exist_ok=True)
    told = json.dumps(about, indent=2, ensure_ascii=False)
    (folder / ABOUT).write_text(told + "\n", encoding="utf-8")
    plain = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    (folder / NUMBERS).write_bytes(serialised(plain, metadata={"format": "pt"}))  # what PyTorch's readers look for


def load(folder: str | Path, models: Iterable[str] = ()) -> tuple[Predictor, TableSchema, dict[str, Any]]:
    """(fitted model, schema of the table it is applied to, the whole of model.json).

    models: networks of other packages (``package.nets:Net``) that may be imported for it. Raises PlanError when the
    folder does not hold a model, or it does not fit, and PolicyError for a network that is not allowed.
    """
    folder = Path(folder)
    allow(models)
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        arrays, spec, schema = load_file(folder / NUMBERS), dict(about["model"]["spec"]), about["schema"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        raise PlanError(
            "model.unreadable", f"{folder} does not hold a model that can be read", field=str(folder),
            remedy="name the folder model/ of a finished run's results, with both its files",
        ) from None  # fmt: skip
    contract = validate(TableSchema, schema, "schema")
    return from_spec(spec, contract, arrays), contract, about
