"""What one row of a data set is, whatever file it came from."""

import json
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an assistant's answer, perhaps with a worse one beside it, or a plain text."""

    messages: tuple[Message, ...] = ()
    """Empty for a `text` row."""
    text: str | None = None
    plain: bool = False
    """The row was `prompt` and `completion`, which a tokenizer without a chat template may join as they are."""
    rejected: str | None = None
    """The answer that is not preferred to the last message; None: the row is no preference."""
    origin: str = field(default="", compare=False)
    """File and line, for error messages."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All messages before the last answer; empty for a text."""
        return self.messages[:-1]

    @property
    def answer(self) -> str | None:
        """The last assistant message; None for a text."""
        return self.messages[-1].content if self.messages else None

    def prompt_key(self) -> str:
        """Equal for examples that ask the same, whitespace and case aside: such examples must stand on one side of a split."""
        if self.text is not None:
            return _fold(self.text)
        return json.dumps([[m.role, _fold(m.content)] for m in self.prompt], ensure_ascii=False)

    def as_row(self) -> dict[str, object]:
        """The row `rows.read_rows` reads back."""
        if self.text is not None:
            return {"text": self.text}
        if self.rejected is not None:
            prompt = self.messages[0].content if self.plain else [{"role": m.role, "content": m.content} for m in self.prompt]
            return {"prompt": prompt, "chosen": self.messages[-1].content, "rejected": self.rejected}
        if self.plain:
            return {"prompt": self.messages[0].content, "completion": self.messages[1].content}
        return {"messages": [{"role": m.role, "content": m.content} for m in self.messages]}


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()
