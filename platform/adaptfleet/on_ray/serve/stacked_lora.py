"""A vLLM plug-in: multi-LoRA on a CPU that is right for rows of the base, and fast.

vLLM's CPU path marks a row without an adapter with slot -1 and indexes the stacked weights with it, which wraps to the last slot: a request
to the base that shares a batch gets somebody's adapter. It also gathers a whole matrix for each row, and takes no adapter over 8-bit layers
on a CPU without AMX.

Expires when vLLM leaves rows of slot -1 alone, takes such layers, and its CPU LoRA is no slower than this;
`tests/serve/test_stacked_lora_upstream.py` fails when the first or the second is so.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.lora.punica_wrapper import PunicaWrapperBase


def register() -> None:
    """vLLM calls this, entry point `adaptfleet_stacked_lora` of `vllm.general_plugins`, in each of its processes. Does nothing where the
    platform is not a CPU, and nothing the second time."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.layers.base import BaseLayerWithLoRA
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper import punica_cpu

    from adaptfleet.on_ray.serve import layer_kernels, patient_queues, rounded_embedding, vnni_linear
    from adaptfleet.on_ray.serve.stacked_punica import StackedPunicaWrapper

    layer_kernels.register()
    patient_queues.register()
    rounded_embedding.register()
    vnni_linear.register()
    if punica_cpu.PunicaWrapperCPU is StackedPunicaWrapper:
        return
    punica_cpu.PunicaWrapperCPU = StackedPunicaWrapper  # type: ignore[misc]
    _take_layers_without_weight()
    activate = LoRAModelManager.activate_adapter

    def activate_adapter(self: LoRAModelManager, lora_id: int) -> bool:
        changed = bool(activate(self, lora_id))
        if changed:
            slot = self.lora_index_to_id.index(lora_id)
            for wrapper in self.punica_wrapper_mapping.values():
                if isinstance(wrapper, StackedPunicaWrapper):
                    wrapper.slot_changed(slot)
        return changed

    LoRAModelManager.activate_adapter = activate_adapter  # type: ignore[method-assign]

    set_mapping = BaseLayerWithLoRA.set_mapping

    def set_mapping_and_base(self: BaseLayerWithLoRA, punica_wrapper: "PunicaWrapperBase") -> None:
        """A layer finds its base a dozen times a step by a look-up in Python, a millisecond a step in all; here it becomes an ordinary
        attribute. Assigning another base later undoes this, as for any module."""
        set_mapping(self, punica_wrapper)
        if "base_layer" in self._modules:
            self.__dict__["base_layer"] = self._modules["base_layer"]

    BaseLayerWithLoRA.set_mapping = set_mapping_and_base  # type: ignore[method-assign]


def _take_layers_without_weight() -> None:
    """A layer of 8 bits, on a CPU without AMX: its weight is oneDNN's to keep, and vLLM asks it for the weight's device, of a head for its
    type."""
    import torch
    from vllm.lora import model_manager
    from vllm.lora.layers import base_linear

    base_linear._get_lora_device = lambda base_layer: torch.device("cpu")
    upstream: Any = model_manager
    wrap = upstream.from_layer_logits_processor

    def wrapped(layer: Any, lm_head: Any, max_loras: int, lora_config: Any, *further: Any) -> Any:
        if lm_head.weight is None:
            weight = torch.empty(0, dtype=lora_config.lora_dtype)
            mapping = lm_head.get_sharded_to_full_mapping
            lm_head = SimpleNamespace(embedding_dim=lm_head.embedding_dim, weight=weight, get_sharded_to_full_mapping=mapping)
        return wrap(layer, lm_head, max_loras, lora_config, *further)

    upstream.from_layer_logits_processor = wrapped
