"""``batchnorm inspect``: checks checkpoints without the code of their models."""

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchnorm.cli.telling import complain, show

if TYPE_CHECKING:
    from batchnorm.diagnosis.result import Diagnosis
    from batchnorm.diagnosis.rule import Rule
    from batchnorm.report.model import Report

UNUSABLE = 2
# Maximum number of listed findings per rule without --layers.
MOST_OF_A_RULE = 10


class Format(enum.Enum):
    """The formats in which findings are written."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"
    SARIF = "sarif"
    HTML = "html"


class Language(enum.Enum):
    """The languages of reports."""

    EN = "en"
    ZH = "zh"


class FailOn(enum.Enum):
    """The least severity that makes the exit status 1."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    NEVER = "never"


def _explain(identifier: str | None) -> None:
    if identifier is None:
        return
    from batchnorm.diagnosis.registry import rule_of
    from batchnorm.errors import OptionError

    try:
        show(rule_of(identifier).explained())
    except OptionError as error:
        complain(str(error))
        raise typer.Exit(UNUSABLE) from error
    raise typer.Exit


Checkpoints = Annotated[
    list[Path],
    typer.Argument(
        help=".safetensors, .pt, .pth or .onnx files, indexes of shards, or folders with one."
    ),
]
Select = Annotated[
    list[str] | None, typer.Option(help="Rules to judge by, as BN101 or BN1,BN402; repeat.")
]
Ignore = Annotated[list[str] | None, typer.Option(help="Rules to leave out, likewise.")]
Baseline = Annotated[
    Path | None,
    typer.Option(help="What --format json wrote earlier; its findings are left out."),
]
Fail = Annotated[FailOn, typer.Option(help="The least severity that makes the exit status 1.")]
Form = Annotated[Format, typer.Option("--format", help="How findings are written.")]
Tongue = Annotated[
    Language,
    typer.Option("--language", help="Of text, Markdown and pages: English or Chinese."),
]
Out = Annotated[Path | None, typer.Option(help="File to write instead of printing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]
Layers = Annotated[
    bool, typer.Option("--layers", help="With a table of all layers, and every finding.")
]
Explain = Annotated[
    str | None,
    typer.Option(
        help="Print what a rule means, and stop.",
        metavar="RULE",
        callback=_explain,
        is_eager=True,
    ),
]


def inspect(
    checkpoints: Checkpoints,
    select: Select = None,
    ignore: Ignore = None,
    baseline: Baseline = None,
    fail_on: Fail = FailOn.WARNING,
    form: Form = Format.TEXT,
    language: Tongue = Language.EN,
    out: Out = None,
    force: Force = False,
    layers: Layers = False,
    explain: Explain = None,  # noqa: ARG001 (its callback answers before anything else is done)
) -> None:
    """Find broken batch norms in checkpoints, without the model's code; none in files is run.

    Exit status: 0 nothing of the severity --fail-on was found, 1 something was, 2 a checkpoint or
    an option cannot be used.
    """
    from batchnorm.diagnosis.inspect import read_baseline
    from batchnorm.diagnosis.registry import chosen as choose
    from batchnorm.errors import BatchNormError
    from batchnorm.files import check_output, write_atomically

    chosen = {"select": words(select), "ignore": words(ignore)}
    try:
        if out is not None:
            check_output(out, force)
        if baseline is not None:
            read_baseline(baseline)
        rules = choose(chosen["select"], chosen["ignore"])
        done = [_judged(path, baseline, chosen) for path in checkpoints]
        usable = [one for one in done if one is not None]
        if not usable and form is Format.HTML:
            pass  # the reason has been printed for each checkpoint
        elif out is not None:
            write_atomically(out, written(usable, form, layers, rules, language))
        elif form is Format.TEXT:
            show(*spaced(reports(usable, layers, language)))
        elif usable:
            show(written(usable, form, layers, rules, language).rstrip("\n"))
    except (BatchNormError, OSError) as error:
        complain(str(error))
        raise typer.Exit(UNUSABLE) from error
    except KeyboardInterrupt:
        complain("interrupted; nothing was written")
        raise typer.Exit(130) from None
    failed = fail_on is not FailOn.NEVER and any(one.at_least(fail_on.value) for one in usable)
    raise typer.Exit(UNUSABLE if None in done else int(failed))


def _judged(path: Path, baseline: Path | None, chosen: dict[str, list[str]]) -> "Diagnosis | None":
    """Return the diagnosis of one checkpoint; print the reason if it is not possible."""
    from batchnorm.diagnosis.inspect import inspect as judge
    from batchnorm.errors import CheckpointError, MissingExtraError

    try:
        return judge(path, baseline=baseline, **chosen)
    except (CheckpointError, MissingExtraError, OSError) as error:
        complain(_naming(str(error), path))
        return None


def written(
    done: "list[Diagnosis]",
    form: Format,
    layers: bool,
    rules: "Sequence[Rule[Any]]",
    language: Language = Language.EN,
) -> str:
    """Return all diagnoses as text in a format; a page has only one diagnosis.

    Raises:
        OptionError: If the format is a page and there are several diagnoses.
    """
    from batchnorm.diagnosis.result import to_json
    from batchnorm.diagnosis.sarif import to_sarif
    from batchnorm.report.markdown import to_markdown
    from batchnorm.report.terminal import to_text

    if form is Format.JSON:
        return to_json(done)
    if form is Format.SARIF:
        return to_sarif(done, rules)
    if form is Format.HTML:
        return _page(done, language)
    shown = reports(done, layers, language)
    if form is Format.MARKDOWN:
        return "\n".join(map(to_markdown, shown))
    return "\n\n".join(map(to_text, shown)) + "\n"


def _page(done: "list[Diagnosis]", language: Language) -> str:
    from batchnorm.diagnosis.channels import page_of
    from batchnorm.errors import MissingExtraError, OptionError

    if len(done) != 1:
        raise OptionError(f"expected one diagnosis for a page, got {len(done)}")
    try:
        from batchnorm.report.html import to_html
    except ImportError as error:
        raise MissingExtraError(
            f"a page needs the package {error.name}; pip install 'batchnorm[demo]'"
        ) from error
    (found,) = done
    path = Path(found.subject)
    return to_html(page_of(found, path if path.exists() else None, language.value))


def reports(done: "list[Diagnosis]", layers: bool, language: Language) -> "list[Report]":
    """Return a report of each diagnosis, shortened without ``layers``."""
    most = None if layers else MOST_OF_A_RULE
    return [one.report(layers, most, language.value) for one in done]


def spaced(things: "list[Report]") -> "list[Report | str]":
    """Return reports with an empty line between them."""
    return [part for thing in things for part in (thing, "")][:-1]


def words(given: list[str] | None) -> list[str]:
    """Return the rules of an option, which may be repeated and have commas."""
    return [word.strip().upper() for part in given or [] for word in part.split(",")]


def _naming(message: str, path: Path) -> str:
    """Return a message with the file's name, which messages of the operating system may lack."""
    return message if str(path) in message else f"{path}: {message}"
