"""Differential privacy: mechanisms, accounting, and how noise is shared out. Pure: randomness comes in as an argument.

Neighbours differ by adding or removing one unit (a record, an entity or a site: the plan says
which), everywhere. A *noise multiplier* z is the noise's scale over the sensitivity. Budgets are
only ever computed by dp-accounting (``accounting``); nothing else here knows what an event costs.
"""
