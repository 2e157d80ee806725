"""tools/benchmark_data.py runs, at tiny sizes: our subjects are measured, every peer is measured or named missing."""

from __future__ import annotations

import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny

PARTS = (["tokenize", "open", "memory"], ["read"])
OURS = {
    "tokenize": ["trainer"],
    "read": ["trainer", "trainer, ahead", "trainer, plain", "trainer, plain, ahead"],
    "open": ["trainer, checked", "trainer, folder", "trainer, set"],
    "memory": ["trainer, epoch 1", "trainer, epoch 2"],
}
PEERS = {
    "tokenize": ["datasets", "datatrove", "tokenizers, raw"],
    "read": ["datatrove", "datatrove, positions", "megatron-core", "megatron-core, same", "np.memmap"],
    "open": ["megatron-core"],
    "memory": [],
}

pytestmark = pytest.mark.sweep  # a short benchmark of every subject


def benchmark(folder: Path, number: int) -> subprocess.CompletedProcess[str]:
    """Run one half of the benchmarks: two processes at a time, as each waits for others."""
    only = [word for name in PARTS[number] for word in ("--only", name)]
    program = [sys.executable, str(tiny.ROOT / "tools" / "benchmark_data.py"), "--quick", *only]
    return tiny.run([*program, "--output", str(folder / f"{number}.csv")], folder, timeout=150)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], str]:
    """Return the rows of both CSV files and the tables."""
    folder = tmp_path_factory.mktemp("benchmark")
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda number: benchmark(folder, number), range(2)))
    assert [run.returncode for run in done] == [0, 0], "".join(run.stderr for run in done)
    found: list[dict[str, str]] = []
    for number in range(2):
        with (folder / f"{number}.csv").open(newline="") as file:
            found += csv.DictReader(file)
    return found, "".join(run.stdout for run in done)


@pytest.mark.parametrize("name", OURS)
def test_every_subject_is_measured_or_missing(rows: tuple[list[dict[str, str]], str], name: str) -> None:
    mine = {row["subject"]: row for row in rows[0] if row["benchmark"] == name}
    assert sorted(mine) == sorted(OURS[name] + PEERS[name])
    for subject, row in mine.items():
        missing = row["versions"].startswith("missing: No module named")
        assert not (missing and subject in OURS[name])
        assert missing == (row["seconds"] == "")
        if not missing:
            assert min(float(row[key]) for key in ("seconds", "tokens", "tokens_per_second", "max_rss_bytes")) > 0
            assert row["versions"]
            assert int(row["cores"]) >= 1
        assert f"| {subject} |" in rows[1]
    assert f"### {name}" in rows[1]


def test_peers_that_are_dependencies_of_ours_are_measured(rows: tuple[list[dict[str, str]], str]) -> None:
    measured = {row["subject"] for row in rows[0] if row["seconds"]}
    assert {"tokenizers, raw", "np.memmap", "datasets"} <= measured


def test_tokenizers_agree_and_samples_are_counted(rows: tuple[list[dict[str, str]], str]) -> None:
    tokens = {row["subject"]: int(row["tokens"]) for row in rows[0] if row["benchmark"] == "tokenize" and row["tokens"]}
    assert len(set(tokens.values())) == 1
    read = {int(row["tokens"]) for row in rows[0] if row["benchmark"] == "read" and row["tokens"]}
    assert read == {256 * 1024}
    planned = {int(row["tokens"]) for row in rows[0] if row["subject"].startswith("trainer,") and row["growth_bytes"]}
    assert min(planned) >= 100_000 * 1024
