"""Keep upstream's advice and progress bars off the console of commands that have no rank log."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_transformers() -> None:
    """Call before transformers is imported. Errors still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|accelerate).*")
    # transformers imports DeepSpeed where it is installed, which then reports the accelerator it found. A filter,
    # because DeepSpeed sets its logger's level itself.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
