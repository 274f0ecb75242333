"""Brings a published adapter into the engine: fetched and verified, checked against the engine's limits, loaded.

Three tiers: `max_loras` slots that a batch computes with and `max_cpu_loras` adapters in the engine's memory, the least recently used
leaving first, and the cache folder on disk. `Slots` decides whose requests may be in the engine.
"""

import asyncio
import json
import logging
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram
from safetensors import SafetensorError, safe_open

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.contracts.errors import CorruptError, NotFoundError, StoreError
from adaptfleet.on_ray.serve.refusal import RefusalError, unfit_adapter, unknown_model
from adaptfleet.on_ray.serve.slots import Slots
from adaptfleet.store.registry import Registry

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.lora.request import LoRARequest

log = logging.getLogger(__name__)
load_seconds = Histogram(
    "adaptfleet_adapter_load_seconds",
    "Fetching, checking and loading an adapter that is not in the engine.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
evictions_total = Counter("adaptfleet_adapter_evictions_total", "Adapters that left the engine's host memory for others.")

_UNSERVED_MODULES = ("lm_head", "embed_tokens")


class Adapters:
    """The adapters this engine has loaded. One load of a version at a time; a failed one leaves nothing behind and may be tried again."""

    def __init__(
        self, registry: Registry, cache: Path, engine: "EngineClient", base_folder: Path, max_rank: int, max_kept: int, slots: Slots
    ) -> None:
        self._registry = registry
        self._base_shapes = _tensor_shapes(*sorted(base_folder.glob("*.safetensors")))
        self._cache = cache
        self._engine = engine
        self._max_rank = max_rank
        self._max_kept = max_kept
        self._slots = slots
        self._numbers: dict[str, int] = {}
        self._pinned: dict[str, str] = {}
        self._loaded: OrderedDict[str, LoRARequest] = OrderedDict()
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def names(self) -> list[str]:
        """Of the adapters the engine keeps, without versions."""
        return sorted({reference.partition("@")[0] for reference in self._loaded})

    async def request_for(self, manifest: Manifest) -> "LoRARequest":
        """vLLM's request for this version, with its files at hand. RefusalError says why it cannot be served."""
        return self._request(manifest.reference, await self.fetched(manifest))

    @asynccontextmanager
    async def in_engine(self, request: "LoRARequest") -> "AsyncIterator[None]":
        """The adapter's turn: inside, the engine has it and requests may use it."""
        reference = request.lora_name
        pinned = reference in self._pinned.values()
        async with nullcontext() if pinned else self._slots.of(reference):
            await self._load(request)
            self._loaded.move_to_end(reference)
            yield

    async def fetched(self, manifest: Manifest) -> Path:
        """The adapter in the cache on disk, verified and checked against the base; at once where the engine has it."""
        reference = manifest.reference
        if reference in self._loaded:
            return Path(self._loaded[reference].lora_path)
        async with self._busy[reference]:
            folder = await asyncio.to_thread(self._fetch, manifest)
            await asyncio.to_thread(self._check, reference, folder)
        self._busy.pop(reference, None)
        return folder

    async def pin(self, manifest: Manifest) -> None:
        """Keeps this version in a slot from now on, in the place of the name's version before."""
        reference = manifest.reference
        before = self._pinned.get(manifest.name)
        if before == reference:
            return
        await self._load(await self.request_for(manifest))
        await self._engine.pin_lora(self._numbers[reference])  # type: ignore[attr-defined]
        self._pinned[manifest.name] = reference
        if before is not None:
            self._loaded.pop(before, None)
            await self._engine.remove_lora(self._numbers[before])  # type: ignore[attr-defined]

    def _request(self, reference: str, folder: Path) -> "LoRARequest":
        from vllm.lora.request import LoRARequest

        number = self._numbers.setdefault(reference, len(self._numbers) + 1)
        return LoRARequest(lora_name=reference, lora_int_id=number, lora_path=str(folder))

    async def _load(self, request: "LoRARequest") -> None:
        reference = request.lora_name
        async with self._busy[reference]:
            if reference not in self._loaded:
                try:
                    with load_seconds.time():
                        await self._engine.add_lora(request)
                except Exception as error:
                    # vLLM hands on whatever its worker raised; where the engine itself died, the replica ends.
                    log.error("%s cannot be loaded from %s: %s", reference, request.lora_path, error)
                    raise _broken(reference, "the engine cannot load its weights") from None
                self._loaded[reference] = request
                while len(self._loaded) > self._max_kept:
                    del self._loaded[next(known for known in self._loaded if known not in self._pinned.values())]
                    evictions_total.inc()
        self._busy.pop(reference, None)

    def _fetch(self, manifest: Manifest) -> Path:
        try:
            return self._registry.fetch(manifest, self._cache)
        except NotFoundError:
            raise unknown_model(f"{manifest.reference} was removed from the registry.") from None
        except CorruptError as error:
            log.error("%s", error)
            raise _broken(manifest.reference, "a file in the store differs from its manifest") from None
        except StoreError as error:
            log.error("%s cannot be fetched: %s", manifest.reference, error)
            raise RefusalError(
                503,
                f"{manifest.reference} cannot be fetched from the store now; the endpoint's log says why. Try again.",
                "store_unavailable",
            ) from None

    def _check(self, reference: str, folder: Path) -> None:
        """Before the engine sees it: the checks whose failure deserves a reason."""
        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            rank = max(int(config["r"]), *(int(r) for r in (config.get("rank_pattern") or {}).values()), 0)
            shapes = _tensor_shapes(folder / "adapter_model.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.error("%s cannot be read from %s: %s", reference, folder, error)
            raise _broken(reference, "its files are no PEFT adapter in safetensors format") from None
        if rank > self._max_rank:
            raise unfit_adapter(
                f"{reference} has rank {rank}; this endpoint serves ranks up to {self._max_rank} (max_lora_rank). "
                f"Raise max_lora_rank, or train with a lower rank.",
                "rank_too_high",
            )
        unserved = [module for module in _UNSERVED_MODULES if any(f".{module}." in name for name in shapes)]
        if unserved:
            raise unfit_adapter(
                f"{reference} changes {' and '.join(unserved)}; adapters of the embedding and the output head are not served beside "
                f"others. Merge it into its base and serve that as a model.",
                "unserved_modules",
            )
        misfits = list(_misfits(shapes, self._base_shapes))
        if misfits:
            shown = "; ".join(misfits[:3]) + (f"; and {len(misfits) - 3} more" if len(misfits) > 3 else "")
            raise unfit_adapter(f"{reference} does not fit its base: {shown}. Train it on this base again.", "misfit_adapter")


def _tensor_shapes(*files: Path) -> dict[str, tuple[int, ...]]:
    """From the files' headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def _misfits(adapter: dict[str, tuple[int, ...]], base: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """vLLM copies whatever fits into its padded buffers and leaves out modules it does not know, without a word."""
    sides = {
        name: (module.removeprefix("base_model.model."), side)
        for name in sorted(adapter)
        for module, dot, side in [name.removesuffix(".weight").rpartition(".lora_")]
        if dot
    }
    # Some checkpoints name their modules otherwise than the model does; where no name agrees, there is nothing to compare.
    if not any(f"{module}.weight" in base for module, _ in sides.values()):
        return
    for name, (module, side) in sides.items():
        weight_NK = base.get(f"{module}.weight")
        if weight_NK is None:
            if not any(tensor.startswith(f"{module}.") for tensor in base):
                yield f"the base has no module {module}"
        elif side == "A" and adapter[name][1] != weight_NK[1]:
            yield f"{module} takes {weight_NK[1]} inputs, its lora_A {adapter[name][1]}"
        elif side == "B" and adapter[name][0] != weight_NK[0]:
            yield f"{module} gives {weight_NK[0]} outputs, its lora_B {adapter[name][0]}"


def _broken(reference: str, reason: str) -> RefusalError:
    return RefusalError(
        500, f"{reference} cannot be served: {reason}. Publish it again; other models are not affected.", "adapter_corrupt", "model"
    )
