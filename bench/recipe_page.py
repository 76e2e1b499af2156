"""Writes what can be computed into docs/recipes.md: each recipe's parts, bits, state and trap.

    python bench/recipe_page.py             after a change of a recipe, or of what it costs
    python bench/recipe_page.py --check     say so, and end with 1, if the page is out of date

Words that explain are written by hand. Below each heading that names a recipe, the quoted lines are
this script's, made of what `psq recipes --json` prints; so is what stands between marks: a table of
all recipes, and pieces of examples/fedgen.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from psq.presets import PRESETS
from psq_worker.recipe_pages import recipe_plain

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "recipes.md"
EXAMPLE: Final = ROOT / "examples" / "fedgen"
END: Final = "<!-- end -->"
TABLE: Final = "made by bench/recipe_page.py"
HEADING: Final = re.compile(r"^### `([a-z0-9-]+)`\n\n((?:>.*\n)*\n*)", re.MULTILINE)

Plain = Mapping[str, Any]


def bits_of(plain: Plain, way: str) -> str:
    value = plain["bits"][way]
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def changed(part: Plain) -> str:
    """A part's kind, with the options that say something."""
    given = {k: v for k, v in part["options"].items() if v not in (0, False, "")}
    words = ", ".join(f"{k}={str(v).lower() if v is True else v}" for k, v in given.items())
    return f"{part['kind']}({words})" if words else str(part["kind"])


def chain(plain: Plain) -> str:
    """The five parts, in a line."""
    direction, up, down = (plain["parts"][name] for name in ("direction", "uplink", "downlink"))
    steps = f" x {direction['local_steps']}" if direction["local_steps"] > 1 else ""
    links = [
        f"{'' if link is up else link['kind'] + ' '}{link['codec']}"
        + ("" if link["choice"]["kind"] == "fixed" else f" / {changed(link['choice'])}")
        + (" + feedback" if link["error_feedback"] else "")
        for link in (up, down)
    ]
    aggregate, apply = (changed(plain["parts"][name]) for name in ("aggregate", "apply"))
    return " > ".join((f"{changed(direction)}{steps}", links[0], aggregate, apply, links[1]))


def facts(plain: Plain) -> str:
    """The quoted lines of a section."""
    state = plain["bytes"]
    return (
        f"> `{chain(plain)}`<br>\n"
        f"> {bits_of(plain, 'up')} bits up, {bits_of(plain, 'down')} down; per parameter "
        f"{state['worker']:g} bytes of state on a worker, {state['server']:g} on the server. "
        f"{sentence(plain['source'])}<br>\n"
        f"> Trap: {plain['trap']}.<br>\n"
        f"> Begin with: {plain['suggested']}.\n"
    )


def table(listed: Sequence[Plain]) -> str:
    """All recipes, a row each."""
    rows = [
        f"| [`{each['name']}`](#{each['name']}) | {bits_of(each, 'up')} | {bits_of(each, 'down')} "
        f"| {each['bytes']['worker']:g} | {each['bytes']['server']:g} | {each['trap']} |"
        for each in listed
    ]
    head = (
        "| `--recipe` | bits up | bits down | bytes on a worker | on the server | trap |",
        "|---|--:|--:|--:|--:|---|",
    )
    return "\n".join((*head, *rows))


def pieces() -> dict[str, str]:
    """What the page shows of the example, by its mark."""
    source = (EXAMPLE / "fedgen.py").read_text(encoding="utf-8")
    project = (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")
    rule, _, rest = source.partition("class Teacher")[2].partition("TEACHER = ")
    part, _, recipe = rest.partition("def make")
    points = project.partition("[project.entry-points")[2].partition("[tool.")[0]
    return {
        "fedgen: rule": code("python", f"class Teacher{rule}"),
        "fedgen: part": code("python", f"TEACHER = {part}"),
        "fedgen: recipe": code("python", f"def make{recipe}"),
        "fedgen: entry points": code("toml", f"[project.entry-points{points}"),
    }


def code(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def filled(page: str, mark: str, text: str) -> str:
    """The page with this text between a mark and the end that follows.

    Raises:
        ValueError: there is no such mark.
    """
    begin = f"<!-- {mark} -->"
    before, found, rest = page.partition(begin)
    after = rest.partition(END)[2]
    if not found or not after:
        msg = f"docs/recipes.md: expected {begin} and {END} after it"
        raise ValueError(msg)
    return f"{before}{begin}\n\n{text}\n\n{END}{after}"


def renewed(page: str, listed: Sequence[Plain]) -> str:
    """The page with all that is computed put in anew.

    Raises:
        ValueError: a recipe has no section, a section no recipe, or a mark lacks.
    """
    by_name = {each["name"]: each for each in listed}
    described = [match[1] for match in HEADING.finditer(page)]
    if sorted(described) != sorted(by_name):
        apart = sorted(set(described) ^ set(by_name)) or described
        msg = f"docs/recipes.md: a section for each recipe, once: look at {', '.join(apart)}"
        raise ValueError(msg)
    for mark, text in {TABLE: table(listed), **pieces()}.items():
        page = filled(page, mark, text)
    return HEADING.sub(lambda match: f"### `{match[1]}`\n\n{facts(by_name[match[1]])}\n", page)


def own() -> Iterator[Plain]:
    """psq's own recipes: others may be installed, and are not described here."""
    for name in PRESETS:
        yield recipe_plain(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    made = renewed(page, list(own()))
    if given.check:
        print("docs/recipes.md is " + ("as it should be" if made == page else "out of date"))
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
