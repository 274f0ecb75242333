"""From a method's contract to what it does."""

from typing import assert_never

from transformers import PreTrainedTokenizerBase

from adaptfleet.contracts.methods import (
    IA3,
    AdaLora,
    Bottleneck,
    Full,
    LlamaAdapter,
    Lora,
    Method,
    PrefixTuning,
    PromptTuning,
    QLora,
)
from adaptfleet.core.methods.adalora import AdaLoraAdaptation
from adaptfleet.core.methods.adaptation import Adaptation
from adaptfleet.core.methods.bottleneck import BottleneckAdaptation
from adaptfleet.core.methods.full import FullAdaptation
from adaptfleet.core.methods.ia3 import IA3Adaptation
from adaptfleet.core.methods.llama_adapter import LlamaAdapterAdaptation
from adaptfleet.core.methods.lora import LoraAdaptation
from adaptfleet.core.methods.prefix import PrefixAdaptation
from adaptfleet.core.methods.prompt import PromptAdaptation
from adaptfleet.core.methods.qlora import QLoraAdaptation


def adaptation(method: Method, tokenizer: PreTrainedTokenizerBase | None = None) -> Adaptation:
    """What the contract's method does. The tokenizer is needed by prompt tuning that begins with a text."""
    match method:
        case Lora():
            return LoraAdaptation(method)
        case QLora():
            return QLoraAdaptation(method)
        case AdaLora():
            return AdaLoraAdaptation(method)
        case PrefixTuning():
            return PrefixAdaptation(method)
        case PromptTuning():
            text = method.init_text
            return PromptAdaptation(method, tokenizer(text, add_special_tokens=False)["input_ids"] if text and tokenizer else None)
        case IA3():
            return IA3Adaptation(method)
        case Bottleneck():
            return BottleneckAdaptation(method)
        case LlamaAdapter():
            return LlamaAdapterAdaptation(method)
        case Full():
            return FullAdaptation(method)
        case _:
            assert_never(method)
