"""Measure the data path against its peers, in one run: python tools/benchmark_data.py --peers-venv DIR

Writes one CSV row a measurement (docs/benchmarks/data.csv) and prints the table of docs/benchmarks.md.

Every measurement is a process of its own, timed from outside; subjects take turns (A B C A B C ...), and medians are
compared. What a peer does beyond its import and what counts of it is said in ``benchmark_data_peers.py``; where that is
a choice, it favours the peer. Peers are read from --peers-venv (made and filled if need be), else from this Python.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import benchmark_data_inputs as inputs
from benchmark_data_report import BENCHMARKS, TOOLS, WORKERS, Row, Subject, empty_row, table

PEER_PACKAGES = (
    ["torch==2.13.0"],
    ["megatron-core==0.16.1", "datatrove[io,processing]==0.10.1", "datasets", "tokenizers"],
)
SEQUENCE_LENGTH = 1024
STEP_SAMPLES, MICRO_SAMPLES = 32, 8


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    corpus_bytes: int = 64_000_000
    vocab_size: int = 32_000
    read_tokens: int = 16_000_000
    read_samples: int = 15_008
    shards: int = 5_000
    planned_samples: int = 1_000_000_000
    epochs: int = 3


QUICK = Sizes(300_000, 1_000, 300_000, 256, 20, 100_000, 2)


class Bench:
    """Runs subjects and keeps their rows."""

    def __init__(self, sizes: Sizes, scratch: Path, peers: Path | None, repeats: int) -> None:
        self.sizes, self.scratch, self.repeats = sizes, scratch, repeats
        self.peers = str(peers / "bin" / "python") if peers else sys.executable
        self.rows: list[Row] = []

    def run(self, benchmark: str) -> None:
        """Measure one benchmark, subjects interleaved."""
        spec = self._spec(benchmark)
        subjects = list(BENCHMARKS[benchmark][1])
        for repeat in range(1, self.repeats + 1):
            for subject in list(subjects):
                rows = list(self._measure(benchmark, subject, repeat, spec))
                self.rows += rows
                if rows[0].seconds is None:
                    subjects.remove(subject)
                for row in rows:
                    took = row.versions if row.seconds is None else f"{row.seconds:.2f} s"
                    print(f"{benchmark} {row.subject} {repeat}: {took}", file=sys.stderr, flush=True)
        counts = {row.subject: row.tokens for row in self.rows if row.benchmark == benchmark == "tokenize"}
        if len({tokens for tokens in counts.values() if tokens is not None}) > 1:
            raise SystemExit(f"the subjects made different numbers of tokens: {counts}")

    def _spec(self, benchmark: str) -> dict[str, Any]:
        sizes = self.sizes
        spec: dict[str, Any] = {"workers": WORKERS, "sequence_length": SEQUENCE_LENGTH, "batch": 1000}
        spec |= {"step_samples": STEP_SAMPLES, "micro_samples": MICRO_SAMPLES, "samples": sizes.read_samples}
        spec |= {"vocab_size": inputs.RANDOM_VOCABULARY, "end_of_document_id": 0, "epochs": sizes.epochs}
        spec |= {"end_of_document": inputs.END_OF_DOCUMENT, "expected_samples": sizes.planned_samples}
        if benchmark == "tokenize":
            make = partial(inputs.write_corpus, num_bytes=sizes.corpus_bytes, vocab_size=sizes.vocab_size)
            folder = inputs.made(self.scratch / "text", {"bytes": sizes.corpus_bytes, "vocab": sizes.vocab_size}, make)
            return spec | {"corpus": str(folder / "corpus"), "tokenizer": str(folder / "tokenizer")}
        if benchmark == "open":
            tokens = sizes.planned_samples // sizes.shards * SEQUENCE_LENGTH + inputs.SPARSE_DOCUMENTS
            make = partial(inputs.write_sparse_set, num_shards=sizes.shards, tokens_a_shard=tokens)
            folder = inputs.made(self.scratch / "sparse", {"shards": sizes.shards, "tokens": tokens}, make)
            return spec | {"set": str(folder / "all"), "folder": str(folder / "members")}
        make = partial(inputs.write_random, num_tokens=sizes.read_tokens)
        folder = inputs.made(self.scratch / "random", {"tokens": sizes.read_tokens}, make)
        (folder / "ours.bin").read_bytes()  # the page cache is warm for everybody
        return spec | {"prefix": str(folder / "ours")}

    def _measure(self, benchmark: str, subject: Subject, repeat: int, spec: dict[str, Any]) -> Iterator[Row]:
        output = self.scratch / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        if subject.key == "cli":
            argv = inputs.trainer_command(
                "data", "tokenize", "--input", spec["corpus"], "--tokenizer", spec["tokenizer"],
                "--output", str(output / "ours"), "--workers", str(WORKERS),
            )  # fmt: skip
        else:
            file = "benchmark_data_ours.py" if subject.is_ours else "benchmark_data_peers.py"
            python = sys.executable if subject.is_ours or subject.in_this_python else self.peers
            argv = [python, str(TOOLS / file), subject.key, json.dumps(spec | {"output": str(output)})]
        seconds, max_rss, text = _timed(argv, one_thread=benchmark != "tokenize", log=self.scratch / "log")
        if subject.key == "cli":
            sidecar = json.loads((output / "ours.json").read_text())
            result: dict[str, Any] = {"tokens": sidecar["num_tokens"], "versions": f"trainer {version('trainer')}"}
        else:
            result = json.loads(text.splitlines()[-1])
        shutil.rmtree(output)
        if "missing" in result:
            yield empty_row(benchmark, subject.name, result["missing"])
            return
        for part in result.get("parts", [result]):
            name = f"{subject.name}, {part['name']}" if "name" in part else subject.name
            times = {"seconds": seconds, **{key: part.get(key) for key in ("deliver_seconds", "steady_seconds")}}
            rate = part["tokens"] / times[subject.counts]
            yield Row(
                benchmark, name, repeat, tokens=part["tokens"], tokens_per_second=rate,
                max_rss_bytes=part.get("max_rss_bytes", max_rss), growth_bytes=part.get("growth_bytes"),
                versions=result["versions"], cores=os.cpu_count() or 1, **times,
            )  # fmt: skip


def _timed(argv: list[str], one_thread: bool, log: Path) -> tuple[float, int, str]:
    """Run a process; return its wall clock, the resident memory of its largest process and its stdout."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TOOLS.parent)}
    if one_thread:
        environment["OMP_NUM_THREADS"] = "1"
    with log.open("w+") as errors, (log.parent / "stdout").open("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(argv, stdout=output, stderr=errors, env=environment, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(argv)} ended with {process.returncode}:\n{errors.read()}")
        output.seek(0)
        return seconds, usage.ru_maxrss * 1024, output.read()


def fill_venv(directory: Path) -> None:
    """Make the peers' virtual environment and install what it lacks."""
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    probe = "import torch, megatron.core.datasets.gpt_dataset, datatrove.pipeline.tokens, datasets, tokenizers"
    if subprocess.run([str(python), "-c", probe], capture_output=True, check=False).returncode == 0:
        return
    for packages in PEER_PACKAGES:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(BENCHMARKS), action="append", help="may be given several times")
    parser.add_argument("--repeats", type=int, help="default: 5")
    parser.add_argument("--output", type=Path, default=TOOLS.parent / "docs" / "benchmarks" / "data.csv")
    parser.add_argument("--peers-venv", type=Path, help="environment of the peers; made and filled if need be")
    parser.add_argument("--scratch", type=Path, help="keep the inputs here and use them again (2 GB)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat: does it run at all?")
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int)
    given = parser.parse_args()
    if given.peers_venv:
        fill_venv(given.peers_venv)
    sizes = asdict(QUICK if given.quick else Sizes())
    sizes |= {name: getattr(given, name) for name in sizes if getattr(given, name) is not None}
    repeats = given.repeats or (1 if given.quick else 5)
    benchmarks = given.only or list(BENCHMARKS)
    scratch = given.scratch or Path(tempfile.mkdtemp(prefix="benchmark-data-"))
    scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(Sizes(**sizes), scratch.resolve(), given.peers_venv and given.peers_venv.resolve(), repeats)
    try:
        for benchmark in benchmarks:
            bench.run(benchmark)
    finally:
        if given.scratch is None:
            shutil.rmtree(scratch)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with given.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in bench.rows)
    print(table(bench.rows, f"python tools/benchmark_data.py {' '.join(sys.argv[1:])}".strip(), sizes))


if __name__ == "__main__":
    main()
