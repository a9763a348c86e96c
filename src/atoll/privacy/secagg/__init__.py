"""secagg: the coordinator learns the sum, and no site's part of it (see ``masking``)."""

from atoll.contract.protection import register
from atoll.privacy.secagg.masking import SecAgg

register(SecAgg())
