"""Golden values: what this code computes is what was committed, number by number.

On the processor that `golden.json` was made on, with the same versions, every value has to be the same to 1e-6.
Elsewhere the last digits differ, and what depends on where a fit stops amplifies them: there the selections, the store
and the linear head, where nothing was chosen by a fit, have to be the same to 1e-3, and the MLP is not compared at all
(`golden.robust`). `golden.py` says how to remake the file.
"""

import os
import pathlib
import subprocess
import sys

import golden
import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_values_are_the_committed_ones(tmp_path):
    there, old = golden.read(HERE / "golden.json")
    # By itself, since the number of cores, the flags and the checks of this process are not those of the recording.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    made = subprocess.run(
        [sys.executable, HERE / "golden.py", tmp_path / "now.json"], capture_output=True, text=True, env=environment
    )
    assert made.returncode == 0, made.stderr
    here, new = golden.read(tmp_path / "now.json")
    tolerance = golden.TOLERANCE
    if here != there:
        old, new = ({name: values[name] for name in values if golden.robust(name)} for values in (old, new))
        tolerance = golden.ELSEWHERE
    lines = "\n".join(golden.compared(old, new))
    assert old
    assert not golden.differing(old, new, tolerance), lines
