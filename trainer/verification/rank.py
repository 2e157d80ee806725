"""One rank of a verification.

usage: python -m trainer.verification.rank CASES.json, a list of what ``case.run_case`` takes; started as a rank. What
it prints goes into ``rank-N.log`` beside the file, what is wrong into ``error-N.txt`` of the first case's output.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from trainer.core import environ
from trainer.core.errors import EXIT_FAILURE, EXIT_OK, TrainerError


def main() -> int:
    """Run every case and return the exit code."""
    place = environ.detect(os.environ)
    assert place is not None
    environ.die_with_parent(os.environ)
    environ.export(place, os.environ)
    path = Path(sys.argv[1])
    log = os.open(path.with_name(f"rank-{place.rank}.log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    cases = json.loads(path.read_text())
    # Imported here: torch and DeepSpeed talk while they are.
    from trainer.engine.build import join_group, leave_group
    from trainer.verification.case import run_case

    try:
        join_group(place)
        for case in cases:
            run_case(case, place)
        leave_group()
    except Exception as error:  # noqa: BLE001 - the parent tells it
        traceback.print_exc()
        text = str(error) if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
        Path(cases[0]["output"], f"error-{place.rank}.txt").write_text(text)
        return EXIT_FAILURE
    return EXIT_OK


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # background threads of torch and DeepSpeed may abort during interpreter shutdown
