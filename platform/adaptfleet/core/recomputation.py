"""Gradient checkpointing: keep the inputs of the decoder layers, and compute what is in them again in the backward pass."""

from peft import PeftModel

from adaptfleet.contracts.errors import ContractError
from adaptfleet.core.compilation import decoder_layers
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.methods.targets import linear_modules
from adaptfleet.core.packed_forward import plain_base

_KEPT = 2
"""Numbers kept for each one that a linear module reads or gives: norms keep theirs in float32, activation functions and positions keep some
too. Measured 2.0 on SmolLM2-135M in bfloat16 with LoRA, one run, the loss's own memory included."""
_USABLE = 0.9
"""Share of a worker's memory for the model, its optimizer and the activations."""


def check_recomputable(model: AdaptedModel) -> None:
    """ContractError where transformers cannot compute the architecture's layers again. `model` may be on the meta device."""
    base = plain_base(model)
    if not base.supports_gradient_checkpointing:
        raise ContractError(f"train.gradient_checkpointing is 'on', which {type(base).__name__} does not support; use auto or off.")


def should_recompute(setting: str, model: AdaptedModel, num_positions: int, resident_bytes: int, memory: int) -> tuple[bool, str]:
    """Whether to, and why or why not.

    `num_positions`: of one forward and backward pass. `resident_bytes`: of the model and its optimizer on one worker. `memory`: what one
    worker may use, in bytes.
    """
    if setting != "auto":
        return setting == "on", f"train.gradient_checkpointing is {setting!r}"
    if not plain_base(model).supports_gradient_checkpointing:
        return False, "the architecture does not support it"
    if takes_a_cache(model):
        return False, "the learnt prefix reaches the layers as a cache, which a layer computed twice would take twice"
    activations = activation_bytes(model, num_positions)
    usable = memory * _USABLE
    return (
        resident_bytes + activations > usable,
        f"the activations of {num_positions:,} tokens need about {activations / 2**30:.2f} GiB beside {resident_bytes / 2**30:.2f} GiB "
        f"of model and optimizer, a worker has {usable / 2**30:.2f} GiB for them",
    )


def recompute_layers(model: AdaptedModel) -> None:
    """From now on, in training. Compiled and sharded layers too: what is computed again is the compiled layer, its parameters gathered."""
    plain_base(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def activation_bytes(model: AdaptedModel, num_positions: int) -> int:
    """An estimate of what the layers keep for the backward pass, from the widths of their linear modules."""
    base = plain_base(model)
    inside = {id(module) for module in decoder_layers(base).modules()}
    widths = [sum(shape) for name, shape in linear_modules(base).items() if ".lora_" not in name and id(base.get_submodule(name)) in inside]
    return _KEPT * num_positions * sum(widths) * base.dtype.itemsize


def takes_a_cache(model: AdaptedModel) -> bool:
    """Prefix tuning hands its keys and values to the layers as a cache."""
    return isinstance(model, PeftModel) and str(model.active_peft_config.peft_type.value) == "PREFIX_TUNING"
