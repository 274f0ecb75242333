"""Why a recipe has no 2:4 step (docs/decisions/no-sparse-kernels.md): the engine reads no sparse checkpoint."""

import pytest
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig


def test_the_engine_still_refuses_sparse_checkpoints() -> None:
    sparse = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "global_sparsity": 0.5, "targets": ["Linear"], "ignore": []}
    config = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": [], "sparsity_config": sparse}
    with pytest.raises(DeprecationWarning, match="Sparsity support has been removed"):
        CompressedTensorsConfig.from_config(config)
