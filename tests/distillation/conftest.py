"""A teacher and a smaller student of one tokenizer, made in code, and another tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.training.conftest import VOCABULARY, make_tokenizer, with_large_weights, write_sums

_SHAPES = {
    "teacher": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    "student": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    "narrow": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
}


def make_llama(shape: str, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    torch.manual_seed(len(shape))
    config = LlamaConfig(
        **_SHAPES[shape], vocab_size=vocabulary, intermediate_size=48, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=2
    )
    config._attn_implementation = "sdpa"
    return with_large_weights(LlamaForCausalLM(config))


def make_other_tokenizer() -> PreTrainedTokenizerFast:
    """Other tokens and another template than `make_tokenizer`: a space is a token of its own, punctuation joins its word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["two? two? three. It and and? What so. or "] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<s>")
    fast.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a model with its tokenizer, once for each shape."""
    made: dict[str, Path] = {}

    def save(shape: str) -> Path:
        if shape not in made:
            made[shape] = tmp_path_factory.mktemp("models") / f"tiny-{shape}"
            make_llama(shape).save_pretrained(made[shape])
            make_tokenizer().save_pretrained(made[shape])
        return made[shape]

    return save


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("data") / "sums.jsonl", 8, 8)
