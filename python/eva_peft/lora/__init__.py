"""LoRA adapters: wrapping, writing, padding, and checks that EVA was done."""
