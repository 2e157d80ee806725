"""What may be written into a batch script: the container section, and the pattern of every value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from trainer.config.section import Section
from trainer.core.errors import Problem
from trainer.core.redact import redacted, redacted_text


class ContainerConfig(Section):
    """An image that the ranks run in. The batch script itself and SLURM's commands stay outside."""

    runtime: Literal["pyxis", "apptainer"]
    """Who runs it: srun's pyxis plugin (enroot), or Apptainer."""
    image: str
    """Image: what srun --container-image or apptainer exec takes."""
    mounts: tuple[str, ...] = ()
    """SOURCE[:TARGET[:ro]] each; the working directory and the run directory are mounted without asking."""
    python: str = "python3"
    """Interpreter inside the image that has trainer."""


TIME = re.compile(r"(?:[0-9]{1,5}-)?[0-9]{1,9}(?::[0-9]{1,2}){0,2}")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

# An #SBATCH line is no shell: quoting does not help there, only refusing does. No value starts with a dash.
PATTERNS: Mapping[str, tuple[re.Pattern[str], str]] = {
    "time": (TIME, "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"),
    "partition": (re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.,-]{0,199}"), "names, separated by commas"),
    "account": (re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@-]{0,199}"), "one name"),
    "qos": (re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,199}"), "one name"),
    "constraint": (re.compile(r"[A-Za-z0-9_.(\[][A-Za-z0-9_.,:&|*()\[\]+-]{0,499}"), "features, e.g. a100&ib"),
    "memory_per_node": (re.compile(r"[0-9]{1,12}[KMGTkmgt]?"), "a number with K, M, G or T"),
    "exclude": (re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.,\[\]-]{0,4999}"), "a host list, e.g. node[1-3,7]"),
    "gpu_type": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"), "the type of a GPU as sinfo shows it, e.g. a100"),
    "reservation": (re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.,-]{0,199}"), "the name of a reservation"),
    "licenses": (re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.:@,|-]{0,199}"), "licenses, e.g. scratch:1"),
    "mail_type": (re.compile(r"[A-Z][A-Z_0-9]{0,30}(?:,[A-Z][A-Z_0-9]{0,30}){0,15}"), "events, e.g. END,FAIL"),
    "mail_user": (re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.+@-]{0,199}"), "an address"),
    "network_interface": (re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,14}"), "one interface, e.g. ib0"),
}
MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/@=-]{0,199}")
IMAGE = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./:#@+=~-]{0,499}")
MOUNT = re.compile(r"(/[A-Za-z0-9_./+=@-]{0,499})(?::(/[A-Za-z0-9_./+=@-]{0,499}))?(?::(ro|rw))?")
PROGRAM = re.compile(r"[A-Za-z0-9_/][A-Za-z0-9_./+-]{0,499}")
SBATCH_OPTIONS = (
    "comment", "contiguous", "core-spec", "cpus-per-gpu", "distribution", "exclusive", "gpu-bind", "gpu-freq",
    "gres-flags", "hint", "mem-bind", "mem-per-cpu", "mem-per-gpu", "nice", "nodelist", "ntasks-per-socket",
    "oversubscribe", "prefer", "priority", "spread-job", "switches", "threads-per-core", "tmp", "wckey",
)  # fmt: skip
"""Options of sbatch that a recipe may add: none that runs a program, names a file or changes what a job inherits."""
_OPTION_VALUE = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.,:=@+*()\[\]/-]{0,499}")
_OF_THE_LAUNCH = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|NODE_RANK|CROSS_RANK|CROSS_SIZE|IFS"
    r"|BASH_ENV|ENV|SHELLOPTS|BASHOPTS)$|MASTER_|TORCHELASTIC_|TRAINER_|SLURM|SBATCH_|SRUN_|BASH_FUNC_"
)
_EXPANDED_BY_SHELLS = re.compile(r"\$[A-Za-z_{(]|^~|`")
_FROM_ELSEWHERE = re.compile(r"[\"']?(?:\$\([^()]*\)|\$\{[^{}]*\}|\$\w+|`[^`]*`)[\"']?")


def slurm_problems(settings: object) -> list[Problem]:
    """Return what may not be written into a batch script.

    ``settings`` has the fields of ``launch.slurm`` by name: a SlurmConfig, or the plan of a job.
    """
    return [
        *_words(settings),
        *_options(getattr(settings, "sbatch_options", {})),
        *_environment(getattr(settings, "environment", {})),
        *_setup(getattr(settings, "setup", ())),
        *_container(getattr(settings, "container", None), getattr(settings, "starter", "srun")),
    ]


def has_control_characters(text: str) -> bool:
    """Return whether ``text`` is more than one line, or would not be shown as it is."""
    return _CONTROL.search(text.replace("\t", " ")) is not None


def _words(settings: object) -> Iterable[Problem]:
    for name, (pattern, meaning) in PATTERNS.items():
        value = getattr(settings, name, None)
        if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
            yield Problem(f"launch.slurm.{name}", value, f"sbatch takes {meaning} here", "use those characters only")
    for index, module in enumerate(getattr(settings, "modules", ())):
        if not MODULE.fullmatch(module):
            rule = "is no name of an environment module"
            yield Problem(f"launch.slurm.modules.{index}", module, rule, "write NAME or NAME/VERSION, e.g. cuda/12.4")
    if getattr(settings, "gpu_type", None) is not None and not getattr(settings, "gpus_per_node", 1):
        rule = "has no effect with launch.slurm.gpus_per_node = 0"
        yield Problem("launch.slurm.gpu_type", getattr(settings, "gpu_type", None), rule, "remove one of them")


def _options(options: Mapping[str, Any]) -> Iterable[Problem]:
    for name, value in options.items():
        key = f"launch.slurm.sbatch_options.{name}"
        if name not in SBATCH_OPTIONS:
            yield Problem(key, value, "is not among the sbatch options that may be added", option_fix(name))
        elif not isinstance(value, bool) and not _OPTION_VALUE.fullmatch(str(value)):
            rule = "has characters that may not be written into an #SBATCH line"
            yield Problem(key, value, rule, "use letters, digits and the signs that sbatch(1) names for it")


def option_fix(name: str) -> str:
    """Return what to do about an sbatch option that is not on the list."""
    key = f"launch.slurm.{name.replace('-', '_')}"
    own = {"mem": "launch.slurm.memory_per_node", "gres": "launch.slurm.gres_style", "job-name": "run.name"}
    own |= {f"{word}-per-node": "launch.slurm.gpus_per_node" for word in ("gpus", "ntasks")}
    own |= {"gpus": "launch.slurm.gpus_per_node", "ntasks": "launch.slurm.nodes", "export": "launch.slurm.environment"}
    plain = {field.replace("_", "-") for field in (*PATTERNS, "nodes", "cpus-per-task")} | {"nodes", "cpus-per-task"}
    if name in own or name in plain:
        return f"set {own.get(name, key)} instead"
    return f"use one of {', '.join(SBATCH_OPTIONS)}"


def _environment(environment: Mapping[str, Any]) -> Iterable[Problem]:
    for name, value in environment.items():
        key, text = f"launch.slurm.environment.{name}", str(value)
        if not NAME.fullmatch(name):
            yield Problem(key, value, "is no name of an environment variable", "use letters, digits and '_'")
        elif _OF_THE_LAUNCH.match(name):
            yield Problem(key, value, "is set by SLURM, the shell or the launcher", "remove it")
        elif redacted({name: text}) != {name: text}:
            yield Problem(key, None, "looks like a secret, and batch scripts are kept and shown", _secret_fix(name))
        elif _EXPANDED_BY_SHELLS.search(text):
            fix = f"write it into launch.slurm.setup: export {name}=..."
            yield Problem(key, value, "is taken word for word: $ and ~ mean nothing here", fix)
        elif _CONTROL.search(text):
            yield Problem(key, value, "must be one line without control characters", "remove them")


def _setup(lines: Iterable[str]) -> Iterable[Problem]:
    for index, line in enumerate(lines):
        key = f"launch.slurm.setup.{index}"
        if has_control_characters(line):
            yield Problem(key, line, "must be one line without control characters", "write one entry a line")
        literal = _FROM_ELSEWHERE.sub("", line)  # export HF_TOKEN=$(cat ...) is how it should be
        if redacted_text(literal) != literal:
            yield Problem(key, None, "looks like a secret, and batch scripts are kept and shown", _secret_fix("NAME"))


def _secret_fix(name: str) -> str:
    return (
        f"put it into a file of mode 0600 and add a line to launch.slurm.setup: "
        f'export {name}="$(cat ~/.config/trainer/{name.lower()})"'
    )


def _container(container: ContainerConfig | None, starter: str) -> Iterable[Problem]:
    if container is None:
        return
    key = "launch.slurm.container"
    if container.runtime == "pyxis" and starter not in ("srun", "torchrun"):
        rule = f"is a plugin of srun, but launch.slurm.starter = {starter}"
        yield Problem(f"{key}.runtime", container.runtime, rule, "use apptainer, or starter: srun")
    if not IMAGE.fullmatch(container.image):
        rule = "is no image that can be written into a batch script"
        yield Problem(f"{key}.image", container.image, rule, "use letters, digits and ./:#@+=~-_ only")
    elif redacted_text(container.image) != container.image:
        yield Problem(f"{key}.image", None, "has a password in it", "log in with enroot's or apptainer's own file")
    if not PROGRAM.fullmatch(container.python):
        rule = "is no program that can be written into a batch script"
        yield Problem(f"{key}.python", container.python, rule, "write a name or an absolute path")
    for index, mount in enumerate(container.mounts):
        if not MOUNT.fullmatch(mount):
            rule = "is no mount"
            yield Problem(f"{key}.mounts.{index}", mount, rule, "write /source, /source:/target or /source:/target:ro")
