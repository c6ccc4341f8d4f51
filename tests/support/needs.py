"""What of the system a test needs: without it the test is skipped, and the line says what for.

With CI=true nothing may be skipped: there a missing command fails the test file. `.ci/need`
installs them where it may.
"""

from __future__ import annotations

import os
import shutil

import pytest

IN_CI = os.environ.get("CI") == "true"


def needs(*commands: str) -> pytest.MarkDecorator:
    """Marks a test, or a module's ``pytestmark``: it runs these commands."""
    missing = " ".join(command for command in commands if shutil.which(command) is None)
    reason = f"needs {missing} (.ci/need {missing})"
    if missing and IN_CI:
        pytest.fail(reason, pytrace=False)
    return pytest.mark.skipif(bool(missing), reason=reason)
