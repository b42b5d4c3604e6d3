"""Measure the peak memory of one kind of pass: the demo runs each in a process of its own."""

import argparse
import sys

from eva_peft.demo.comparison import OURS, PEFT
from eva_peft.demo.run import measure_peak

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--measure", choices=["plain", OURS, PEFT], required=True)
parser.add_argument("--quick", action="store_true")
arguments = parser.parse_args()
sys.stdout.write(f"{measure_peak(arguments.measure, arguments.quick)}\n")
