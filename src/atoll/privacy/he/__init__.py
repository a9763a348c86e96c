"""Homomorphic encryption: sums of what the coordinator cannot read (see ``paillier``)."""

from atoll.contract.protection import register
from atoll.privacy.he.paillier import Paillier

register(Paillier())
