"""Plan and compile every preset of configs/ for its machine, and print a Markdown table.

    pip install "jax[tpu]" jax-cuda12-plugin jax-cuda12-pjrt    # compilers; no TPU or GPU is needed
    python benchmarks/presets.py <folder> [preset ...]

`folder` has a folder with config.json for each model, by the last part of the model's name; without
it the hub is asked. A TPU program takes one to four minutes of one core, a GPU program half a
minute.
"""

import re
import subprocess
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs"
COLUMNS = {
    "model": r"^(\w+ of [\d.]+B weights, .*?);",
    "of a device, GiB": r"into ([\d.]+) GiB",
    "estimated": r"at most \(.*?\) +([\d.]+) GiB",
    "compiled": r"compiled ahead of time: ([\d.]+) GiB",
    "state, reference, batch": r"state, reference and batch: ([\d.]+) GiB",
    "fits": r"compiled ahead of time: .*?(fits|does NOT fit|refused)",
    "s a step at best": r"at best ([\d.]+) s a step",
    "pairs/s at half of that": r"([\d.]+) pairs/s",
}


def planned(path: Path, models: Path | None) -> tuple[str, str]:
    """The machine of a preset, and what plan prints for it, in a process of its own."""
    text = path.read_text()
    machine = re.search(r"topology=(\S+)", text)
    name = re.search(r"^  path: \S+?/(\S+)$", text, re.M)
    assert machine and name, path
    model = [] if models is None else [f"model_config={models / name[1]}"]
    command = [
        sys.executable,
        "-m",
        "jaxdpo.plan",
        "--config",
        str(path),
        machine[0],
        *model,
        "search=false",
    ]
    return machine[1], subprocess.run(
        command, capture_output=True, text=True, cwd=CONFIGS.parent
    ).stdout


def row(name: str, machine: str, output: str) -> str:
    """A row of the table."""
    found = [re.search(pattern, output, re.M) for pattern in COLUMNS.values()]
    return f"| {name} | {machine} | {' | '.join(match[1] if match else '-' for match in found)} |"


def header() -> str:
    """The table's first two lines."""
    return f"| preset | machine | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}"


def main(argv: list[str]) -> None:
    """Print the table, row by row."""
    models = Path(argv[0]) if argv else None
    presets = [CONFIGS / f"{name}.yaml" for name in argv[1:]] or sorted(CONFIGS.glob("*.yaml"))
    print(header())
    for path in presets:
        if "jaxdpo.plan" in path.read_text():
            print(row(path.stem, *planned(path, models)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
