"""Write trainer/models/families.json: what every causal-LM family of the installed transformers can be configured with.

Run it after an upgrade of transformers: ``python tools/generate_families.py [OUTPUT]``. A test compares the result
with the committed file.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).resolve().parents[1] / "trainer" / "models" / "families.json"
LONGEST_DEFAULT = 300  # characters of JSON; longer defaults (rope tables, layer lists) say nothing to a check


def families() -> dict[str, Any]:
    """Return ``{"transformers": version, "common": [...], "families": {model_type: {...}}}``."""
    import transformers
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    common = {field.name for field in dataclasses.fields(PretrainedConfig)} | set(PretrainedConfig().to_dict())
    entries = {
        name: _family(CONFIG_MAPPING[name], common) | {"attention_interface": _attention_interface(name)}
        for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    }
    return {"transformers": transformers.__version__, "common": sorted(common), "families": entries}


def render(table: dict[str, Any]) -> str:
    """Return the table as JSON, one family a line, so that a diff shows which family changed."""
    lines = [f"{json.dumps(name)}: {_compact(entry)}" for name, entry in table["families"].items()]
    head = f'{{"transformers": {json.dumps(table["transformers"])},\n"common": {_compact(table["common"])},\n'
    return head + '"families": {\n' + ",\n".join(lines) + "\n}}\n"


def _family(config: Any, common: set[str]) -> dict[str, Any]:
    fields = {field.name: _default(field) for field in dataclasses.fields(config) if field.name not in common}
    entry: dict[str, Any] = {
        "fields": dict(sorted(fields.items())),
        "pipeline_plan": bool(getattr(config, "base_model_pp_plan", None)),
        "tensor_plan": bool(getattr(config, "base_model_tp_plan", None)),
    }
    names = dict(sorted((config.attribute_map or {}).items()))
    return entry | ({"attribute_map": names} if names else {})


def _attention_interface(name: str) -> bool:
    """Return whether the family's attention goes through transformers' interface, where another core can be put."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        model = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[name]]
    except (ImportError, KeyError):
        return False
    return bool(getattr(model, "_supports_attention_backend", False))


def _default(field: dataclasses.Field[Any]) -> Any:
    value = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    try:
        return value if len(json.dumps(value)) <= LONGEST_DEFAULT else None
    except (TypeError, ValueError):
        return None


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT).write_text(render(families()), encoding="utf-8")
