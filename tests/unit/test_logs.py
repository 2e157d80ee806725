"""Rank logs catch what a process prints at every level, and give it all back. Real processes, real descriptors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.core.logs import rank_log_path
from trainer.core.units import format_bytes, format_count, format_duration

pytestmark = pytest.mark.fast

PRELUDE = """
import ctypes, logging, os, subprocess, sys, warnings
from pathlib import Path
from trainer.core.logs import open_rank_log
run, rank = Path(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None)
"""

NOISE = """
early = sys.stdout, sys.stderr
log = open_rank_log(run, rank)
print("by print")
print("by early stderr", file=early[1])
libc.printf(b"by C stdio\\n"); libc.fflush(None)
os.write(2, b"by descriptor\\n")
subprocess.run(["sh", "-c", "echo by child; ls /proc/self/fd | wc -l >&2"], check=True)
warnings.warn("by warnings")
logging.getLogger("some.library").info("by logging")
print("to the person", file=log.console_stream)
log.restore()
log.restore()
print("after restore")
print("after restore, stderr", file=sys.stderr)
"""


def run_python(code: str, run: Path, rank: int = 0) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", PRELUDE + code, str(run), str(rank)]
    # Without PYTHONUNBUFFERED, or a missing flush would go unnoticed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=environment)


def test_everything_goes_to_the_log_and_the_console_stays_clean(tmp_path: Path) -> None:
    result = run_python(NOISE, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "to the person\nafter restore\n"
    assert result.stderr == "after restore, stderr\n"
    lines = rank_log_path(tmp_path, 0).read_text().splitlines()
    assert re.fullmatch(r"==== start \d{4}-\d\d-\d\dT\S+ rank 0 pid \d+ host \S+ ====", lines[0])
    for text in ("by print", "by early stderr", "by C stdio", "by descriptor", "by child"):
        assert text in lines
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} rank 0 "
    assert any(re.fullmatch(stamp + "INFO some.library: by logging", line) for line in lines)
    assert any(re.match(stamp + "WARNING py.warnings: .*by warnings", line) for line in lines)
    order = [lines.index(text) for text in ("by print", "by early stderr", "by C stdio", "by child")]
    assert order == sorted(order)


def test_other_ranks_are_silent_unless_they_fail(tmp_path: Path) -> None:
    code = NOISE.split("log.restore()")[0] + "print('rank 3 failed: reason', file=log.error_stream)\n"
    result = run_python(code, tmp_path, rank=3)
    assert result.stdout == ""
    assert result.stderr == "rank 3 failed: reason\n"
    assert (tmp_path / "logs" / "rank-00003.log").exists()


def test_appended_across_restarts_also_after_a_kill_in_a_line(tmp_path: Path) -> None:
    kill = f"open_rank_log(run, rank)\nos.write(1, b'half a li')\nos.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    assert run_python(kill, tmp_path).returncode == -signal.SIGKILL
    run_python("open_rank_log(run, rank)\nprint('second')\n", tmp_path)
    lines = rank_log_path(tmp_path, 0).read_text().splitlines()
    assert [line.split(" ")[0] for line in lines] == ["====", "half", "====", "second"]


def test_lines_printed_before_a_kill_are_in_the_log(tmp_path: Path) -> None:
    code = f"open_rank_log(run, rank)\nprint('last words')\nos.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    run_python(code, tmp_path)
    assert "last words" in rank_log_path(tmp_path, 0).read_text()


def test_private_to_the_user(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        run_python("open_rank_log(run, rank)\n", tmp_path)
    finally:
        os.umask(previous)
    path = rank_log_path(tmp_path, 0)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_an_exception_is_logged_and_the_console_restored(tmp_path: Path) -> None:
    code = """
try:
    with open_rank_log(run, rank):
        raise ValueError("the reason")
except ValueError as error:
    print(f"failed: {error}", file=sys.stderr)
"""
    result = run_python(code, tmp_path)
    assert result.stderr == "failed: the reason\n"
    text = rank_log_path(tmp_path, 0).read_text()
    assert "Traceback (most recent call last)" in text
    assert "ValueError: the reason" in text


def test_logging_and_warnings_are_as_before_after_restore(tmp_path: Path) -> None:
    code = """
logging.basicConfig(format="mine: %(message)s", level=logging.ERROR)
with open_rank_log(run, rank):
    logging.getLogger("x").info("inside")
logging.getLogger("x").info("too low")
logging.getLogger("x").error("outside")
warnings.warn("shown as usual")
print(sys.stdout.line_buffering, len(os.listdir("/proc/self/fd")) <= 4)
"""
    result = run_python(code, tmp_path)
    assert result.stderr.startswith("mine: outside\n")
    assert "UserWarning: shown as usual" in result.stderr
    assert "too low" not in result.stderr
    assert result.stdout == "False True\n"


def test_standard_streams_may_be_closed(tmp_path: Path) -> None:
    code = PRELUDE + "log = open_rank_log(run, rank)\nos.write(1, b'still here\\n')\nlog.restore()\n"
    script = tmp_path / "script.py"
    script.write_text(code)
    command = f"exec '{sys.executable}' '{script}' '{tmp_path}' 0 <&- >&- 2>&-"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    assert subprocess.run(["sh", "-c", command], timeout=60, env=environment).returncode == 0
    assert "still here\n" in rank_log_path(tmp_path, 0).read_text()


def test_a_reader_that_left_does_not_break_restore(tmp_path: Path) -> None:
    code = """
with open_rank_log(run, rank) as log:
    for _ in range(1000):
        try:
            print("x" * 1000, file=log.console_stream)
        except BrokenPipeError:
            print("noticed")
            break
"""
    (tmp_path / "script.py").write_text(PRELUDE + code)
    command = f"'{sys.executable}' '{tmp_path}/script.py' '{tmp_path}' 0 | head -c 10 >/dev/null"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], timeout=60, env=environment)
    assert result.returncode == 0
    assert "noticed" in rank_log_path(tmp_path, 0).read_text()


def test_an_unopenable_log_leaves_everything_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    code = """
try:
    open_rank_log(run, rank)
except OSError:
    print("refused")
"""
    assert run_python(code, tmp_path).stdout == "refused\n"


def test_the_console_stream_knows_it_is_a_terminal(tmp_path: Path) -> None:
    code = """
log = open_rank_log(run, rank)
print(sys.stdout.isatty(), log.console_stream.isatty())
print("pretty ━", file=log.console_stream)
"""
    master, slave = os.openpty()
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    arguments = [sys.executable, "-c", PRELUDE + code, str(tmp_path), "0"]
    subprocess.run(arguments, stdout=slave, timeout=60, check=True, env=environment)
    shown = os.read(master, 4096).decode()
    os.close(master)
    os.close(slave)
    assert shown.strip() == "pretty ━"
    assert "False True\n" in rank_log_path(tmp_path, 0).read_text()


def test_rank_log_path() -> None:
    assert rank_log_path(Path("run"), 12) == Path("run/logs/rank-00012.log")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (999.6, "1.00k"), (12_345, "12.3k"), (999_999, "1.00M"), (12_345_678, "12.3M"),
     (7.24e9, "7.24B"), (5e12, "5.00T"), (3e16, "30000T"), (0.5, "0.50"), (float("nan"), "?")],
)  # fmt: skip
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (512, "512 B"), (1536, "1.50 KiB"), (1 << 30, "1.00 GiB"), (80 * 2**30, "80.0 GiB")]
)
def test_bytes(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0s"), (0.35, "0.35s"), (9.5, "9.5s"), (9.96, "10s"), (59.7, "1m 00s"), (62, "1m 02s"), (3599.9, "1h 00m"),
     (3720, "1h 02m"), (86399, "1d 00h"), (187_000, "2d 04h"), (-5, "-5.0s"), (None, "?"), (float("inf"), "?")],
)  # fmt: skip
def test_durations(value: float | None, text: str) -> None:
    assert format_duration(value) == text


def test_logs_of_many_ranks_lie_in_several_directories() -> None:
    assert rank_log_path(Path("run"), 999) == Path("run/logs/rank-00999.log")
    assert rank_log_path(Path("run"), 1000) == Path("run/logs/01xxx/rank-01000.log")
    assert rank_log_path(Path("run"), 12_345) == Path("run/logs/12xxx/rank-12345.log")


def test_large_log_is_put_aside(tmp_path: Path) -> None:
    """The newest lines stay, whoever writes them; the file before the last one is gone."""
    code = """
import logging, os, subprocess, sys
from pathlib import Path
from trainer.core.logs import open_rank_log
with open_rank_log(Path(sys.argv[1]), 0, 20_000) as log:
    for part in range(3):
        print(f"part {part}", "x" * 10_000, flush=True)
        assert log.put_aside_above(10_000)
        assert not log.put_aside_above(10_000)
    print("python")
    logging.getLogger("x").warning("logging")
    os.write(2, b"descriptor\\n")
    subprocess.run(["echo", "child"], check=True)
print("console")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "console\n"), done.stderr
    path = rank_log_path(tmp_path, 0)
    newest, aside = path.read_text(), path.with_name("rank-00000.log.1").read_text()
    assert newest.startswith("==== continued; what was before is in rank-00000.log.1 ====\n")
    for words in ("python\n", "logging\n", "descriptor\n", "child\n"):
        assert words in newest
    assert "part 2" in aside
    assert "part 1" not in aside
    assert len(list(path.parent.iterdir())) == 2
