"""The rules about the loss options: what goes together, and the values of what is left open."""

import dataclasses
import difflib

from jaxdpo.config.loss_options import REF_MIXUP_ALPHA, LossOptions, LossSection
from jaxdpo.losses.registry import LOSSES, MODIFIERS, needs_reference


def check(section: LossSection, reference: str) -> list[str]:
    """What is wrong with the loss options, as messages; empty when nothing is.

    Args:
        section: the loss options.
        reference: the config's `reference`; "none" means that no reference model exists.

    >>> check(LossSection(name="sigmoid", cpo_alpha=0.5), "frozen")
    ['loss.cpo_alpha=0.5: loss.name=sigmoid does not read it. Leave it out, or use cpo']
    """
    unknown = [_unknown(name) for name in section.names if name not in LOSSES]
    if unknown:
        return unknown
    rows = [LOSSES[name] for name in section.names]
    shown = ",".join(section.names)
    problems = []
    for option, value in _options_that_are_set(section):
        problems += _misplaced(option, value, section)
    if section.label_smoothing == 0 and any(row.needs_smoothing for row in rows):
        problems.append(
            f"loss.label_smoothing=0: loss.name={shown} takes its logarithm. "
            "Use a value above 0, e.g. 0.001"
        )
    if reference == "none" and needs_reference(section):
        free = ", ".join(name for name, row in LOSSES.items() if not row.needs_reference)
        problems.append(
            f"reference=none: loss.name={shown} compares with a reference. "
            f"Use reference=frozen, or a loss without one: {free}"
        )
    if section.ref_sync_every and not needs_reference(section):
        problems.append(
            f"loss.ref_sync_every={section.ref_sync_every}: "
            f"moves a reference that loss.name={shown} does not read. Leave it out"
        )
    return problems


def resolve(section: LossSection) -> LossSection:
    """The section with numbers in place of constants left open, for config.yaml and checkpoints.

    Constants that switch something on stay open where they are off. So does a constant whose
    default differs between the chosen losses (see `open_constants`).

    >>> resolve(LossSection(name="simpo")).beta
    2.0
    >>> resolve(LossSection(name=["sigmoid", "simpo"])).beta is None
    True
    """
    values = {}
    for option in dataclasses.fields(LossOptions):
        is_open = getattr(section, option.name) is None
        is_on = option.name not in MODIFIERS
        if option.name == "alpha_divergence":
            is_on = section.f_divergence == "alpha"
        readers = [LOSSES[name] for name in section.names if option.name in LOSSES[name].options]
        defaults = {getattr(row.defaults, option.name) for row in readers}
        if is_open and is_on and len(defaults) == 1:
            values[option.name] = defaults.pop()
    if section.ref_sync_every and section.ref_mixup_alpha is None:
        values["ref_mixup_alpha"] = REF_MIXUP_ALPHA
    return dataclasses.replace(section, **values)


def open_constants(section: LossSection) -> dict[str, dict[str, float | str]]:
    """The constants that `resolve` leaves open: option -> value by loss. For a run's identity.

    >>> open_constants(LossSection(name=["sigmoid", "simpo"], simpo_gamma=0.3))
    {'beta': {'sigmoid': 0.1, 'simpo': 2.0}}
    """
    section = resolve(section)
    constants = {}
    for option in dataclasses.fields(LossOptions):
        if option.name in MODIFIERS or getattr(section, option.name) is not None:
            continue
        values = {}
        for name in section.names:
            if option.name in LOSSES[name].options:
                values[name] = getattr(LOSSES[name].defaults, option.name)
        if values:
            constants[option.name] = values
    return constants


def _options_that_are_set(section: LossSection) -> list[tuple[str, object]]:
    """Options of single losses that differ from their defaults, with their values."""
    default = LossSection()
    names = sorted(frozenset().union(*(row.options for row in LOSSES.values())))
    found = []
    for name in names:
        value = getattr(section, name)
        if value != getattr(default, name):
            found.append((name, value))
    return found


def _misplaced(option: str, value: object, section: LossSection) -> list[str]:
    """Why the option cannot be used with the chosen losses; empty if it can."""
    shown = ",".join(section.names)
    readers, others = [], []
    for name in section.names:
        if option in LOSSES[name].options:
            readers.append(name)
        elif LOSSES[name].divisor == "pairs":
            others.append(name)
    if not readers:
        able = " or ".join(sorted(name for name, row in LOSSES.items() if option in row.options))
        return [
            f"loss.{option}={value}: loss.name={shown} does not read it. "
            f"Leave it out, or use {able}"
        ]
    if option in MODIFIERS and others:
        return [
            f"loss.{option}={value}: {', '.join(others)} of loss.name={shown} cannot take it. "
            "Leave out the one or the other"
        ]
    return []


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"loss.name={name}: no such loss. {hint}Choose from {', '.join(LOSSES)}"
