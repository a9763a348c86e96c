"""``python -m atoll``."""

from atoll.cli.main import main

main()
