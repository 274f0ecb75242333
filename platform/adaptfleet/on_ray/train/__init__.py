"""Fine-tuning on Ray Train: `finetune.run_finetune` takes a contract to a published adapter."""
