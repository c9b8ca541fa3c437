"""The entry point: imports the commands' packages and reports a missing package in one line."""

import os
import sys

# Import names of the packages that `pip install 'batchnorm[demo]'` brings.
EXTRA = {"typer", "rich", "matplotlib", "jinja2", "markupsafe", "sklearn", "safetensors", "numpy"}
MISSING = "batchnorm: the package '{}' is missing; pip install 'batchnorm[demo]' brings it\n"


def main() -> int:
    """Run the command line; return its exit code, 2 where a package is missing, 130 on Ctrl-C."""
    code = _run()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # At exit, threads of torch.distributed abort one process in ten or twenty. All work is done
        # and all files are closed here, so exit without the interpreter's shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run() -> int:
    try:
        # Imported here, so that a missing package is reported in one line, without a traceback.
        from batchnorm.cli.app import app

        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        sys.stderr.write(MISSING.format(missing))
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("batchnorm: interrupted\n")
        return 130
    return 0
