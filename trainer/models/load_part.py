"""Read only one pipeline stage's tensors out of pretrained safetensors."""

from __future__ import annotations

from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedModel

from trainer.config.model import ModelConfig
from trainer.models.load import loading_options
from trainer.models.stages import StagePart, prune, vacate


def load_part(model: ModelConfig, config: PretrainedConfig, part: StagePart) -> PreTrainedModel:
    """Return the model with the weights of ``part``, the rest left out.

    transformers reads what the model has parameters for, so the model is pruned between its construction on the meta
    device and the reading. Its renaming and merging of tensors (experts stored one by one) works as ever.
    Raises ValueError if a tensor of the part is not in the files.
    """
    kind = part.anatomy.model_class
    # A tied head is read under the name of the embedding, which is therefore kept until the two are tied.
    borrowed = () if part.is_first or not part.is_last else _modules_with(part.anatomy.tied.values(), part)

    class Part(kind):
        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for name in part.foreign_modules():
                if name not in borrowed:
                    vacate(self.get_submodule(name))

        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            if part.is_last:
                super().tie_weights(*args, **kwargs)

        def mark_tied_weights_as_initialized(self, *args: Any, **kwargs: Any) -> None:
            if part.is_last:
                super().mark_tied_weights_as_initialized(*args, **kwargs)

    Part.__name__, Part.__qualname__, Part.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    network, info = cast("Any", Part).from_pretrained(
        model.path, config=config, output_loading_info=True, **loading_options(model)
    )
    if info["missing_keys"]:
        raise ValueError(f"the files lack {', '.join(sorted(info['missing_keys'])[:5])}")
    network.__class__ = kind
    prune(network, part)
    return network


def _modules_with(names: Any, part: StagePart) -> tuple[str, ...]:
    return tuple(module for module in part.anatomy.front if any(name.startswith(f"{module}.") for name in names))
