"""How ranks meet and where they run: real ranks, wrong addresses, and the CPUs that they are bound to."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from forked_runs import Trainer

SECONDS = 2.0


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    with Trainer(tmp_path_factory.mktemp("launching")) as trainer:
        yield trainer


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("late", r"1 of 2 ranks did not come to 127\.0\.0\.1:\d+ within 2 s: rank 1 → "),
        ("taken", r"MASTER_PORT = \d+ is in use on \S+, where rank 0 runs"),
        ("unknown-name", r"can't resolve MASTER_ADDR = no-such-host\.invalid .*→ set MASTER_ADDR"),
        ("other-address", r"rank 0 on \S+ reached nobody at 192\.0\.2\.1:\d+ .* → .*no address of"),
    ],
)
def test_who_is_missing_is_named(trainer, kind, words):
    recipe = trainer.recipe(kind, launch={"rendezvous_timeout_seconds": SECONDS})
    with socket.create_server(("", 0)) as taken:
        variables = {"MEET": kind, "TAKEN_PORT": str(taken.getsockname()[1])}
        # Others that reach what took the port would wait for their launcher, which ends them with rank 0.
        world = 1 if kind == "taken" else 2
        codes = trainer.train(recipe, before="meet_wrongly", variables=variables, world=world)
    said = recipe.with_suffix(".out").read_text()
    assert set(codes) == {1}, said
    assert re.search(words, said), said
    assert "Traceback" not in said
    assert trainer.status(kind)["state"] == "failed"


def test_ranks_share_the_cpus(trainer):
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one CPU can't be shared")
    recipe = trainer.recipe("bound", run={"steps": 2}, evaluation={"every_steps": 10})
    trainer.check(trainer.train(recipe, before="show_cpus"), recipe)
    cpus = [set(map(int, Path(trainer.directory / f"cpus-{rank}").read_text().split())) for rank in (0, 1)]
    assert cpus[0] | cpus[1] == set(allowed)
    assert not cpus[0] & cpus[1]
    said = recipe.with_suffix(".out").read_text()
    assert re.search(r"CPUs of node 0 by local rank: 0: \S+, 1: \S+; 1 threads a rank", said), said

    recipe = trainer.recipe("free", run={"steps": 2}, evaluation={"every_steps": 10}, launch={"bind": "none"})
    trainer.check(trainer.train(recipe, before="show_cpus"), recipe)
    assert Path(trainer.directory / "cpus-0").read_text().split() == [str(cpu) for cpu in allowed]
