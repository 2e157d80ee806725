"""``python -m trainer`` is the console script."""

from trainer.cli.main import main

main()
