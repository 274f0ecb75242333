"""LoRA through peft, with every target and rank checked before anything is attached."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.methods import ALL_LINEAR, Lora
from adaptfleet.contracts.names import near


def linear_modules(model: PreTrainedModel) -> dict[str, list[tuple[str, tuple[int, int]]]]:
    """Linear modules but the output head, by last name: full names and (inputs, outputs)."""
    head = model.get_output_embeddings()
    found: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            rows, columns = module.weight.shape
            shape = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
            found.setdefault(name.rpartition(".")[2], []).append((name, shape))
    return found


def resolve_targets(model: PreTrainedModel, method: Lora) -> list[str]:
    """The last names of the modules adapted, sorted. ContractError lists targets that match nothing and ranks that do not fit."""
    linear = linear_modules(model)
    wanted = sorted(linear) if ALL_LINEAR in method.targets else sorted(set(method.targets))
    unknown = [name for name in wanted if name not in linear]
    if unknown:
        hints = "".join(near(name, linear) for name in unknown)
        raise ContractError(
            f"method.targets: {', '.join(map(repr, unknown))} match no linear module.{hints} "
            f"The model has {', '.join(sorted(linear))}; '{ALL_LINEAR}' takes them all."
        )
    narrow = [f"{name} ({i} -> {o})" for name in wanted for i, o in {shape for _, shape in linear[name]} if method.rank > min(i, o)]
    if narrow:
        raise ContractError(f"method.rank is {method.rank}, more than the smaller side of {', '.join(narrow)}. Use a smaller rank.")
    return wanted


def attach_lora(model: PreTrainedModel, method: Lora, seed: int = 0) -> PeftModel:
    """Adapters with B = 0, so that the model computes what the base computes; in the base's type.

    peft would hold them in float32 beside a bfloat16 base and cast every activation; here the optimizer holds the float32 copies.
    """
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=resolve_targets(model, method),
        use_rslora=method.use_rslora,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    # A is drawn at random: the same for every worker, and again after a kill.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config, autocast_adapter_dtype=False)
