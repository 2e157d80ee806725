"""Files that are whole or not there, and what a kill leaves beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.core.durable import delete_leftovers, replace_text

pytestmark = pytest.mark.fast

KILLED_BEFORE_THE_RENAME = """
import os, signal, sys
from pathlib import Path
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from trainer.core.durable import replace_text
replace_text(Path(sys.argv[1]), "new")
"""


def test_a_kill_leaves_the_old_text_and_what_it_left_goes(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    replace_text(path, "old")
    killed = subprocess.run([sys.executable, "-c", KILLED_BEFORE_THE_RENAME, str(path)], timeout=30, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    others = [".lock", "notes.tmp-1", ".step-00000050.tmp-deleted", ".hidden"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".step-00000050.tmp-0001").mkdir()
    delete_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".step-00000050.tmp-0001", "latest"])
