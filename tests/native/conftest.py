from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, the same one in all of its processes."""
    folder = tmp_path_factory.getbasetemp()
    # Under pytest-xdist every process has a folder below that of the run.
    folder = (folder.parent if folder.name.startswith("popen-") else folder) / "native"
    folder.mkdir(exist_ok=True)
    return folder
