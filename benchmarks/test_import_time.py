"""What ``import bnfast`` adds to ``import numpy``, in a fresh interpreter for every round.

The figure is ``milliseconds_added`` under ``extra_info`` of the saved file; ``-s`` prints it.
That nothing heavy is imported is a test of its own: ``tests/test_import.py``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import bnfast

MEASURE = """
import time
import numpy
start = time.perf_counter()
import bnfast
print(time.perf_counter() - start)
"""


@pytest.mark.benchmark(group="import")
def test_import(benchmark, tmp_path):
    # Bytecode is cached, as it is after an installation: compiling the sources triples the figure.
    environment = os.environ | {
        "PYTHONPATH": str(Path(bnfast.__file__).parent.parent),
        "PYTHONPYCACHEPREFIX": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    seconds = []

    def import_in_a_new_process():
        finished = subprocess.run(
            [sys.executable, "-c", MEASURE],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(float(finished.stdout))

    benchmark.pedantic(import_in_a_new_process, rounds=15, warmup_rounds=1)
    added = 1e3 * statistics.median(seconds)
    benchmark.extra_info["milliseconds_added"] = round(added, 2)
    print(f"import bnfast adds {added:.1f} ms to import numpy (median of {len(seconds)})")
