"""FLTrust: updates count by how much they point the way of one that is trusted, and are made as long as it.

Source: Cao, Fang, Liu & Gong 2021, FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping (NDSS), §4.2.
There the server has a small clean data set of its own; here the plan names a site that is trusted (``root``), and its
update, of trust 1, is in the mean as well. Any number of the others may be attackers.
"""

from __future__ import annotations

import numpy as np

from atoll.aggregation.rule import Asked, Floats, Rule, register


def fltrust(changes: Floats, asked: Asked) -> tuple[Floats, Floats]:
    """Equations 2 to 4: the mean of (‖g₀‖ / ‖gᵢ‖) · gᵢ by ReLU(cos(gᵢ, g₀))."""
    root = changes[asked.root or 0]
    norms, length = np.linalg.norm(changes, axis=1), float(np.linalg.norm(root))
    products = norms * length
    cosines = np.divide(changes @ root, products, out=np.zeros(len(changes)), where=products > 0)
    trust = np.maximum(cosines, 0)
    trust[asked.root or 0] = 1
    shares = trust / trust.sum()
    as_long = np.divide(length, norms, out=np.zeros(len(changes)), where=norms > 0)
    return (shares * as_long) @ changes, shares


def least(attackers: int) -> int:
    """The one that is trusted."""
    return attackers + 1


register(Rule("fltrust", fltrust, least, rooted=True))
