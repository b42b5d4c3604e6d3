"""The main job on the embedded default: ``eva-kernels demo``."""

from eva_peft.demo.run import run_demo

__all__ = ["run_demo"]
