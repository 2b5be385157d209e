"""Loads a Hugging Face folder with transformers: a JSON line on stdin names it, one on stdout says what it took."""

import json
import pathlib
import re
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Loads, and says how many bytes were ever resident and how many the parameters have."""
    request = json.loads(sys.stdin.readline())
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=getattr(torch, request["dtype"]))
    arrays = sum(parameter.nbytes for parameter in model.parameters())
    status = pathlib.Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak, "arrays": arrays}), flush=True)


if __name__ == "__main__":
    main()
