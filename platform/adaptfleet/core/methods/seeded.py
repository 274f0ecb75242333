"""Attaching through peft with everything random drawn from one seed."""

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


def attach_seeded(model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """The adapted model, the same for every worker and again after a kill, its new parameters in the base's type.

    peft would hold them in float32 beside a bfloat16 base and cast every activation; here the optimizer holds the float32 copies.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    assert isinstance(adapted, PeftModel)
    return adapted
