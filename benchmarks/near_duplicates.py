"""Time, memory and recall of the search for near-duplicate pairs.

    python benchmarks/near_duplicates.py [pairs ...]

Synthetic pairs of about hh-rlhf's lengths, of which one in a hundred repeats the one before it with
the last word of its prompt and of its chosen completion replaced. Times are CPU seconds of one
process, which other work on the machine changes least.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np

from jaxdpo import __version__
from jaxdpo.config.data_options import DataSection
from jaxdpo.data.formats.preference import Preference
from jaxdpo.data.inspect.near_duplicates import DEFAULT_THRESHOLD
from jaxdpo.data.inspect.survey import Texts

SIZES = (10_000, 100_000)
EVERY = 100
WORDS = (90, 30, 35)
"""Median words of prompt, chosen and rejected."""
RESULTS = Path(__file__).parent / "results"


def pairs(count: int) -> Iterator[Preference]:
    """Synthetic pairs; the last of every EVERY repeats the one before it but for two words."""
    random = np.random.default_rng(0)
    vocabulary = np.array([f"w{number}" for number in range(30_000)])
    common = 1 / np.arange(1, len(vocabulary) + 1)
    common = np.cumsum(common) / common.sum()
    words: list[list[str]] = []
    for number in range(count):
        if number % EVERY == EVERY - 1:
            for text in words[:2]:
                text[-1] = "changed"
        else:
            sizes = [max(20, int(random.lognormal(np.log(size), 0.7))) for size in WORDS]
            words = [
                vocabulary[np.searchsorted(common, random.random(size))].tolist() for size in sizes
            ]
        yield Preference(*map(" ".join, words), id=str(number))


def measure(count: int) -> dict[str, float]:
    """Search `count` pairs in this process."""
    texts, seconds = Texts(DEFAULT_THRESHOLD), 0.0
    for record in pairs(count):
        began = time.process_time()
        texts.add(record)
        seconds += time.process_time() - began
    began = time.process_time()
    found = texts.near_duplicates(texts.held_out(count, DataSection(eval_fraction=0.0)))
    assert found is not None
    return {
        "pairs": count,
        "reading_cpu_seconds": round(seconds, 1),
        "search_cpu_seconds": round(time.process_time() - began, 1),
        "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "planted": count // EVERY,
        "found": found.pairs.count,
    }


def main() -> None:
    """Measure each size in a process of its own and write the results."""
    sizes = tuple(map(int, sys.argv[1:])) or SIZES
    if sizes[0] < 0:
        print(json.dumps(measure(-sizes[0])))
        return
    rows = []
    for size in (1, *sizes):
        done = subprocess.run(
            [sys.executable, __file__, str(-size)], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(done.stdout))
        print(rows[-1], flush=True)
    about = {
        "date": str(date.today()),
        "jaxdpo": __version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    about |= {
        "machine": platform.machine(),
        "load": round(os.getloadavg()[0], 1),
        "command": "python benchmarks/near_duplicates.py",
    }
    RESULTS.joinpath(f"near_duplicates-{date.today()}.json").write_text(
        json.dumps({**about, "runs": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
