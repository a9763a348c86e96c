"""Atoll: federated statistics and learning for institutions that may not pool their records."""

__version__ = "0.1.0"
