"""Which layers of a mixed scheme keep 8 bits: each layer's harm is measured once, and a knapsack fills the budget."""

import json
import logging
from pathlib import Path

from adaptfleet.contracts.compression import Quantize
from adaptfleet.contracts.home import home
from adaptfleet.contracts.schemes import Mixed
from adaptfleet.core.models.loading import base_revision
from adaptfleet.core.quantization.calibration import rows_sha256
from adaptfleet.core.quantization.fit import end_bytes, fused_units, mixed_budget, rounded_bytes, rounded_linear
from adaptfleet.core.quantization.knapsack import Option, fill
from adaptfleet.core.quantization.sensitivity import harm
from adaptfleet.on_ray.compress.preflight import Prepared
from adaptfleet.on_ray.compress.recipe_folder import write_json
from adaptfleet.on_ray.compress.steps import load_stored

log = logging.getLogger(__name__)
BITS = (4, 8)


def choose_bits(folder: Path, step: Quantize, prepared: Prepared) -> dict[str, int]:
    """Bits by full name of each linear layer; layers that the engine fuses have the same."""
    scheme, shapes = step.scheme, prepared.shapes
    assert isinstance(scheme, Mixed)
    harms = measured_harm(folder, scheme.group_size, prepared)
    units = fused_units(rounded_linear(shapes, step))
    options = [
        [
            Option(
                sum(rounded_bytes(shapes.linear[name], bits, scheme.group_size if bits == 4 else None) for name in unit),
                sum(harms[name][str(bits)] for name in unit),
            )
            for bits in BITS
        ]
        for unit in units
    ]
    budget = mixed_budget(shapes, scheme, prepared.parent_bytes) - end_bytes(shapes, step)
    chosen = fill(options, budget)
    bits_of = {name: BITS[choice] for unit, choice in zip(units, chosen, strict=True) for name in unit}
    used = sum(options[i][choice].num_bytes for i, choice in enumerate(chosen))
    eights = sum(choice for choice in chosen)
    log.info("mixed: %d of %d layers keep 8 bits, %s of %s bytes used", eights, len(units), f"{used:,}", f"{budget:,}")
    return bits_of


def measured_harm(folder: Path, group_size: int, prepared: Prepared) -> dict[str, dict[str, float]]:
    """By layer and bits; measured once for a model and its rows, then kept."""
    name = f"{base_revision(folder)[:16]}-{rows_sha256(prepared.calibration)[:16]}-g{group_size}.json"
    file = home() / "cache" / "sensitivity" / name
    if not file.is_file():
        model, tokenizer = load_stored(folder)
        found = harm(model, prepared.calibration, int(tokenizer.pad_token_id or 0), group_size)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    kept: dict[str, dict[str, float]] = json.loads(file.read_text())
    return kept
