"""Whether a teacher can teach a student, found from tokenizers and configs alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from adaptfleet.contracts.distillation import Alignment
from adaptfleet.contracts.errors import ContractError, ModelError
from adaptfleet.core.distill.shared_text import TokenBytes, shared_pieces

LEAST_SHARED = 0.8
"""Of the answers' tokens, in pieces that both tokenizations have."""
_MAX_SHOWN = 3


def check_vocabularies(student: Any, teacher: Any, teacher_name: str) -> None:
    """ModelError unless both tokenizers give every token the same id: distributions are compared id by id."""
    mine: Mapping[str, int] = student.get_vocab()
    theirs: Mapping[str, int] = teacher.get_vocab()
    if mine == theirs:
        return
    different = sorted((token for token in {*mine, *theirs} if mine.get(token) != theirs.get(token)), key=lambda t: (mine.get(t, -1), t))
    shown = ", ".join(f"{t!r} ({_id(mine, t)} of the student, {_id(theirs, t)} of the teacher)" for t in different[:_MAX_SHOWN])
    raise ModelError(
        f"the teacher {teacher_name!r} has another vocabulary than the student: {len(theirs):,} and {len(mine):,} tokens, of which "
        f"{len(different):,} differ, such as {shown}. Distributions are compared token by token: use a teacher of the student's "
        f"tokenizer, set objective.unit=piece, or train on the teacher's answers as rows (jobs/finetune.py)."
    )


def check_pieces(mine: Sequence[Any], theirs: Sequence[Any], my_bytes: TokenBytes, their_bytes: TokenBytes, teacher_name: str) -> None:
    """ModelError where the rows' answers hardly share a piece in the two tokenizations: there is nothing to compare."""
    shared = [shared_pieces(a, b, my_bytes, their_bytes) for a, b in zip(mine, theirs, strict=True)]
    num_tokens = sum(len(pieces.mine_N) for pieces in shared)
    num_shared = sum(int((pieces.mine_N >= 0).sum()) for pieces in shared)
    if num_shared < LEAST_SHARED * num_tokens:
        raise ModelError(
            f"only {num_shared} of {num_tokens} answer tokens of the first {len(shared)} rows lie in pieces that they share with the "
            f"teacher {teacher_name!r}: the chat templates write answers differently. Use a teacher whose template writes them as they are."
        )


def check_alignment(align: Alignment, student: Any, teacher: Any) -> None:
    """ContractError where layers are not there or widths differ. The arguments are the models' configs."""
    offenders: list[str] = []
    for side, config, numbers in (
        ("student", student, list(align.layers or {})),
        ("teacher", teacher, list((align.layers or {}).values())),
    ):
        outside = sorted({i for i in numbers if not 0 <= i < config.num_hidden_layers})
        if outside:
            numbered = ", ".join(map(str, outside))
            offenders.append(
                f"objective.align.layers names layers {numbered} of the {side}, which has 0 to {config.num_hidden_layers - 1}."
            )
    if align.hidden and student.hidden_size != teacher.hidden_size:
        offenders.append(
            f"objective.align.hidden compares hidden states of one width, but the student has {student.hidden_size} and the teacher "
            f"{teacher.hidden_size}. Set align.hidden=0; align.attention holds for any widths."
        )
    if offenders:
        raise ContractError("\n".join(offenders))


def _id(vocabulary: Mapping[str, int], token: str) -> str:
    return str(vocabulary[token]) if token in vocabulary else "none"
