"""vLLM's table of models, answering for one request at a time.

The door has resolved the id before vLLM sees the request, and leaves the result in `current`. vLLM's handlers ask this table three things:
is the id the base's, which adapter has it, and which name goes into the answer.
"""

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission
from vllm.lora.request import LoRARequest

from adaptfleet.on_ray.serve.catalog import Catalog
from adaptfleet.on_ray.serve.viewer import viewer


@dataclass(frozen=True, slots=True)
class Current:
    requested: str
    adapter: LoRARequest | None


current: ContextVar[Current | None] = ContextVar("adaptfleet_current_model", default=None)


class _CurrentAdapter(Mapping[str, LoRARequest]):
    """The current request's adapter under the id the client wrote; nothing else, so that no request can reach another's adapter."""

    def __getitem__(self, name: str) -> LoRARequest:
        now = current.get()
        if now is None or now.adapter is None or now.requested != name:
            raise KeyError(name)
        return now.adapter

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class ServedModels(OpenAIServingModels):  # type: ignore[misc, unused-ignore]
    catalog: Catalog
    """Set before vLLM makes the one instance (`engine.application`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora_requests = _CurrentAdapter()  # type: ignore[assignment]

    def is_base_model(self, model_name: str) -> bool:
        now = current.get()
        return now is not None and now.adapter is None and now.requested == model_name

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        now = current.get()
        return super().model_name(lora_request) if now is None else now.requested

    async def show_available_models(self) -> ModelList:
        return ModelList(
            data=[
                ModelCard(
                    id=card.id,
                    created=card.created,
                    owned_by="adaptfleet",
                    root=card.base,
                    parent=None if card.id == card.base else card.base,
                    max_model_len=self.catalog.max_model_len(card.base) or self.model_config.max_model_len,
                    permission=[ModelPermission()],
                )
                for card in await self.catalog.cards(viewer.get())
            ]
        )
