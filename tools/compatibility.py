"""Sweep model families and layouts against plain transformers and write the tables of docs/compatibility.md.

usage: python tools/compatibility.py [--families NAME ...] [--layouts] [--seed N] [--write] [--directory DIR]

Without ``--families`` every causal-LM family of the installed transformers is taken in two pipeline stages (with it and
no names: none); with ``--layouts`` the matrix of five families and all layouts too. Exits with 1 if a cell is red that
should not be.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import transformers
from compatibility_cases import GRADIENT_BOUND, LOSS_BOUND, WEIGHT_BOUND, Bench, Case, Outcome
from compatibility_configs import attention_of, families, has_plan, tiny_config
from compatibility_layouts import DAMAGED, layout_cases

DOCUMENT = Path(__file__).parents[1] / "docs" / "compatibility.md"
TWO_STAGES = {"parallel": {"pipeline": 2}}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="*")
    parser.add_argument("--layouts", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/compatibility.md")
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options.directory or Path(temporary), options.seed)
        names = families() if options.families is None else options.families
        by_family = {name: family_outcome(bench, name) for name in names}
        damaged = {case.name: bench.run(case) for case in DAMAGED}
        matrix = {case.name: bench.run(case) for case in layout_cases()} if options.layouts else {}
        bench.close()
    seconds = time.perf_counter() - started
    for name, outcome in [*matrix.items(), *damaged.items()]:
        print(f"{'passed' if outcome.passed else 'FAILED'}  {name}  {described(outcome)}")
    planned = [name for name in by_family if has_plan(name)]
    passed = [name for name, outcome in by_family.items() if outcome.passed]
    print(
        f"seed {options.seed}: {len(passed)} of {len(by_family)} families pass, {len(set(passed) & set(planned))} of "
        f"{len(planned)} with a published plan; layouts {sum(o.passed for o in matrix.values())} of {len(matrix)}; "
        f"{sum(not o.passed for o in damaged.values())} of {len(damaged)} damaged ones are red; {seconds:.0f} s"
    )
    if options.write:
        write(by_family, damaged, matrix, options.seed, seconds)
    if any(outcome.passed for outcome in damaged.values()) or not all(o.passed for o in matrix.values()):
        sys.exit(1)


def family_outcome(bench: Bench, name: str) -> Outcome:
    """Return how two stages of a family compare with the whole model."""
    try:
        config = tiny_config(name)
        attention = attention_of(config)
        outcome = bench.run(Case(name, config, recipe=TWO_STAGES, attention=attention))
    except Exception as error:  # noqa: BLE001 - whatever a family's config class raises goes into the table
        outcome = Outcome(error=f"no tiny config: {' '.join(str(error).split())[:200]}")
    print(f"{'passed' if outcome.passed else 'FAILED'}  {name}  {described(outcome)}", flush=True)
    return outcome


def described(outcome: Outcome) -> str:
    """Return the deviations, or the reason there are none."""
    if outcome.error is not None:
        return outcome.error
    loss, gradient, weights = outcome.numbers
    numbers = f"loss {loss}, gradient {gradient or 'not told'}, weights {weights}"
    return numbers + (f", initial weights {outcome.initial:.1e}" if outcome.initial else "")


def write(
    by_family: dict[str, Outcome],
    damaged: dict[str, Outcome],
    matrix: dict[str, Outcome],
    seed: int,
    seconds: float,
) -> None:
    """Replace the generated part of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    families = _family_lines(by_family, damaged, seed, seconds) if by_family else []
    for name, lines in (("families", families), ("layouts", _rows(matrix))):
        begin, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
        if lines and begin in text:
            before, rest = text.split(begin)
            after = rest.split(end)[1]
            text = f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}"
    DOCUMENT.write_text(text, encoding="utf-8")


def _family_lines(by_family: dict[str, Outcome], damaged: dict[str, Outcome], seed: int, seconds: float) -> list[str]:
    passed = {name: outcome for name, outcome in by_family.items() if outcome.passed}
    planned = [name for name in by_family if has_plan(name)]
    lines = [
        f"`python tools/compatibility.py --layouts --seed {seed} --write`, transformers {transformers.__version__}, "
        f"{seconds:.0f} s on two cores: **{len(passed)} of {len(by_family)} families pass, "
        f"{len([n for n in planned if n in passed])} of the {len(planned)} with a published pipeline plan.**",
        "",
        f"Bounds: loss of the first step {LOSS_BOUND:g}, gradient of every parameter {GRADIENT_BOUND:g} relative, "
        f"weights after three SGD steps {WEIGHT_BOUND:g}, initial weights equal to the last bit. *Plan*: transformers "
        "publishes where the family may be cut; the others are cut by what their modules are.",
        "",
        "| family | plan | loss | gradient | weights |",
        "|---|---|---|---|---|",
    ]
    for name, outcome in sorted(passed.items()):
        plan = "yes" if name in planned else ""
        lines.append(f"| {name} | {plan} | {' | '.join(outcome.numbers)} |")
    lines += ["", "Not in stages:", "", "| family | plan | reason |", "|---|---|---|"]
    for name, outcome in sorted(by_family.items()):
        if not outcome.passed:
            reason = described(outcome).replace("|", "\\|")
            lines.append(f"| {name} | {'yes' if name in planned else ''} | {reason} |")
    return [*lines, "", "Broken on purpose, to see that a cell can turn red:", "", *_rows(damaged)]


def _rows(outcomes: dict[str, Outcome]) -> list[str]:
    if not outcomes:
        return []
    lines = ["| case | loss | gradient | weights | |", "|---|---|---|---|---|"]
    for name, o in outcomes.items():
        numbers = "| | " if o.error else " | ".join(o.numbers)
        lines.append(f"| {name} | {numbers} | {'passed' if o.passed else '**red** ' + (o.error or '')} |")
    return lines


if __name__ == "__main__":
    main()
