"""Keep DeepSpeed from compiling its CPU shared-memory collectives at start (DeepSpeed 0.19.8).

``init_distributed`` JIT-builds ``deepspeed_shm_comm`` on CPU: half a minute and a compiler for nothing, since gloo does
the work. Test: tests/distributed/test_upstream.py.
"""

from __future__ import annotations

import importlib
from typing import Any


def disable() -> None:
    """Make the builder report that the op is not there, as it does on machines without a compiler."""
    # not `import deepspeed.comm.torch as ...`: the package's attribute of that name is torch itself
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
