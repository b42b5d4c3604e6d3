"""LoRA adapters: made, written, padded, and asked whether EVA was done."""
