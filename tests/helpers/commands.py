"""The command line in this process: what the console script does, without the seconds that its imports take."""

import contextlib
import io
import os
import subprocess
import sys
import warnings
from unittest import mock

from stripedrag.eval.cli import main


def called(*arguments, env=None, cwd=None):
    """What the console script does with these arguments, as `subprocess.run` would tell it."""
    command = ["stripedrag", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd or "."),
        mock.patch.object(sys, "argv", command),
        mock.patch.object(sys.modules["__main__"], "__package__", None),  # usage names the script, not this program
        mock.patch.dict(os.environ, env or {}),
        warnings.catch_warnings(),
    ):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
