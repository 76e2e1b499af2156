"""What `psq schedule` and `psq privacy` print: the numbers of `psq.theory`, in words or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Final

import click

from psq.adam_text import with_adam_text
from psq.errors import ConfigError
from psq.presets import preset
from psq.schedules import Schedule, parse_schedule
from psq.theory import (
    Release,
    ScheduleReport,
    Spent,
    check_recipe,
    classic_sigma,
    sigma_for,
    spent,
)

__all__ = ["print_privacy", "print_schedule"]

COLOURS: Final = {"holds": "green", "stalls": "yellow", "fails": "red"}


def print_schedule(name: str, adam: str | None, lr: str, steps: int, *, as_json: bool) -> None:
    """The sufficient condition of generic Adam for a recipe's settings and a learning rate.

    Raises:
        ConfigError: no such recipe, settings or rate, or a recipe that the condition is not about.
        UsageError: steps out of range.
    """
    recipe = with_adam_text(preset(name), adam)
    report = check_recipe(recipe, _rate_of(lr), steps)
    if report is None:
        why = "has no Adam" if recipe.adam is None else "is AMSGrad, which has another condition"
        msg = f"recipe: {name} {why}: there is no schedule to check"
        raise ConfigError(msg)
    if as_json:
        click.echo(json.dumps(_finite(_report_plain(report)), indent=2))
        return
    verdict = click.style(report.verdict, fg=COLOURS[report.verdict], bold=True)
    click.echo(f"{name}, learning rate {lr}, {steps:,} steps: {verdict}")
    for each in report.conditions:
        shown = click.style(f"{each.verdict:<8}", fg=COLOURS[each.verdict])
        click.echo(f"  {each.name:<11}{shown}{each.words}")
    if report.rate not in ("", "none"):
        click.echo(f"  rate       {report.rate}, up to constants")
    click.echo("The condition is sufficient, not necessary: docs/theory.md says what it means.")


def print_privacy(
    release: Release, delta: float, target: float | None = None, *, as_json: bool
) -> None:
    """What a worker's noisy messages reveal; with a target, of the noise that meets it.

    Raises:
        UsageError: delta or target are none.
    """
    if target is not None:
        sigma = sigma_for(target, delta, clip=release.clip, steps=release.steps)
        release = dataclasses.replace(release, sigma=sigma)
    found = spent(release, delta)
    if as_json:
        plain = {**dataclasses.asdict(release), **dataclasses.asdict(found)}
        click.echo(json.dumps(_finite(plain), indent=2))
        return
    for line in _privacy_lines(release, found):
        click.echo(line)


def _privacy_lines(release: Release, found: Spent) -> list[str]:
    if math.isinf(found.epsilon):
        return ["sigma 0: no noise, nothing is promised (epsilon is infinite)"]
    head = f"clip {release.clip:g}, sigma {release.sigma:.6g}, {release.steps:,} steps"
    lines = [
        f"{head}, delta {found.delta:g}",
        f"  epsilon {found.epsilon:.4g}   by RDP, at order {found.order:.4g}: what psq states",
        f"  epsilon {found.exact:.4g}   exactly, of Gaussian noise: no accountant can go below",
        f"  epsilon {found.one_step:.4g}   exactly, for data that takes part in one step only",
    ]
    if 0.0 < found.one_step < 1.0:
        classic = classic_sigma(release.sensitivity, found.one_step, found.delta)
        lines.append(f"  the classic formula asks for sigma {classic:.4g} for that one step")
    note = (
        "Of one worker's whole contribution, replaced by any other: docs/privacy.md has what this "
        "assumes and what it does not promise."
    )
    return [*lines, note]


def _rate_of(text: str) -> Schedule:
    rate = parse_schedule(text)
    if rate is None:
        msg = (
            "lr: expected a number, power:VALUE:EXPONENT, or the NAME:NUMBER:... of a schedule "
            f"that is registered, got {text!r}"
        )
        raise ConfigError(msg)
    return rate


def _report_plain(report: ScheduleReport) -> dict[str, Any]:
    return {"verdict": report.verdict, **dataclasses.asdict(report)}


def _finite(plain: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: null in its place."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in plain.items()
    }
