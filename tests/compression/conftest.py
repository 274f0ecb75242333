"""Small models whose shapes kernels take, made in code."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, OPTConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from adaptfleet.core.data.encoding import Encoded
from tests.conftest import TEST_HOME
from tests.training.conftest import VOCABULARY, make_tokenizer, write_sums

_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
_GATED = {**_SHAPE, "intermediate_size": 192, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2}
CONFIGS = {
    # heads of 32: the least that vLLM attends with on a CPU
    "llama": LlamaConfig(**_GATED, head_dim=32, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**_GATED, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_GATED),
    "qwen2": Qwen2Config(**_GATED),
    "qwen3": Qwen3Config(**_GATED, head_dim=16),
    "opt": OPTConfig(**_SHAPE, ffn_dim=192, word_embed_proj_dim=64, dropout=0.0),
}


def make_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A frozen float32 model with random weights and biases large enough to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="sdpa")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def make_rows(count: int = 12, length: int = 30) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (count, length), generator=generator)
    return [Encoded(row, [False] + [True] * (length - 1)) for row in ids.tolist()]


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16 with its tokenizer, as a folder in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("small") / "small-llama"
    model = make_model("llama").bfloat16()
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("rows") / "sums.jsonl", 12, 12)


@pytest.fixture(scope="module")
def compression_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An ADAPTFLEET_HOME for a file's tests; llm-compressor's environment is made once and kept between runs."""
    home = tmp_path_factory.mktemp("home")
    (TEST_HOME / "environments").mkdir(parents=True, exist_ok=True)
    (home / "environments").symlink_to(TEST_HOME / "environments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTFLEET_HOME", str(home))
        patch.delenv("RAY_ADDRESS", raising=False)  # these files compute in their own process
        yield home


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost such small models more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
