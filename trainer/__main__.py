"""``python -m trainer`` is the console script."""

import os
import sys

from trainer.resilience.signals import early_stop_flag


def main() -> None:
    """Catch a rank's signals, then import and run the command line."""
    stop = early_stop_flag(os.environ, sys.argv)
    from trainer.cli.main import main as run

    run(stop)


if __name__ == "__main__":
    main()
