"""Which version of a package is installed, for tests of what older ones cannot do."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def older(package: str, than: str) -> bool:
    """Say whether the installed package is older than a version."""
    return Version(version(package)) < Version(than)


def needs_transformers(than: str, why: str) -> pytest.MarkDecorator:
    """Skip a test on transformers that is older, saying what that one does."""
    return pytest.mark.skipif(older("transformers", than), reason=f"transformers before {than} {why}")
