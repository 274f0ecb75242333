"""The students of bench/distill.py: each the same teacher with something taken away."""

import copy
import json
from pathlib import Path
from typing import Any

PACK_TOKENS = 256
NUM_CALIBRATION, WIDTH_TAKEN = 64, {"width": 0.5, "narrow": 0.75}
MERGES_KEPT = 16_000


def drop_layers(model: Any) -> Any:
    """Every third layer out: 0 1 . 3 4 . 6 7 . ..."""
    import torch

    kept = [layer for i, layer in enumerate(model.model.layers) if i % 3 != 2]
    model.model.layers = torch.nn.ModuleList(kept)
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(kept)]
    return model


def pruned(student: str, teacher: Any, tokenizer: Any, examples: list[Any], folder: Path) -> Path:
    """Made once: the teacher's checkpoint with fewer feed-forward channels."""
    from adaptfleet.contracts.compression import Prune
    from adaptfleet.core.data.encoding import encode_all
    from adaptfleet.core.export import export_model
    from adaptfleet.core.pruning.importance import measure
    from adaptfleet.core.pruning.refit import refit
    from adaptfleet.core.pruning.slicing import choose, sliced

    if not folder.exists():
        rows = encode_all(examples[:NUM_CALIBRATION], tokenizer, PACK_TOKENS)
        model = copy.deepcopy(teacher)
        kept = choose(model.config, Prune(mlp_width=WIDTH_TAKEN[student]), measure(model, rows, tokenizer.pad_token_id))
        refit(model, kept, rows, tokenizer.pad_token_id)
        unfinished = folder.with_suffix(".part")
        export_model(sliced(model, kept), tokenizer, unfinished)
        unfinished.rename(folder)
    return folder


def retokenised(teacher: Any, tokenizer: Any, folder: Path) -> Path:
    """Made once: the teacher with another tokenizer, which knows only the first merges."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from adaptfleet.core.export import export_model

    if folder.exists():
        return folder
    spelled = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = spelled["model"]
    kept, gone = bpe["merges"][:MERGES_KEPT], bpe["merges"][MERGES_KEPT:]
    lost = {"".join(pair) for pair in gone} - {"".join(pair) for pair in kept}
    ids = sorted(i for token, i in bpe["vocab"].items() if token not in lost)
    renumbered = {old: new for new, old in enumerate(ids)}
    bpe["merges"], bpe["vocab"] = kept, {token: renumbered[i] for token, i in bpe["vocab"].items() if i in renumbered}
    for added in spelled["added_tokens"]:
        added["id"] = renumbered[added["id"]]
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spelled)), **special)
    own.chat_template = tokenizer.chat_template
    model = copy.deepcopy(teacher)
    rows = model.get_input_embeddings().weight.detach()[ids].clone()
    model.resize_token_embeddings(len(ids))
    model.get_input_embeddings().weight.data.copy_(rows)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = own.bos_token_id, own.eos_token_id, own.pad_token_id
    unfinished = folder.with_suffix(".part")
    export_model(model, own, unfinished)
    unfinished.rename(folder)
    return folder
