"""Homomorphic encryption: sums of what the coordinator cannot read (see ``paillier`` and ``ckks``)."""

from atoll.contract.protection import register
from atoll.privacy.he.ckks import CkksSum
from atoll.privacy.he.paillier import Paillier

register(Paillier())
register(CkksSum())
