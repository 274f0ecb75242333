"""Compiled decoder layers: one graph for all layers of a model."""

import shutil

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

MIN_TOKENS = 100_000
"""Below so many training tokens compiling (half a minute) costs more than it gives."""


def decoder_layers(model: PreTrainedModel | PeftModel) -> nn.ModuleList:
    """The longest list of modules of one class: the decoder's layers, whatever the architecture calls them."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(layer) for layer in m}) == 1]
    return max(lists, key=len)


def should_compile(setting: str, num_tokens: int) -> tuple[bool, str]:
    """Whether to compile, and why or why not."""
    if setting != "auto":
        return setting == "on", f"train.compile is {setting!r}"
    if not torch.cuda.is_available() and shutil.which("g++") is None and shutil.which("clang++") is None:
        return False, "no C++ compiler (g++) is installed; with one, training can be up to 1.3 times as fast"
    if num_tokens < MIN_TOKENS:
        return False, f"{num_tokens:,} tokens are too few for compiling to pay"
    return True, f"{num_tokens:,} tokens"


def compile_layers(model: PreTrainedModel | PeftModel) -> None:
    """Compiles each layer's forward. The layers share their code and differ in weights alone, so the graph is made once, and
    once more for the first layer, whose input needs no gradient.

    Layers know their number (`layer_idx`), which only a cache reads; packed training has none.
    """
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    for layer in decoder_layers(model):
        layer.compile(dynamic=False)
