"""Has every node what the run needs? Pure: facts and needs in, checks out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trainer.allocation.facts import NodeFacts, RankFacts
from trainer.allocation.findings import Check, Finding, blame, listed
from trainer.allocation.gpus import Gpu
from trainer.allocation.needs import Needs
from trainer.core.units import format_bytes

_SPARE = 1.05
_TEMPORARY_BYTES = 100 * 2**20
_SHARED_MEMORY_BYTES_PER_GPU = 64 * 2**20
"""NCCL's buffers between the ranks of a node; containers often have 64 MB in all."""
_LOCKED_BYTES = 2**30
"""InfiniBand pins the buffers it sends from."""
_PROCESSES = 4096
_FREE_GPU_FRACTION = 0.85


def compare_nodes(ranks: Sequence[RankFacts], needs: Needs) -> list[Check]:
    """Return the checks of every node's own facts. Each host has sent those of one rank."""
    nodes = {facts.host: facts.node for facts in ranks if facts.node is not None}
    return [
        _disk(nodes, needs), _shared_memory(nodes, ranks), _temporary(nodes), _limits(nodes, needs), _data(nodes),
        _models(nodes), _gpus(ranks, needs),
    ]  # fmt: skip


def _finding(lacking: Sequence[str], hosts: Sequence[str], text: str, fix: str) -> Finding:
    """Return a finding about some nodes; the fault is theirs where others have what they lack."""
    fault = blame(lacking, hosts)
    return Finding(fault, f"{text} on {listed(lacking)}", fix, tuple(lacking) if fault == "node" else ())


def _disk(nodes: Mapping[str, NodeFacts], needs: Needs) -> Check:
    free = {host: node.free_bytes["run"] for host, node in nodes.items() if "run" in node.free_bytes}
    least = min(free.values(), default=0)
    findings: list[Finding] = []
    size = format_bytes(needs.checkpoint_bytes or 0)
    if needs.checkpoint_bytes is not None and free:
        # The directory is one for all nodes: another node has no more room.
        if least < needs.checkpoint_bytes * _SPARE:
            text = f"{format_bytes(least)} free in run.directory, a checkpoint takes about {size}"
            findings.append(Finding("environment", text, "free some space, or choose another run.directory"))
        elif least < needs.checkpoint_bytes * needs.checkpoints * _SPARE:
            text = f"{format_bytes(least)} free in run.directory, {needs.checkpoints} checkpoints take {size} each"
            findings.append(Finding("note", text, "lower checkpoint.keep_last, or free some space"))
    inodes = [node.free_inodes for node in nodes.values() if node.free_inodes >= 0]
    if inodes and min(inodes) < needs.checkpoint_files * needs.checkpoints:
        text = f"{min(inodes)} inodes free in run.directory"
        findings.append(Finding("environment", text, "delete small files there, or choose another directory"))
    wanted = "size of a checkpoint not known" if needs.checkpoint_bytes is None else f"a checkpoint takes about {size}"
    return Check("disk", f"{format_bytes(least)} free, {wanted}", tuple(findings))


def _shared_memory(nodes: Mapping[str, NodeFacts], ranks: Sequence[RankFacts]) -> Check:
    free = {host: node.free_bytes.get("shared_memory", 0) for host, node in nodes.items()}
    gpus = max((facts.local_world_size for facts in ranks if facts.gpu_count), default=0)
    wanted = max(1, gpus) * _SHARED_MEMORY_BYTES_PER_GPU
    lacking = [host for host, size in free.items() if size < wanted]
    findings: tuple[Finding, ...] = ()
    if lacking:
        text = f"/dev/shm has {format_bytes(min(free.values()))} free, less than {format_bytes(wanted)},"
        fix = "remove what dead processes left there, or give the container more (--shm-size)"
        found = _finding(lacking, list(nodes), text, fix)
        # Without GPUs nothing of ours lies there.
        findings = (found if gpus else Finding("note", found.text, found.fix),)
    return Check("/dev/shm", f"{format_bytes(min(free.values(), default=0))} free", findings)


def _temporary(nodes: Mapping[str, NodeFacts]) -> Check:
    findings: list[Finding] = []
    broken = [host for host, node in nodes.items() if node.temporary_error]
    if broken:
        text = f"no temporary file can be written ({nodes[broken[0]].temporary_error})"
        findings.append(_finding(broken, list(nodes), text, "clear /tmp there, or set TMPDIR"))
    least = min((node.free_bytes.get("temporary", 0) for node in nodes.values()), default=0)
    full = [h for h, node in nodes.items() if node.free_bytes.get("temporary", 0) < _TEMPORARY_BYTES]
    if full and not broken:
        text = f"only {format_bytes(least)} free for temporary files"
        findings.append(Finding("note", f"{text} on {listed(full)}", "clear /tmp there, or set TMPDIR"))
    return Check("temporary files", f"{format_bytes(least)} free", tuple(findings))


def _limits(nodes: Mapping[str, NodeFacts], needs: Needs) -> Check:
    wanted = {"open files": (needs.open_files, "ulimit -n"), "processes": (_PROCESSES, "ulimit -u")}
    if any(node.infiniband for node in nodes.values()):
        wanted["locked memory"] = (_LOCKED_BYTES, "ulimit -l")
    findings: list[Finding] = []
    for name, (least, command) in wanted.items():
        lacking = [host for host, node in nodes.items() if 0 <= node.limits.get(name, -1) < least]
        if not lacking:
            continue
        text = f"the limit of {name} is {min(nodes[host].limits[name] for host in lacking)}, less than {least},"
        found = _finding(lacking, list(nodes), text, f"raise it: {command} in launch.slurm.setup, or limits.conf")
        # Too few open files end a run for sure, the others only perhaps.
        findings.append(found if name == "open files" else Finding("note", found.text, found.fix))
    shown = min((node.limits.get("open files", -1) for node in nodes.values()), default=-1)
    return Check("limits", f"{'unlimited' if shown < 0 else shown} open files", tuple(findings))


def _data(nodes: Mapping[str, NodeFacts]) -> Check:
    findings: list[Finding] = []
    hosts = list(nodes)
    paths = list(dict.fromkeys(path for node in nodes.values() for path in node.data))
    for path in paths:
        sizes = {host: node.data.get(path, -1) for host, node in nodes.items()}
        lacking = [host for host, size in sizes.items() if size < 0]
        if lacking:
            findings.append(_finding(lacking, hosts, f"{path} can't be read", "mount or copy the data there"))
        found = {host: size for host, size in sizes.items() if size >= 0}
        common = max(found.values(), key=list(found.values()).count, default=-1)
        others = [host for host, size in found.items() if size != common]
        if others:
            text = f"{path} has {found[others[0]]} bytes, {common} elsewhere,"
            findings.append(_finding(others, hosts, text, "copy the same shards to all nodes"))
    return Check("data", f"{len(paths)} files readable from every node", tuple(findings[:8]))


def _models(nodes: Mapping[str, NodeFacts]) -> Check:
    findings: list[Finding] = []
    paths = list(dict.fromkeys(path for node in nodes.values() for path in node.models))
    for path in paths:
        lacking = [host for host, node in nodes.items() if node.models.get(path) == "missing"]
        if not lacking:
            continue
        fix = "fetch it before the job, into a cache that all nodes share (HF_HOME)"
        found = _finding(lacking, list(nodes), f"{path} is neither a directory nor in the Hub's cache", fix)
        offline = any(nodes[host].offline for host in lacking)
        findings.append(found if offline or found.fault == "node" else Finding("note", found.text, found.fix))
    return Check("models", listed(paths) or "none to load", tuple(findings))


def _gpus(ranks: Sequence[RankFacts], needs: Needs) -> Check:
    seen = {facts.host: facts.gpu_count for facts in ranks}
    hosts = list(seen)
    findings: list[Finding] = []
    if any(seen.values()) or needs.gpus_per_node:
        few = list(dict.fromkeys(facts.host for facts in ranks if facts.gpu_count <= facts.local_rank))
        if few:
            text = f"fewer GPUs are seen ({seen[few[0]]}) than ranks were started"
            findings.append(_finding(few, hosts, text, "ask for one GPU per rank, all visible to every rank"))
    used = [f for f in ranks if f.gpu_total_bytes and f.gpu_free_bytes < _FREE_GPU_FRACTION * f.gpu_total_bytes]
    for facts in used[:4]:
        left, total = format_bytes(facts.gpu_free_bytes), format_bytes(facts.gpu_total_bytes)
        text = f"GPU {facts.local_rank} of {facts.host} has {left} of {total} free: another process uses it"
        findings.append(Finding("node", text, "end that process (nvidia-smi)", (facts.host,)))
    findings += _unsound(ranks)
    totals = {facts.gpu_total_bytes for facts in ranks if facts.gpu_total_bytes}
    summary = f"{max(seen.values(), default=0)} per node, {format_bytes(min(totals))} each" if totals else "none"
    return Check("GPUs", summary, tuple(findings))


def _unsound(ranks: Sequence[RankFacts]) -> list[Finding]:
    tests: tuple[tuple[Callable[[Gpu], bool], str], ...] = (
        (lambda gpu: gpu.uncorrected_errors > 0, "had uncorrected memory errors"),
        (lambda gpu: gpu.rows_to_remap, "has memory rows to be remapped: it needs a reset"),
        (lambda gpu: gpu.slowed, "is slowed down by its hardware (heat or power)"),
    )
    return [
        Finding("node", f"GPU {gpu.index} of {facts.host} {words}", "let the site look at it", (facts.host,))
        for facts in ranks
        for gpu in (facts.node.gpus if facts.node is not None else ())
        for broken, words in tests
        if broken(gpu)
    ]
