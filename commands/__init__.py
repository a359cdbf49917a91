"""Subcommands of the `diptych` command line, one file each.

A subcommand module has `add_parser(subparsers)`, which ends with `parser.set_defaults(run=run)`, and
`run(args)`, which prints words for people, shows progress by `progress.Bar`, and returns what it made by name
(`answers.py`). Add a new one to `modules()`; other files here are their helpers.
"""

from __future__ import annotations

from types import ModuleType


def modules() -> list[ModuleType]:
    """The subcommand modules, in the order of the help text."""
    from . import (
        caption,
        completion,
        docs,
        doctor,
        edit,
        generate,
        glid,
        grpo,
        inpaint,
        merge_inpaint,
        outpaint,
        powerpaint,
        precompute,
        report,
        resize,
        score,
        train,
        web,
    )

    makers = [edit, outpaint, inpaint, generate, caption, web, train, grpo, report, precompute, score]
    return [*makers, resize, merge_inpaint, powerpaint, glid, doctor, docs, completion]
