"""What a run writes into its folder before its first step, and says about itself."""

from pathlib import Path

from jaxdpo.config import cli
from jaxdpo.data.prepare import summary
from jaxdpo.data.template_source import template_text
from jaxdpo.distributed import processes
from jaxdpo.models.hf.folder import add_end_tokens, copy_model_files
from jaxdpo.training.trainer import Trainer
from jaxdpo.utils.files import atomic_write, write_json


def write_inputs(trainer: Trainer, run_dir: Path) -> None:
    """Write config.yaml, data_report.json and model/ (config and tokenizer) of the run folder."""
    if not processes.is_first():
        return
    with atomic_write(run_dir / "config.yaml") as file:
        file.write(cli.to_yaml(trainer.config))
    write_json(run_dir / "data_report.json", trainer.data.report)
    template = trainer.config.data.chat_template
    text = None
    if template is not None:
        text = template_text(trainer.tokenizer, template)
    copy_model_files(trainer.folder, run_dir / "model", text)
    # An export copies these files: what reads it must stop where the training answers stop.
    add_end_tokens(run_dir / "model", sorted(trainer.stop_ids), trainer.end_token)


def describe(trainer: Trainer) -> list[str]:
    """What is about to run, as lines for the console."""
    loader, forward, mesh = trainer.loader, trainer.options.forward, trainer.mesh
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lengths = ", ".join(map(str, loader.packer.packed_lengths))
    prompts = "shared" if trainer.config.data.share_prefix else "separate"
    return [
        f"model: {trainer.model.family}, {trainer.weights.num_all():,} parameters, "
        f"{forward.compute_dtype} matmuls, remat {forward.remat}",
        *trainer.notes,
        f"devices: {mesh.size} {mesh.devices.flat[0].device_kind} ({axes})",
        *summary(trainer.data.report),
        f"steps: {trainer.total_steps} of {loader.batch_size} pairs, "
        f"{loader.steps_per_epoch} an epoch; packed sequences of {lengths} tokens "
        f"({prompts} prompts)",
    ]
