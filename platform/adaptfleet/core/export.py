"""The trained adapter in peft's standard format."""

from pathlib import Path

from peft import PeftModel


def export_adapter(model: PeftModel, folder: Path, base_id: str) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, in the type the model computed in: what is served is what was trained.

    The config names the base by `base_id`, not by a path of the machine that trained it.
    """
    model.peft_config["default"].base_model_name_or_path = base_id
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
