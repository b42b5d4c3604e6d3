"""The package's main task on the embedded model: ``eva-kernels demo``."""

from eva_peft.demo.run import run_demo

__all__ = ["run_demo"]
