"""Starting waits for nothing heavy: neither the import nor the command's help loads a numerical library."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "pydantic")
IMPORT = "import tutelage"
HELP = """
import contextlib, io
from tutelage.cli import main
sys.argv = ["tutelage", "--help"]
shown = io.StringIO()
with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
    main()
assert "resume" in shown.getvalue(), shown.getvalue()
"""


@pytest.mark.parametrize("code", [IMPORT, HELP], ids=["import", "help"])
def test_nothing_heavy_is_loaded(code: str) -> None:
    report = f"import sys\n{code}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [], done.stdout
    assert done.stderr == ""
