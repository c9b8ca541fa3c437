"""``batchnorm doctor``: runs a model on data, and diagnoses its batch norms."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from batchnorm.cli.inspection import (
    UNUSABLE,
    Baseline,
    Explain,
    Fail,
    FailOn,
    Force,
    Form,
    Format,
    Ignore,
    Language,
    Layers,
    Out,
    Select,
    Tongue,
    reports,
    spaced,
    words,
    written,
)
from batchnorm.cli.models import THING, Checkpoint, Model
from batchnorm.cli.telling import complain, show

if TYPE_CHECKING:
    from batchnorm.diagnosis.commands import Job
    from batchnorm.diagnosis.result import Diagnosis

INTERRUPTED = 130

Data = Annotated[str, typer.Option(help="Batches, or a function that returns them.", metavar=THING)]
Maker = Annotated[
    str | None,
    typer.Option(help="An optimizer, or a function of the model that returns one.", metavar=THING),
]
Forward = Annotated[str | None, typer.Option(help="forward(model, batch).", metavar=THING)]
Loss = Annotated[str | None, typer.Option(help="loss(output, batch), for --steps.", metavar=THING)]
Steps = Annotated[int, typer.Option(min=0, help="Training steps of a copy, for rules BN9.")]
Graphs = Annotated[
    bool, typer.Option("--graphs", help="Compile and export the model, and compare.")
]
Fix = Annotated[
    bool,
    typer.Option("--fix", help="Repair the statistics and write the repaired checkpoint to --out."),
]


def doctor(
    model: Model,
    data: Data,
    checkpoint: Checkpoint = None,
    optimizer: Maker = None,
    forward: Forward = None,
    loss: Loss = None,
    steps: Steps = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    max_batches: Annotated[int, typer.Option(min=1, help="Most batches that are read.")] = 64,
    graphs: Graphs = False,
    select: Select = None,
    ignore: Ignore = None,
    baseline: Baseline = None,
    fail_on: Fail = FailOn.WARNING,
    form: Form = Format.TEXT,
    language: Tongue = Language.EN,
    out: Out = None,
    force: Force = False,
    layers: Layers = False,
    fix: Fix = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
    explain: Explain = None,  # noqa: ARG001 (its callback answers before anything else is done)
) -> None:
    """Run a model on data, and name what is wrong with its batch norms and what to do.

    Exit status: 0 nothing of the severity --fail-on was found, 1 something was, 2 an option, the
    model or the data cannot be used, 130 after Ctrl-C. What was measured before is shown.
    """
    from batchnorm.diagnosis.commands import Job, check_fix
    from batchnorm.diagnosis.diagnose import Plan
    from batchnorm.files import check_output

    plan = Plan(tuple(words(select)), tuple(words(ignore)), max_batches, graphs, steps=steps)
    job = Job(model, data, checkpoint, forward, optimizer, loss, device, baseline, plan)
    try:
        if fix:
            check_fix(job, out, force)
        elif out is not None:
            check_output(out, force)
        status = _examine(job, _Shown(form, language, out, layers, fix), fail_on, debug)
    except KeyboardInterrupt:
        complain("interrupted; nothing was measured")
        status = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        complain(str(error) or type(error).__name__)
        raise typer.Exit(UNUSABLE) from error
    raise typer.Exit(status)


class _Shown(NamedTuple):
    """How findings are shown, and whether ``out`` is for a fixed checkpoint."""

    form: Format
    language: Language
    out: Path | None
    layers: bool
    fix: bool


def _examine(job: "Job", how: _Shown, fail_on: FailOn, debug: bool) -> int:
    """Run the diagnosis, show the results so far, and return the exit status."""
    from batchnorm.diagnosis.commands import Doctor

    prepared = Doctor(job)
    prepared.examination.run()
    found = prepared.diagnosis()
    if how.fix and prepared.examination.error is None:
        assert how.out is not None
        fixed = prepared.fix(found, how.out)
        found, before = fixed.after, found
        if how.form is Format.TEXT:
            _tell([before], job, how)
            show("", fixed.section(before), "", how.out)
        else:
            _tell([before, found], job, how)
    else:
        _tell([found], job, how)
    examination = prepared.examination
    if examination.error is None:
        failed = fail_on is not FailOn.NEVER and found.at_least(fail_on.value)
        return int(bool(failed))
    complain(f"{examination.reason()}; what is shown was measured before")
    if isinstance(examination.error, KeyboardInterrupt):
        return INTERRUPTED
    if debug:
        raise examination.error
    return UNUSABLE


def _tell(found: "list[Diagnosis]", job: "Job", how: _Shown) -> None:
    from batchnorm.diagnosis.registry import ALL, chosen
    from batchnorm.files import write_atomically

    rules = chosen(job.plan.select, job.plan.ignore, ALL)
    if how.out is not None and not how.fix:
        write_atomically(how.out, written(found, how.form, how.layers, rules, how.language))
    elif how.form is Format.TEXT:
        show(*spaced(reports(found, how.layers, how.language)))
    else:
        show(written(found, how.form, how.layers, rules, how.language).rstrip("\n"))
