"""Finishes `.venv` after the packages are installed: `python -m pipelines.project.environment`.

The environment sees this project's code, knows its commands, and goes on working after the folder
was moved, renamed or copied: nothing in it names the place where it was made.
"""

import re
import sys
import sysconfig
from pathlib import Path

# Lines that Python runs at every start, whoever starts it: no tool reports home or writes there.
STARTUP = """\
import os, sys; sys.path.append(os.path.dirname(sys.prefix))
import os; os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
import os; os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import os; os.environ.setdefault("DVC_NO_ANALYTICS", "1")
import os, sys; os.environ.setdefault("MPLCONFIGDIR", os.path.join(sys.prefix, "matplotlib"))
"""
# A shell finds the Python beside the script, which Python then reads from the third line on.
HEADER = """\
#!/bin/sh
'''exec' "$(dirname -- "$(realpath -- "$0")")/python" "$0" "$@"
' '''
"""
OLD_HEADER = re.compile(r"\A#!(/bin/sh\n'''exec' .*\n' '''|.*/python[\d.]*)\n")
COMMANDS = {"aegan": "pipelines.cli", "dvc": "pipelines.project.dvc_command"}


def main() -> None:
    (Path(sysconfig.get_path("purelib")) / "aegan.pth").write_text(STARTUP, encoding="utf-8")
    scripts = Path(sys.prefix) / "bin"
    for name, module in COMMANDS.items():
        text = f'{HEADER}from {module} import main\n\nif __name__ == "__main__":\n    main()\n'
        (scripts / name).unlink(missing_ok=True)
        (scripts / name).write_text(text, encoding="utf-8")
        (scripts / name).chmod(0o755)
    for script in scripts.iterdir():
        if script.is_file() and not script.is_symlink() and script.read_bytes()[:2] == b"#!":
            text = script.read_text(encoding="utf-8")
            script.write_text(OLD_HEADER.sub(lambda _: HEADER, text, count=1), encoding="utf-8")


if __name__ == "__main__":
    main()
