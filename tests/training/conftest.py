"""Small models of several architectures, made in code, and a tokenizer with a chat template."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from tests.training.worker_node import SLOW

VOCABULARY = 300
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
CONFIGS = {
    "llama": LlamaConfig(**_SHAPE, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_SHAPE, intermediate_size=64, num_key_value_heads=2),
    "qwen3": Qwen3Config(**_SHAPE, intermediate_size=64, num_key_value_heads=2, head_dim=8),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=256, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "gpt_neox": GPTNeoXConfig(**_SHAPE, intermediate_size=64),
    "opt": OPTConfig(**_SHAPE, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for two: where other programs compute too, waiting for the second takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return with_large_weights(AutoModelForCausalLM.from_config(CONFIGS[architecture], attn_implementation="sdpa"))


def with_large_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model frozen, with random weights large enough to matter."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What is one and two? It is three."], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with its tokenizer, as a folder in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    model = make_model("llama")
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_sums(file: Path, first: int, second: int) -> Path:
    """Chat rows whose answers are JSON: every sum of two numbers below `first` and `second`."""
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": json.dumps({"sum": a + b})}]}
        for a in range(first)
        for b in range(second)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("data") / "sums.jsonl", 12, 12)


@pytest.fixture(scope="module")
def small_cluster(embedded_home: Path) -> Iterator[Any]:
    """A head with room for one training worker."""
    from adaptfleet.on_ray.local_cluster import LocalCluster

    with (
        LocalCluster.start(num_cpus=1, env={"ADAPTFLEET_HOME": str(embedded_home), **SLOW}) as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in cluster.env.items():
            patch.setenv(name, value)
        yield cluster
