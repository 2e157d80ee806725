"""What a person sees while the run goes: a live line on a terminal, sparse plain lines anywhere else."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.core.units import format_count, format_duration
from trainer.telemetry.record import CheckpointRecord, EvaluationRecord, GoodputRecord, StepRecord
from trainer.telemetry.sinks.base import Sink
from trainer.telemetry.throughput import MovingRate

_PLAIN_SECONDS = 10.0  # a plain line at least this often ...
_PLAIN_LINES = 20  # ... and at least this many lines over the run
_REFRESH_SECONDS = 0.1


def console_sink(stream: TextIO, name: str, resume_step: int, total_steps: int) -> Sink:
    """Return the display that suits ``stream``: a terminal that can move its cursor, or not."""
    if stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        return TerminalSink(stream, name, resume_step, total_steps)
    return PlainSink(stream, resume_step, total_steps)


class _Pace:
    """Turn records as they come in into smoothed tokens/s and time left. Wall time, so pauses count in the ETA."""

    def __init__(self, resume_step: int, total_steps: int, clock: Callable[[], float]) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._steps = MovingRate()
        self._tokens = MovingRate(window=20)
        self._last_step = resume_step
        self._last_seconds = 0.0

    def observe(self, record: StepRecord) -> None:
        now = self._clock()
        first = self._last_seconds == 0.0
        # Loading the model came before the first record, so that step is taken at its own word.
        seconds = record.step_seconds if first else now - self._last_seconds
        self._steps.observe(1 if first else record.step - self._last_step, seconds)
        self._tokens.observe(record.tokens_per_second * record.step_seconds, record.step_seconds)
        self._last_step, self._last_seconds = record.step, now

    @property
    def tokens_per_second(self) -> float:
        return self._tokens.per_second or 0.0

    @property
    def seconds_left(self) -> float | None:
        return self._steps.seconds_for(max(0, self._total_steps - self._last_step))


class PlainSink:
    """Print ``step 20/200 loss=3.4512 ...``: the first and last step, and in between no more than is useful."""

    def __init__(
        self, stream: TextIO, resume_step: int, total_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._clock = clock
        self._pace = _Pace(resume_step, total_steps, clock)
        self._every_steps = max(1, math.ceil(total_steps / _PLAIN_LINES))
        self._next_step = 0
        self._next_seconds = 0.0
        self._pending: StepRecord | None = None

    def __str__(self) -> str:
        return "the console"

    def step(self, record: StepRecord) -> None:
        """Print the step if a line is due. Raises OSError when the stream is gone."""
        self._pace.observe(record)
        due = record.step >= self._next_step or self._clock() >= self._next_seconds
        if due or record.step >= self._total_steps:
            self._print_step(record)
        else:
            self._pending = record

    def evaluation(self, record: EvaluationRecord) -> None:
        """Print the evaluation. Raises OSError when the stream is gone."""
        self._print(
            f"step {record.step}/{self._total_steps} validation={record.name} loss={record.validation_loss:.4f} "
            f"perplexity={record.perplexity:.6g} seconds={record.seconds:.1f}"
        )

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Nothing: a message says it."""

    def goodput(self, record: GoodputRecord) -> None:
        """Nothing: the report at the end says it."""

    def message(self, text: str) -> None:
        """Print a sentence. Raises OSError when the stream is gone."""
        self._print(text)

    def close(self) -> None:
        """Print the last step if it hasn't been: the run may end early."""
        if self._pending is not None:
            self._print_step(self._pending)

    def _print_step(self, record: StepRecord) -> None:
        self._pending = None
        self._next_step = (record.step // self._every_steps + 1) * self._every_steps
        self._next_seconds = self._clock() + _PLAIN_SECONDS
        parts = [
            f"step {record.step}/{self._total_steps}",
            f"loss={record.loss:.4f}",
            f"grad_norm={record.grad_norm:.4g}",
            f"learning_rate={record.learning_rate:.3e}",
            f"tokens_per_second={self._pace.tokens_per_second:.0f}",
        ]
        if record.model_flops_utilization is not None:
            parts.append(f"mfu={record.model_flops_utilization:.3f}")
        if record.skipped:
            parts.append(f"skipped={record.skipped}")
        parts.append(f"eta={format_duration(self._pace.seconds_left).replace(' ', '')}")
        self._print(" ".join(parts))

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class TerminalSink:
    """Keep one live line at the bottom; evaluations and messages scroll by above it."""

    def __init__(
        self,
        stream: TextIO,
        name: str,
        resume_step: int,
        total_steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._name = name
        self._done_steps = resume_step
        self._total_steps = total_steps
        self._clock = clock
        self._pace = _Pace(resume_step, total_steps, clock)
        self._record: StepRecord | None = None
        self._next_refresh_seconds = 0.0
        self._console = Console(file=stream, highlight=False, soft_wrap=False, force_terminal=True)
        # No refresh thread (it would keep drawing in a hung run), and stdout is a log by now, not ours to redirect.
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._fit()
        self._live.start()
        self._console.show_cursor(True)  # a SIGKILL would leave the user's terminal without one
        self._refresh()

    def __str__(self) -> str:
        return "the console"

    def step(self, record: StepRecord) -> None:
        """Move the line on. Raises OSError when the terminal is gone."""
        self._pace.observe(record)
        self._record, self._done_steps = record, record.step
        now = self._clock()
        if now >= self._next_refresh_seconds or record.step >= self._total_steps:
            self._next_refresh_seconds = now + _REFRESH_SECONDS
            self._refresh()

    def evaluation(self, record: EvaluationRecord) -> None:
        """Print the evaluation above the line. Raises OSError when the terminal is gone."""
        self._print(
            Text.assemble(
                (f"step {record.step:<7} ", "dim"),
                f"validation {record.name}  loss ",
                (f"{record.validation_loss:.4f}", "bold"),
                f"  perplexity {record.perplexity:.5g}",
                (f"  {format_duration(record.seconds)}", "dim"),
            )
        )

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Nothing: a message says it."""

    def goodput(self, record: GoodputRecord) -> None:
        """Nothing: the report at the end says it."""

    def message(self, text: str) -> None:
        """Print a sentence above the line. Raises OSError when the terminal is gone."""
        self._print(Text(text, style="yellow" if text.startswith("warning") else ""))

    def close(self) -> None:
        """Draw the line a last time and leave it standing."""
        if self._live.is_started:
            self._refresh()
            self._live.stop()

    def _print(self, text: Text) -> None:
        self._fit()
        self._console.print(text)

    def _refresh(self) -> None:
        self._fit()
        self._live.update(self._line(), refresh=True)

    def _fit(self) -> None:
        # Rich asks descriptors 0-2 for the size; 1 and 2 are a log file here, so ask the terminal itself.
        try:
            self._console.width = max(20, os.get_terminal_size(self._stream.fileno()).columns)
        except (OSError, ValueError):
            self._console.width = 80

    def _line(self) -> Table:
        """Lay out name, bar and numbers; what doesn't fit is dropped, least important first."""
        width = self._console.width
        head = Text.assemble((self._name, "bold"), f" {self._done_steps}/{self._total_steps}")
        parts = self._numbers()
        bar_columns = 12 if width >= 60 else 6
        while len(parts) > 1 and head.cell_len + bar_columns + sum(part.cell_len + 2 for _, part in parts) + 1 > width:
            parts.remove(min(parts, key=lambda part: part[0]))
        line = Table.grid(padding=(0, 1, 0, 0), expand=True)
        line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=max(1, self._total_steps), completed=self._done_steps)
        line.add_row(head, bar, Text("  ").join(part for _, part in parts))
        return line

    def _numbers(self) -> list[tuple[int, Text]]:
        """Return (importance, text) from left to right."""
        record = self._record
        if record is None:
            return [(9, Text("starting", style="dim"))]
        parts = [
            (8, Text.assemble("loss ", (f"{record.loss:.4f}", "bold"))),
            (5, Text(f"lr {record.learning_rate:.2e}")),
            (6, Text(f"{format_count(self._pace.tokens_per_second)} tok/s")),
        ]
        if record.model_flops_utilization is not None:
            parts.append((3, Text(f"{record.model_flops_utilization:.1%} MFU")))
        parts.append((4, Text(f"grad {record.grad_norm:.3g}")))
        if record.skipped:
            parts.append((7, Text(f"{record.skipped} skipped", style="yellow")))
        if record.step < self._total_steps:
            parts.append((9, Text(f"{format_duration(self._pace.seconds_left)} left", style="cyan")))
        else:
            parts.append((9, Text("done", style="green")))
        return parts
