"""Scores a model that is loaded here: greedy answers, and the loss on each row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from adaptfleet.contracts.errors import DataError, ModelError
from adaptfleet.contracts.evaluating import EvaluateJob
from adaptfleet.core.data.encoding import encode_all, encode_prompt
from adaptfleet.core.data.examples import Example
from adaptfleet.core.evaluation.held_out import greedy_answers
from adaptfleet.core.evaluation.intervals import Ratio
from adaptfleet.core.evaluation.lm_eval_tasks import task_metrics
from adaptfleet.core.evaluation.row_losses import row_losses
from adaptfleet.core.evaluation.row_scores import RowLoss, RowResult
from adaptfleet.core.models.loading import load_base
from adaptfleet.on_ray.evaluate.subjects import LocalModel

_NO_LIMIT = 2**31
_MAX_SHOWN = 5

Tell = Callable[[str, int, int], None]
"""What is being done, how many rows are done, of how many."""


@dataclass(frozen=True)
class Scores:
    rows: list[RowResult]
    """In the rows' order."""
    tasks: dict[str, Ratio] = field(default_factory=dict)
    """Metrics of lm-eval's tasks."""


def score_local_model(target: LocalModel, examples: Sequence[Example], job: EvaluateJob, tell: Tell) -> Scores:
    """Each row's answer and loss, and the tasks' metrics."""
    tell("loading", 0, len(examples))
    base, tokenizer, _ = load_base(target.model)
    model: Any = base if target.adapter is None else load_adapter(base, target.adapter)
    _check_lengths(base, tokenizer, examples, job)
    losses: list[RowLoss | None] = [None] * len(examples)
    if job.perplexity:
        encoded = encode_all(examples, tokenizer, _NO_LIMIT)
        pad_id = int(tokenizer.pad_token_id or 0)
        losses = list(row_losses(model, encoded, pad_id, lambda done: tell("perplexity", done, len(examples))))
    answers: dict[int, str] = {}
    if job.answers:
        asked = [i for i, example in enumerate(examples) if example.messages]
        given = greedy_answers(
            model, tokenizer, [examples[i] for i in asked], job.max_new_tokens, lambda done: tell("answering", done, len(asked))
        )
        answers = dict(zip(asked, given, strict=True))
    tasks: dict[str, Ratio] = {}
    if job.lm_eval is not None:
        tell("lm-eval, task", 0, len(job.lm_eval.tasks))
        tasks = task_metrics(model, tokenizer, job.lm_eval)
    rows = [RowResult(example, answers.get(i), loss) for i, (example, loss) in enumerate(zip(examples, losses, strict=True))]
    return Scores(rows, tasks)


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter on its base, in the base's type as it was trained. ModelError unless every tensor finds its place, and has one."""
    try:
        model = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            stored = set(file.keys())
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(f"the adapter in {folder} does not fit {base.name_or_path}: {(reason or [repr(error)])[0]}") from None
    # peft leaves tensors that do not fit by name at their first values, with a warning.
    placed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    odd = sorted(stored ^ placed)
    if odd:
        shown = ", ".join(odd[:_MAX_SHOWN]) + (f" and {len(odd) - _MAX_SHOWN} more" if len(odd) > _MAX_SHOWN else "")
        raise ModelError(f"the adapter in {folder} does not fit {base.name_or_path}: {shown}. Give the base it was trained on.")
    return model.eval()


def _check_lengths(base: PreTrainedModel, tokenizer: Any, examples: Sequence[Example], job: EvaluateJob) -> None:
    """DataError if a row, or a prompt with its answer, has more tokens than the model has positions."""
    positions = getattr(base.config, "max_position_embeddings", None)
    if positions is None:
        return
    long: list[str] = []
    for i, example in enumerate(examples):
        name = example.origin or f"row {i}"
        if job.answers and example.messages:
            num_tokens = len(encode_prompt(example, tokenizer))
            if num_tokens + job.max_new_tokens > positions:
                long.append(f"{name}: {num_tokens} tokens of prompt and {job.max_new_tokens} of max_new_tokens")
        elif example.text is not None and len(tokenizer(example.text)["input_ids"]) >= positions:
            long.append(f"{name}: more than {positions} tokens")
    if long:
        rest = [f"  ... and {len(long) - _MAX_SHOWN} more"] if len(long) > _MAX_SHOWN else []
        fact = f"{len(long)} of {len(examples)} rows do not fit the model's {positions} positions."
        shown = [f"  {line}" for line in long[:_MAX_SHOWN]]
        raise DataError("\n".join([f"{fact} Lower max_new_tokens, or leave them out.", *shown, *rest]))
