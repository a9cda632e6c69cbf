"""The tables of vs_trl.py, and whether each aim is met."""

import statistics
from collections.abc import Iterator
from typing import Any

from .workers import RIVALS

GB = 1e9
AIMS = [
    ("random", "ours float32", "TRL float32", 8.0),
    ("random", "ours bf16", "TRL bf16", 5.0),
    ("random", "ours float32", "TRL best float32", 3.5),
    ("random", "ours bf16", "TRL best bf16", 2.3),
    ("grouped", "ours bf16", "TRL best bf16", 1.5),
]
"""Phase, ours, theirs, the speed-up to reach."""
START_SECONDS = 25.0
PHASES = {"random": "Pairs in random order", "grouped": "Pairs in batches of similar length"}
NAMES = [rival.name for rival in RIVALS]


def counted(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rounds that count: the undisturbed ones, or all if none is."""
    return [item for item in results["rounds"] if item["clean"]] or results["rounds"]


def seconds(results: dict[str, Any], phase: str, name: str) -> list[float]:
    """What each round that counts took."""
    return [item["phases"][phase]["answers"][name]["seconds"] for item in counted(results)]


def ratios(results: dict[str, Any], phase: str, ours: str, theirs: str) -> list[float]:
    """How many times faster ours was, in each round."""
    rounds = zip(seconds(results, phase, ours), seconds(results, phase, theirs), strict=True)
    return [b / a for a, b in rounds]


def warm_peak(results: dict[str, Any], name: str) -> int:
    """Peak memory in bytes of the process that trained in all rounds."""
    return max(
        found["answers"][name]["peak_bytes"]
        for item in results["rounds"]
        for found in item["phases"].values()
    )


def peak(results: dict[str, Any], name: str) -> int:
    """Peak memory in bytes; for ours with compilation."""
    cold = results["starts"].get(f"{name}, nothing compiled", {}).get("all_programs", {})
    return max(warm_peak(results, name), cold.get("peak_bytes", 0))


def verdicts(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each aim, what was measured, and whether that is enough."""

    def items() -> Iterator[tuple[str, str, float, bool]]:
        for phase, ours, theirs, aim in AIMS:
            median = statistics.median(ratios(results, phase, ours, theirs))
            yield f"{ours} / {theirs}, {phase} order", f"at least {aim}x", median, median >= aim
        for ours, theirs in (("ours float32", "TRL float32"), ("ours bf16", "TRL bf16")):
            share = peak(results, ours) / peak(results, theirs)
            yield f"peak memory, {ours} / {theirs}", "at most 0.333", share, share <= 1 / 3
        for ours in ("ours float32", "ours bf16"):
            cold, warm = (
                results["starts"][label]["seconds"] for label in (f"{ours}, nothing compiled", ours)
            )
            yield (
                f"start to the end of step 1, {ours}, nothing compiled",
                f"under {START_SECONDS:.0f} s",
                cold,
                cold < START_SECONDS,
            )
            yield (
                f"the same, programs in the cache, {ours}",
                f"under {cold:.1f} s",
                warm,
                warm < cold,
            )

    return [
        {"aim": aim, "wanted": wanted, "measured": round(value, 3), "met": met}
        for aim, wanted, value, met in items()
    ]


def markdown(results: dict[str, Any]) -> str:
    """The result file."""
    parts = [_head(results), _aims(results)]
    parts += [_phase(results, phase) for phase in PHASES]
    parts += [_memory(results), _starts(results), _notes(results)]
    return "\n\n".join(parts) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _head(results: dict[str, Any]) -> str:
    config, machine = results["config"], results["hardware"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"# jaxdpo and TRL side by side, {config['date']}\n\n"
        f"`{config['command']}` at commit {config['commit']}\n\n"
        f"- {machine['cpu']} (family/model {machine['family_model']}; "
        f"{', '.join(machine['isa'])}), {machine['cores_used']} of {machine['cores']} cores, "
        f"{machine['memory_bytes'] / GB:.0f} GB, {machine['system']}; "
        f"load before the run {machine['load_before']:.2f}\n"
        f"- {versions}\n"
        f"- Llama of 56M parameters (hidden 512, 8 layers, 8 heads, 4 kv heads, mlp 1408, "
        "vocabulary 32,000, untied head), random weights; "
        f"{config['data']}, {results['data']['kept']} pairs; {config['batch_size']} pairs a step, "
        f"at most {config['max_length']} tokens; {len(counted(results))} rounds of "
        f"{config['steps_per_round']} steps in each order"
    )


def _aims(results: dict[str, Any]) -> str:
    rows = [
        [item["aim"], item["wanted"], f"{item['measured']:.2f}", "yes" if item["met"] else "**no**"]
        for item in results["verdicts"]
    ]
    disturbed = ""
    if not any(item["clean"] for item in results["rounds"]):
        disturbed = "**Other work ran beside every round: these numbers mean little.**\n\n"
    return "## Aims\n\n" + disturbed + _table(["", "wanted", "measured", "met"], rows)


def _phase(results: dict[str, Any], phase: str) -> str:
    config, used = results["config"], counted(results)
    pairs = config["batch_size"] * config["steps_per_round"]
    real, padded = (
        sum(item["phases"][phase]["tokens"][kind] for item in used) for kind in ("real", "padded")
    )
    rows = []
    for name in NAMES:
        took = seconds(results, phase, name)
        rates = [pairs / s for s in took]
        faster = ratios(results, phase, NAMES[name.endswith("bf16")], name)
        theirs = not name.startswith("ours")
        rows.append(
            [
                name,
                f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})",
                f"{pairs * len(took) / sum(took):.2f}",
                f"{real / sum(took):.0f}",
                f"{padded / sum(took):.0f}" if theirs else "",
                f"{statistics.median(faster):.2f}x ({min(faster):.2f} to {max(faster):.2f})"
                if theirs
                else "",
            ]
        )
    header = [
        "",
        "pairs/s, median (range)",
        "pairs/s, all rounds",
        "real tokens/s",
        "padded tokens/s",
        "ours of that type is faster by",
    ]
    return (
        f"## {PHASES[phase]}\n\n{_table(header, rows)}\n\n"
        f"Real tokens: prompt, chosen and rejected, each once ({real} in all rounds, a mean of "
        f"{real / len(used) / config['steps_per_round']:.0f} a step), the same for both sides. "
        f"Padded: what TRL's batches hold, prompts twice and padding ({padded})."
    )


def _memory(results: dict[str, Any]) -> str:
    rows = [[name, f"{peak(results, name) / GB:.2f}"] for name in NAMES]
    for name in NAMES[:2]:
        rows.append([f"{name}, programs in the cache", f"{warm_peak(results, name) / GB:.2f}"])
    rows += [
        [f"{name} ({item['seconds']:.1f} s a step)", f"{item['peak_bytes'] / GB:.2f}"]
        for name, item in results["sparing"].items()
    ]
    return (
        "## Peak memory\n\n"
        + _table(["", "GB"], rows)
        + "\n\nLargest resident memory (ru_maxrss) from the start to the last round; "
        "ours with compilation, unless said otherwise. Gradient checkpointing is TRL's default; it "
        "is off in every other row, as TRL is faster without. Those two rows are of one step, that "
        "of the random order with the most padded tokens."
    )


def _starts(results: dict[str, Any]) -> str:
    rows = []
    for name, item in results["starts"].items():
        compiled = f"{item['compile_seconds']:.1f}" if "compile_seconds" in item else ""
        programs = item.get("all_programs", {}).get("compile_seconds")
        rows.append(
            [
                name,
                f"{item['seconds']:.1f}",
                compiled,
                "" if programs is None else f"{programs:.1f}",
            ]
        )
    header = [
        "",
        "to the end of step 1, s",
        "XLA compiling or loading in it, s",
        "then all other packed lengths of both orders, s",
    ]
    return (
        "## Start\n\n"
        + _table(header, rows)
        + "\n\nA fresh process each: imports, weights, tokenizing all pairs, first step. Ours "
        "includes the closed-form check (one step more). Rows without 'nothing compiled' find "
        "their programs in the cache on disk. All programs are compiled before a round is timed."
    )


def _notes(results: dict[str, Any]) -> str:
    same = ", ".join(f"{name} {value:.1e}" for name, value in results["same_work"].items() if value)
    data = results["data"]
    answers = [
        answer
        for item in results["rounds"]
        for found in item["phases"].values()
        for answer in found["answers"].values()
    ]
    late = sum(answer.get("large_programs", 0) for answer in answers)
    clean = sum(item["clean"] for item in results["rounds"])
    others = max(item["foreign"] for item in counted(results))
    starts = max(item["foreign"] for item in results["starts"].values())
    return (
        "## Notes\n\n"
        f"- Data: {data['rows_read']} rows read, {data['parsed']} parsed, {data['kept']} used; "
        f"{data['cut_prompts']} prompts truncated at the front to "
        f"{results['config']['max_length'] // 2} tokens and {data['cut_answers']} completions at "
        "the end, by our rule; TRL, whose rule differs, got the truncated text. The token ids of "
        "every pair measured were compared and are equal.\n"
        f"- Same work: largest relative difference of a step's mean chosen log-prob from ours in "
        f"float32: {same}.\n"
        f"- {clean} of {len(results['rounds'])} rounds were undisturbed; in those counted, other "
        f"processes used at most {others:.1%} of the cores. Starts: at most {starts:.1%}.\n"
        f"- Programs compiled within timed rounds: {late}.\n"
        "- TRL at its best: its fused LM head computes the positions of completions only, as on a "
        "GPU (see versus/theirs.py). Gradient checkpointing, evaluation, logging and saving are "
        "off; the reference is computed in every step by both sides; 2 threads.\n"
        "- bf16: autocast over float32 weights in TRL; bf16 inputs of matmuls with float32 sums, "
        "float32 weights, in ours."
    )
