import os
import subprocess
import sys

from tests.project import ROOT

STAGE = """
from pipelines.base.errors import UserError, run_stage

def main():
    print("what stands in a buffer")
    raise UserError("the cure")

run_stage(main)
"""


def test_a_users_error_is_the_last_line_also_where_output_is_one_file():
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    ended = subprocess.run(
        [sys.executable, "-c", STAGE],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ended.stdout.splitlines() == ["what stands in a buffer", "error: the cure"]
    assert ended.returncode == 1
