"""Find the files that ship beside the code: DeepSpeed JSONs, SLURM templates and recipes."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT_DIRECTORIES = {"ds_configs": "ds_configs", "slurm": "slurm", "recipes": "launch/recipes"}


def resource_directory(name: str) -> Path:
    """Return the directory of the resource ``name`` (``ds_configs``, ``slurm`` or ``recipes``).

    A wheel carries them inside the package (pyproject.toml, force-include), a checkout beside it.

    Raises:
        KeyError: there is no resource of this name.
        FileNotFoundError: the installation is incomplete.
    """
    for directory in (PACKAGE / "resources" / name, PACKAGE.parent / CHECKOUT_DIRECTORIES[name]):
        if directory.is_dir():
            return directory
    raise FileNotFoundError(f"{name}/ is missing from the installation at {PACKAGE}; reinstall the package")
