"""`python -m jaxdpo.export run_dir=<run> out=<folder>`: a policy for transformers, PEFT and vLLM.

Weights go from the checkpoint to the file one tensor of a layer at a time. The folder is written
under a temporary name and renamed when it is complete, so `out` is complete or absent. Exit codes:
0 done, 1 fault, 2 wrong options.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxdpo.checkpoints.restore import open_params
from jaxdpo.checkpoints.run_dir import (
    check_base,
    find_base,
    lora_of_run,
    model_files,
    read_run_config,
)
from jaxdpo.config import cli
from jaxdpo.config.schema import Config
from jaxdpo.config.sections import require, section
from jaxdpo.data.template_source import template_text
from jaxdpo.data.tokenizer_json import load_tokenizer
from jaxdpo.models.config import ModelConfig
from jaxdpo.models.hf.config_json import from_hf, read_config_json
from jaxdpo.models.hf.hub import HubModel
from jaxdpo.models.hf.load_save import open_weights
from jaxdpo.models.hf.model_card import run_card
from jaxdpo.models.hf.save_folder import export_adapter, export_model, occupied
from jaxdpo.models.lora import merge
from jaxdpo.utils.files import is_local

DONE, FAULT = 0, 1


@section
class ExportConfig:
    """Write a run's policy as a Hugging Face folder: weights, config, tokenizer, generation config,
    model card."""

    run_dir: str
    """Folder of the run."""
    out: str
    """Folder to write. It must not exist, or be empty."""
    step: int | None = None
    """Which checkpoint. Default: the newest that is undamaged."""
    form: Literal["auto", "full", "merged", "adapter"] = "auto"
    """full: all weights, of a run that trained them all. merged: all weights, the run's adapter
    merged into its base. adapter: the adapter alone, as PEFT has it. auto: adapter where the run
    trained one, else full."""
    base: str | None = None
    """Where the base model of the adapter is now, or its name on the hub. Default: the run's
    model.path."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in the files. auto: that of the model before training, if its
    config.json says so, else float32; an adapter alone is always float32."""
    max_shard_bytes: int | None = None
    """Larger weights are split over several files, none larger than this. Default 5e9."""
    push_to: str | None = None
    """Push the folder to the hub under this name, owner/name. The token is taken from HF_TOKEN in
    the environment."""
    private: bool = True
    """Whether what is pushed is for its owner alone. A repository that is public already is then
    refused."""

    @property
    def target(self) -> HubModel | None:
        """Where to push; None: nowhere."""
        return None if self.push_to is None else HubModel(name=self.push_to, private=self.private)

    def __post_init__(self) -> None:
        require(
            (self.step is None or self.step >= 0, f"step={self.step}: must not be negative"),
            (
                self.max_shard_bytes is None or self.max_shard_bytes >= 1,
                f"max_shard_bytes={self.max_shard_bytes}: must be at least 1",
            ),
            (
                self.private or self.push_to is not None,
                "private=false: does nothing by itself. Set push_to",
            ),
        )


def check(config: ExportConfig) -> list[str]:
    """Problems that show before a checkpoint is read, as messages."""
    problems = []
    obstacle = occupied(Path(config.out).expanduser())
    if obstacle is not None:
        problems.append(obstacle)
    if config.target is not None:
        problems += config.target.problems()
    run_dir = Path(config.run_dir).expanduser()
    if not (run_dir / "config.yaml").is_file():
        return [f"run_dir={run_dir}: has no config.yaml. Name the folder of a run", *problems]
    try:
        problems += _form_problems(config, read_run_config(run_dir))
    except ValueError as error:
        problems.append(str(error))
    return problems


def _form_problems(config: ExportConfig, run_config: Config) -> list[str]:
    """Options that do not fit what the run trained."""
    problems = []
    if not run_config.lora.enabled:
        if config.form not in ("auto", "full"):
            problems.append(
                f"form={config.form}: the run trained all weights, there is no adapter. "
                "Use form=full"
            )
        if config.base is not None:
            problems.append(
                f"base={config.base}: the run trained all weights, so its base is not needed. "
                "Leave it out"
            )
        return problems
    if config.form == "full":
        problems.append("form=full: the run trained an adapter. Use form=merged or form=adapter")
    if config.form not in ("auto", "adapter"):
        return problems
    if config.dtype != "auto":
        problems.append(
            f"dtype={config.dtype}: an adapter alone is float32. Leave it out, or use form=merged"
        )
    if config.max_shard_bytes is not None:
        problems.append(
            f"max_shard_bytes={config.max_shard_bytes}: an adapter alone is one file. "
            "Leave it out, or use form=merged"
        )
    if config.push_to and is_local(config.base or run_config.model.path or ""):
        problems.append(
            f"push_to={config.push_to}: the adapter would name a folder of this machine as its "
            "base. Give the base's name on the hub: base=owner/name"
        )
    return problems


def export_run(config: ExportConfig) -> list[Path]:
    """Export a run's checkpoint; returns the files written.

    Raises:
        ValueError: the run, its checkpoint, its base or its model's files cannot be used, or `out`
            is not empty.
    """
    run_dir, out = Path(config.run_dir).expanduser(), Path(config.out).expanduser()
    run_config = read_run_config(run_dir)
    problems = _form_problems(config, run_config)
    if problems:
        raise ValueError("\n".join(problems))
    source = model_files(run_dir, run_config)
    raw_config = read_config_json(source)
    model = from_hf(raw_config)
    step, params, meta = open_params(run_dir, config.step)
    lora = lora_of_run(run_config, model, params) if run_config.lora.enabled else None
    as_adapter = lora is not None and config.form != "merged"
    base = config.base or run_config.model.path or "a model made by jaxdpo"
    added: dict[str, Any] = {
        "card": run_card(run_config, run_dir, step, base=base, lora=lora, adapter=as_adapter),
        "tokenizer": source,
        "chat_template": _chat_template(run_config, run_dir, source),
    }
    with _deletion_explained(run_dir, step):
        if lora is not None and as_adapter:
            name, revision = _base_name(config, run_config, meta)
            return export_adapter(out, model, params, lora, base=name, revision=revision, **added)
        if lora is not None:
            base_params = _base_weights(config, run_config, model, meta)
            params = merge(base_params, jax.tree.map(np.asarray, params), lora.scale)
        return export_model(
            out,
            model,
            params,
            raw_config=raw_config,
            dtype=config.dtype,
            max_shard_bytes=config.max_shard_bytes,
            **added,
        )


def _chat_template(run_config: Config, run_dir: Path, source: Path) -> str | None:
    """The template to put into the folder, if it is not the one of the tokenizer's files."""
    name = run_config.data.chat_template
    # The tokenizer that a run copied into its folder has the template of the training already.
    if name is None or source == run_dir / "model":
        return None
    path = Path(name).expanduser()
    if path.is_file():  # else it is the name of one of the tokenizer's
        return path.read_text(encoding="utf-8")
    return template_text(load_tokenizer(str(source)), name)


def _base_weights(
    config: ExportConfig, run_config: Config, model: ModelConfig, meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The base model of a run's adapter, verified; its weights are read from the files later."""
    folder = find_base(run_config, config.base)
    check_base(run_config, meta, folder)
    return open_weights(folder, model)


def _base_name(
    config: ExportConfig, run_config: Config, meta: Mapping[str, Any]
) -> tuple[str, str | None]:
    """How adapter_config.json names the base, and its hub revision; a local base is verified."""
    name = config.base or run_config.model.path or ""
    folder = Path(name).expanduser()
    if folder.is_dir() or run_config.model.init == "random":
        check_base(run_config, meta, folder)
    if is_local(name):
        return folder.name, None  # the path would tell of this machine, and mean nothing elsewhere
    return name, run_config.model.revision if config.base is None else None


@contextlib.contextmanager
def _deletion_explained(run_dir: Path, step: int) -> Iterator[None]:
    """A run in progress deletes its older checkpoints: say so if it deleted this one."""
    try:
        yield
    except ValueError as error:
        if (run_dir / "checkpoints" / str(step)).is_dir():
            raise
        raise ValueError(
            f"step={step}: was deleted while it was read, by a run that goes on. "
            "Export again, or raise its checkpoint.keep"
        ) from error


def _push(target: HubModel, folder: Path, files: Sequence[Path], num_bytes: int) -> None:
    visibility = "private" if target.private else "public"
    print(
        f"pushing these {len(files)} files, {num_bytes:,} bytes, to {target.name} ({visibility})",
        flush=True,
    )
    try:
        print(target.push(folder, files))
    except ValueError as error:
        again = f"hf upload {target.name} {folder}"
        if target.private:
            again += " --private"
        raise ValueError(f"{error}\nThe folder is complete. To push it later: {again}") from None


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    config, _ = cli.load(ExportConfig, argv, command="export", checks=[check])
    try:
        if config.target is not None:
            config.target.check()
        files = export_run(config)
        sizes = [path.stat().st_size for path in files]
        for path, size in zip(files, sizes, strict=True):
            print(f"{size:>15,}  {path}")
        if config.target is not None:
            _push(config.target, Path(config.out).expanduser(), files, sum(sizes))
    except (ValueError, OSError) as error:
        print(f"jaxdpo.export: {error}", file=sys.stderr)
        return FAULT
    return DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
