"""Where networks compute: the environment variable ATOLL_DEVICE says cpu (the default) or cuda.

On a CPU the same plan gives the same bits; a GPU's sums are of another order from one machine to the next.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

from atoll.contract.errors import PlanError

log = logging.getLogger("atoll.models")


def device() -> torch.device:
    """What ATOLL_DEVICE asks for; the CPU, with a note in the log, where there is no GPU. Raises PlanError for any
    other value."""
    return _device(os.environ.get("ATOLL_DEVICE", "cpu"))


@cache
def _device(wanted: str) -> torch.device:
    if wanted not in ("cpu", "cuda"):
        raise PlanError(
            "model.device", f"there is no device {wanted!r}", field="ATOLL_DEVICE", remedy="ATOLL_DEVICE=cpu or cuda"
        )
    if wanted == "cuda" and not torch.cuda.is_available():
        log.warning("ATOLL_DEVICE=cuda, and no GPU is to be had: networks compute on the CPU")
        return torch.device("cpu")
    return torch.device(wanted)
