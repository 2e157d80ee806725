"""From what every rank was doing to the one that is the cause: a pure function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trainer.core.errors import EXIT_DO_NOT_RESTART
from trainer.resilience.failure_classes import FailureClass, Kind, classify, is_echo
from trainer.resilience.rank_report import RankReport

_MAXIMUM_CAUSE = 600
_STEP_PHASES = ("data", "forward", "backward", "optimizer", "log", "evaluate", "save")
_CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP", "SIGSYS")

_HANG_FIX = (
    "the Python stack of the rank is in {stacks}; is it a call into a library, a lock, or a disk that does not answer?"
)


@dataclass(frozen=True)
class Failure:
    """Who ended a launch, and why."""

    failure_class: FailureClass
    retryable: bool
    rank: int | None
    """None: not the fault of one rank."""
    host: str | None
    phase: str | None
    step: int | None
    cause: str
    """One sentence that names rank, host and phase."""
    fix: str
    suspect_hosts: tuple[str, ...] = ()
    """Hosts that the next start should do without."""
    same_words: tuple[int, ...] = ()
    """Ranks that raised the same exception with the same message."""


def summarise(reports: Sequence[RankReport], hosts: Mapping[int, str] | None = None) -> Failure | None:
    """Return the cause of a failure from the ranks' reports; None where nobody failed.

    ``hosts`` names the host of each rank, as far as it is known: of ranks that left no report too. What counts, in this
    order: a rank that was killed, one that raised something of its own, one that is stopped, hosts that can't reach
    each other, ranks without a report, one that does something else than the collective that the others wait in.
    """
    failed = [report for report in reports if report.event != "snapshot"]
    if not failed:
        return None
    hosts = dict(hosts or {}) | {report.rank: report.host for report in reports}
    dead = sorted((r for r in failed if r.event in ("died", "exited")), key=lambda r: r.time_unix)
    if dead:
        # An abort may be a library's answer to a lost connection.
        return _dead(next((r for r in dead if not is_lost_connection(r)), dead[0]))
    raised = sorted((r for r in failed if r.event == "raised"), key=lambda r: (r.exception_unix, r.rank))
    first_hand = [report for report in raised if not is_lost_connection(report)]
    missing = sorted(set(range(failed[0].world_size)) - {report.rank for report in reports})
    if first_hand:
        return _raised_first(first_hand, missing, hosts)
    stopped = [report for report in reports if report.process_state == "T"]
    if stopped:
        return _stopped(stopped[0])
    held = [report for report in failed if report.event == "stalled" and report.lock_held]
    if held:
        return _holding(min(held, key=lambda r: r.time_unix - r.stalled_seconds))
    return _unreachable(reports) or _missing(missing, hosts, reports) or _hanging(reports, raised)


def summarise_alone(report: RankReport) -> Failure | None:
    """Return what the report of one rank says where the others' can't be read; None where it did not fail."""
    if report.event == "snapshot":
        return None
    if report.event in ("died", "exited"):
        return _dead(report)
    if report.event == "raised":
        hosts = {report.rank: report.host}
        return _echo_alone(report) if is_lost_connection(report) else _raised_first([report], [], hosts)
    if report.process_state == "T":
        return _stopped(report)
    if report.lock_held:
        return _holding(report)
    if report.in_collective:
        fix = "the run directory did not answer in time, so that what the other ranks did is not known: check its mount"
        return _failure(report, Kind("hang", fix), f"waits in {_call(report)}, in {where(report)}")
    return _apart(report, [])


def stacks_name(report: RankReport) -> str:
    """Return where the stacks of the rank are, below the run directory."""
    return f"failures/{report.launch}/rank-{report.rank:05d}.stacks.txt"


def _failure(report: RankReport, kind: Kind, what: str, *, suspect: bool = False) -> Failure:
    cause = f"rank {report.rank} on {report.host} {what}"
    cut = cause if len(cause) <= _MAXIMUM_CAUSE else f"{cause[:_MAXIMUM_CAUSE]}..."
    return Failure(
        kind.name, kind.retryable, report.rank, report.host, report.phase, report.step, cut, kind.fix,
        (report.host,) if suspect or kind.name == "node" else (),
    )  # fmt: skip


def where(report: RankReport) -> str:
    """Return "forward of step 12, micro-batch 1", or "start (joining the process group)"."""
    text = report.phase
    if report.phase in _STEP_PHASES:
        text += f" of step {report.step}"
    if report.micro_batch >= 0:
        text += f", micro-batch {report.micro_batch}"
    doing = report.reading if report.phase == "data" and report.reading else report.detail
    return f"{text} ({doing})" if doing else text


def is_lost_connection(report: RankReport) -> bool:
    """Return whether the rank ended because it lost another: not the cause."""
    if report.event == "raised":
        return is_echo(f"{report.exception_type}: {report.exception_message}")
    return report.signal == "SIGABRT" and is_echo(report.log_tail)


def _dead(report: RankReport) -> Failure:
    if report.event == "exited":
        kind = classify(report.log_tail, report.phase) or Kind(
            "killed", f"something in the process called exit: see the end of logs/rank-{report.rank:05d}.log"
        )
        return _failure(report, kind, f"exited with code {report.exit_code} without a word, in {where(report)}")
    died = f"was killed by {report.signal} in {where(report)}"
    if report.out_of_memory and report.signal == "SIGKILL":
        kind = classify("oom-kill", report.phase)
        assert kind is not None
        return _failure(report, kind, f"{died}: the machine ran out of memory")
    known = classify(report.log_tail, report.phase) if report.signal in _CRASHES else None
    if report.signal in _CRASHES:
        fix = f"a crash in C: the Python stack is in {stacks_name(report)}; is a library broken or of another version?"
    else:
        fix = "who sent the signal? The system does when memory runs out (dmesg), an operator, or the scheduler"
    return _failure(report, known or Kind("killed", fix), died)


def _raised_first(first_hand: Sequence[RankReport], missing: Sequence[int], hosts: Mapping[int, str]) -> Failure:
    """Name the rank that raised first; of those that raised the same, the lowest: who was quickest says nothing.

    Where every rank did, no rank is the cause, and no host is suspected, unless there is but one.
    """
    first = first_hand[0]
    words = (first.exception_type, first.exception_message)
    same = sorted((r for r in first_hand if (r.exception_type, r.exception_message) == words), key=lambda r: r.rank)
    lowest = same[0]
    failure = replace(_raised(lowest, missing, hosts), same_words=tuple(report.rank for report in same))
    if len(same) < max(2, first.world_size) or failure.failure_class == "corruption":
        return failure
    what = failure.cause.removeprefix(f"rank {lowest.rank} on {lowest.host} ")
    if len({report.host for report in same}) == 1:
        return replace(failure, rank=None, cause=f"all ranks on {lowest.host} {what}")
    return replace(failure, rank=None, host=None, cause=f"all ranks {what}", suspect_hosts=())


def _echo_alone(report: RankReport) -> Failure:
    """Say what a rank lost where no report tells why: the disk of the run directory is full or away, for one."""
    words = " ".join(f"{report.exception_type}: {report.exception_message}".split())
    fix = (
        "the ranks' reports could not be written or read: what another rank said counts; else look whether the disk of "
        "the run directory is full, and at the network between the hosts"
    )
    what = f"lost a connection in {where(report)}, and no report says why: {words}"
    return _failure(report, Kind("network", fix), what)


def _raised(report: RankReport, missing: Sequence[int], hosts: Mapping[int, str]) -> Failure:
    words = f"{report.exception_type}: {report.exception_message}"
    if report.exception_type == "CorruptionError":  # every rank says the same of another
        blamed = [int(rank) for rank in report.blamed_ranks if rank.isdecimal()] or [report.rank]
        fix = "memory, a device or a connection of that host is not to be trusted: start again without it"
        cause = f"in {where(report)}: {' '.join(report.exception_message.split())}"
        host = hosts.get(blamed[0])
        return Failure("corruption", True, blamed[0], host, report.phase, report.step, cause, fix, report.blamed_hosts)
    kind = classify(words, report.phase) or Kind(
        "exception", f"the traceback is at the end of logs/rank-{report.rank:05d}.log"
    )
    if report.exit_code == EXIT_DO_NOT_RESTART:
        kind = Kind(kind.name, kind.fix, retryable=False)
    unseen = f"no sign of rank {_ranges(missing)}; " if missing and kind.name == "rendezvous" else ""
    return _failure(report, kind, f"failed in {where(report)}: {unseen}{' '.join(words.split())}")


def _stopped(report: RankReport) -> Failure:
    fix = "somebody or something sent SIGSTOP: kill -CONT lets a process go on; start again"
    return _failure(report, Kind("stopped", fix), f"is stopped (SIGSTOP), in {where(report)}")


def _holding(report: RankReport) -> Failure:
    what = f"has run no Python code for {report.stalled_seconds:.0f} s, in {where(report)}: C code keeps the lock"
    return _failure(report, Kind("hang", _HANG_FIX.format(stacks=stacks_name(report))), what)


def _unreachable(reports: Sequence[RankReport]) -> Failure | None:
    """Name hosts that can't connect to each other; suspect is who appears in most pairs."""
    pairs = [(report.host, other) for report in reports for other in report.unreachable]
    if not pairs:
        return None
    counts = Counter(host for pair in {tuple(sorted(pair)) for pair in pairs} for host in pair)
    most = max(counts.values())
    first = next(report for report in reports if report.unreachable)
    cause = f"{pairs[0][0]} cannot reach {pairs[0][1]}" + (f" (and {len(pairs) - 1} more)" if len(pairs) > 1 else "")
    fix = "the network between these hosts: check links, routes and firewalls, or leave a host out"
    return Failure(
        "network", True, first.rank, first.host, first.phase, first.step,
        f"{cause}: rank {first.rank} on {first.host} waits in {_call(first) or where(first)}", fix,
        tuple(sorted(host for host, count in counts.items() if count == most)),
    )  # fmt: skip


def _missing(missing: Sequence[int], hosts: Mapping[int, str], reports: Sequence[RankReport]) -> Failure | None:
    """Name ranks that left no report: where all of a host's did not, the host is gone or cut off."""
    if not missing or all(report.phase == "stop" for report in reports):  # the others may have ended
        return None
    alive = {report.host for report in reports}
    gone = sorted({hosts[rank] for rank in missing if rank in hosts} - alive)
    ranks = f"rank{'s' if len(missing) > 1 else ''} {_ranges(missing)}"
    waiting = next((report for report in reports if report.event == "stalled"), reports[0])
    here = hosts.get(missing[0])
    if not gone and here in alive:
        fix = (
            "something killed the rank together with its supervisor: the system for want of memory (dmesg), or a person"
        )
        cause = f"{ranks} on {here} left no sign; the others wait in {where(waiting)}"
        return Failure("killed", True, missing[0], here, waiting.phase, waiting.step, cause, fix)
    fix = "the host crashed, lost its network or the run directory: leave it out (sbatch --exclude) and look at its log"
    name = ", ".join(gone) or hosts.get(missing[0], "an unknown host")
    cause = f"{ranks} on {name} left no sign: the host is gone or cut off; the others wait in {where(waiting)}"
    return Failure("node", True, missing[0], name, waiting.phase, waiting.step, cause, fix, tuple(gone))


def _hanging(reports: Sequence[RankReport], raised: Sequence[RankReport]) -> Failure:
    """Compare what ranks wait for. Only echoes and ranks that make no progress are left."""
    stalled = [report for report in reports if report.event in ("stalled", "snapshot")]
    outside = [report for report in stalled if not report.in_collective]
    inside = [report for report in stalled if report.in_collective]
    if outside and inside:
        return _apart(_behind(outside), inside)
    if inside:
        odd = _odd_one(inside)
        if odd is not None:
            return _mismatch(*odd)
    elif len({(report.step, report.collective_number) for report in outside}) > 1:
        return _apart(_behind(outside), [])
    if raised:  # every rank lost a connection, and nobody says why
        report = raised[0]
        words = " ".join(f"{report.exception_type}: {report.exception_message}".split())
        joining = report.phase == "start"
        kind = classify("rendezvous", "") if joining else None
        return _failure(
            report,
            kind or Kind("network", "a connection broke and no rank says why: check the network between the hosts"),
            f"lost a connection in {where(report)}: {words}",
        )
    report = min(stalled or list(reports), key=lambda r: r.rank)
    call = _call(report)
    if call:
        fix = "all ranks are there and connected: start once with NCCL_DEBUG=INFO, and check NCCL_SOCKET_IFNAME"
        return _failure(report, Kind("hang", fix), f"waits like all others in {call}, in {where(report)}")
    return _failure(report, Kind("hang", _HANG_FIX.format(stacks=stacks_name(report))), f"hangs in {where(report)}")


def _behind(reports: Sequence[RankReport]) -> RankReport:
    """Return the rank that is behind the others; of those that are level, the one that stopped moving first."""
    comparable = len({report.collective_group for report in reports}) == 1  # numbers count within a group

    def progress(report: RankReport) -> tuple[int, int, float]:
        number = report.collective_number if comparable else 0
        return report.step, number, report.time_unix - report.stalled_seconds

    return min(reports, key=progress)


def _apart(report: RankReport, inside: Sequence[RankReport]) -> Failure:
    others = f"; the others wait in {_call(inside[0])}" if inside else ""
    if report.phase == "data" and report.reading:
        fix = f"the file system does not answer: try to read {report.reading} on {report.host}"
        return _failure(
            report, Kind("data", fix), f"waits for shard {report.reading}, in data of step {report.step}{others}"
        )
    if report.process_state == "D":
        fix = "the process waits for a disk or file system that does not answer: look at the mounts of this host"
        return _failure(report, Kind("disk", fix), f"waits for a disk, in {where(report)}{others}")
    fix = _HANG_FIX.format(stacks=stacks_name(report))
    return _failure(report, Kind("hang", fix), f"hangs in {where(report)}{others}")


def _odd_one(inside: Sequence[RankReport]) -> tuple[RankReport, RankReport] | None:
    """Return (a rank in another call than most, one of those), None where all are in the same."""
    calls = Counter((r.collective_name, r.collective_group, r.collective_number) for r in inside)
    usual = calls.most_common(1)[0][0]
    groups = {report.collective_group for report in inside}
    if len(groups) > 1:  # ranks of different groups rightly wait in different calls
        return None
    odd = [r for r in inside if (r.collective_name, r.collective_group, r.collective_number) != usual]
    if not odd:
        sizes = Counter(report.collective_elements for report in inside)
        if len(sizes) == 1 or inside[0].collective_name not in ("all_reduce", "broadcast", "reduce", "all_gather"):
            return None
        most = sizes.most_common(1)[0][0]
        odd = [report for report in inside if report.collective_elements != most]
    of_most = next(report for report in inside if report not in odd)
    return _behind(odd), of_most


def _mismatch(report: RankReport, other: RankReport) -> Failure:
    kind = classify("Detected mismatch between collectives", report.phase)
    assert kind is not None
    what = f"is in {_call(report)} where others are in {_call(other)}, in {where(report)}"
    return _failure(report, kind, what)


def _call(report: RankReport) -> str:
    if not report.collective_name:
        return ""
    group = f" of group {report.collective_group}" if report.collective_group not in ("", "0") else ""
    elements = f", {report.collective_elements} elements" if report.collective_elements else ""
    return f"{report.collective_name} (number {report.collective_number}{group}{elements})"


def _ranges(numbers: Sequence[int]) -> str:
    """Return "0-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
