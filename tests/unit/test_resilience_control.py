"""What a run makes of commands: each once, also after a restart; and when the time limit ends it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.core.control_file import control_path, new_command, stop_path, write_command
from trainer.resilience.control import Control, Save
from trainer.resilience.deadline import MARGIN_SECONDS, Deadline, Durations, lead_seconds
from trainer.resilience.job_end import JobEnd

pytestmark = pytest.mark.fast


class Run:
    """A run's control, with a clock of its own and a status that outlives restarts."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.now, self.status, self.said = directory, 0.0, dict[str, Any](), list[str]()
        self.start(0)

    def start(self, step: int) -> None:
        before = dict(self.status)
        self.control = Control(self.directory, 100, before, self.change, self.said.append, lambda: self.now)
        self.control.begin(step)

    def change(self, **changes: Any) -> None:
        self.status |= changes

    def look(self, step: int, newest: Save | None = None) -> tuple[bool, int]:
        self.now += 1.0
        return self.control.look(step, newest)

    def ask(self, action: Any, value: int | str | None = None, **more: Any) -> None:
        write_command(self.directory, new_command(action, value, who="ada@login", **more))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_stop_is_obeyed_once(run: Run) -> None:
    assert run.look(1) == (False, 0)
    run.ask("stop")
    run.look(2)
    assert run.control.stop is not None
    assert (run.control.stop.reason, run.control.stop.by_person) == ("trainer control stop by ada@login", True)
    assert run.status["control"]["state"] == "accepted"
    assert run.status["requeue"] is False, "said before the last save, which may fail"
    run.start(2)
    run.look(3)
    assert run.control.stop is None, "the restart must not stop again"


def test_a_batch_scripts_stop_is_no_persons_until_a_person_says_so(run: Run) -> None:
    run.ask("stop", requeue=True)
    run.look(1)
    assert run.control.stop is not None
    assert not run.control.stop.by_person
    assert "requeue" not in run.status
    stop_path(run.directory).touch()
    run.look(2)
    assert run.control.stop.by_person
    assert "stop file" in run.control.stop.reason


def test_stop_after_outlives_a_restart_and_is_done_once(run: Run) -> None:
    run.ask("stop-after", 5)
    run.look(3)
    assert run.status["stop_step"] == 5
    assert run.control.stop is None
    run.start(3)
    assert run.status["stop_step"] == 5
    run.look(4)
    assert run.control.stop is None
    run.look(5)
    assert run.control.stop is not None, "asked for with the step that is to be the last"
    run.start(5)
    assert run.status["stop_step"] is None
    run.look(6)
    assert run.control.stop is None


@pytest.mark.parametrize(("step", "said"), [(3, "step 3 is over"), (100, "the run ends at step 100"), (999, "ends")])
def test_a_stop_after_that_has_no_effect_is_refused(run: Run, step: int, said: str) -> None:
    run.ask("stop-after", step)
    run.look(4)
    assert run.status["control"]["state"] == "refused"
    assert said in run.status["control"]["outcome"]
    assert "stop_step" not in run.status


def test_clear_withdraws(run: Run) -> None:
    run.ask("stop-after", 5)
    run.look(1)
    run.ask("clear")
    run.look(2)
    assert run.status["stop_step"] is None
    run.look(6)
    assert run.control.stop is None


def test_a_save_is_asked_for_until_it_ended(run: Run) -> None:
    run.ask("save")
    assert run.look(4, Save(2, None)) == (True, 0)
    assert run.look(5, Save(2, None)) == (False, 0)
    assert run.status["control"]["state"] == "accepted"
    assert run.look(3) == (True, 0), "the run went back before it could save"
    run.look(4, Save(3, None))
    assert (run.status["control"]["state"], run.status["control"]["outcome"]) == ("done", "saved step 3")
    run.ask("save")
    run.look(5)
    run.control.finish(Save(5, "no room"))
    assert (run.status["control"]["state"], run.status["control"]["outcome"]) == ("failed", "no room")


def test_a_log_level_is_asked_for_once(run: Run) -> None:
    run.ask("log-level", "debug")
    assert run.look(1) == (False, 10)
    assert run.look(2) == (False, 0)


def test_a_bad_file_is_told_once_and_a_good_one_after_it_obeyed(run: Run) -> None:
    run.ask("stop")
    control_path(run.directory).chmod(0o666)
    for step in (1, 2, 3):
        run.look(step)
    assert [text for text in run.said if text.startswith("warning")] == [run.said[-1]]
    assert run.control.stop is None
    run.ask("stop")
    run.look(4)
    assert run.control.stop is not None


def test_files_are_looked_at_once_a_second(run: Run) -> None:
    run.look(1)
    run.ask("save")
    run.now += 0.5
    assert run.control.look(2, None) == (False, 0)
    run.now += 0.6
    assert run.control.look(3, None) == (True, 0)


def test_lead_is_measured_and_doubled() -> None:
    durations = Durations()
    assert lead_seconds(durations, evaluation_due=False, unmeasured_seconds=120) == 120 + MARGIN_SECONDS
    for seconds in (1.0, 4.0, 2.0):
        durations.note_step(seconds)
    durations.note_save(30.0)
    assert lead_seconds(durations, evaluation_due=False, unmeasured_seconds=120) == 2 * 34 + MARGIN_SECONDS
    assert lead_seconds(durations, evaluation_due=True, unmeasured_seconds=120) == 120 + MARGIN_SECONDS
    durations.note_evaluation(5, 100.0)
    durations.note_evaluation(5, 50.0)
    assert lead_seconds(durations, evaluation_due=True, unmeasured_seconds=120) == 2 * 184 + MARGIN_SECONDS
    durations.note_evaluation(10, 1.0)
    assert lead_seconds(durations, evaluation_due=True, unmeasured_seconds=120) == 2 * 35 + MARGIN_SECONDS


def test_the_deadline_follows_a_limit_that_changes() -> None:
    end: list[float | None] = [None]
    durations = Durations(save=5.0)
    durations.note_step(5.0)
    deadline = Deadline(lambda: end[0], durations, 120, clock=lambda: 1000.0)
    assert deadline.seconds_left(evaluation_due=False) is None
    end[0] = 1031.0
    assert deadline.seconds_left(evaluation_due=False) is None
    end[0] = 1029.0
    assert deadline.seconds_left(evaluation_due=False) == 29.0


@pytest.mark.parametrize("text", ["", "soon", "nan", "inf", "1000", "-1"])
def test_an_end_that_is_none_is_not_known(text: str) -> None:
    assert JobEnd({"SLURM_JOB_END_TIME": text}, None).unix() is None


def test_the_scheduler_is_asked_in_the_background_and_may_fail_or_hang() -> None:
    asked, hanging = threading.Event(), threading.Event()
    answers: list[Any] = [OSError("away"), 5e9]

    def ask(job_id: str) -> float | None:
        assert job_id == "17_3"
        if not answers:
            asked.set()
            hanging.wait(30)
            return None
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    variables = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    end = JobEnd(variables | {"SLURM_JOB_END_TIME": "4e9"}, ask, interval_seconds=0.01)
    assert asked.wait(30)
    assert end.unix() == 5e9, "the newest answer counts, and a question that hangs blocks nobody"
    hanging.set()
    time.sleep(0)
