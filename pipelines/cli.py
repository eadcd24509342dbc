"""The `aegan` command."""

import os
import sys

from pipelines.base.errors import UserError, run_stage

USAGE = "usage: aegan submit | doctor [--help]"


def main() -> None:
    try:
        run_stage(_main)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _main() -> None:
    match sys.argv[1:]:
        case ["submit", *arguments]:
            from pipelines import submit  # which loads Ray

            submit.main(arguments)
        case ["doctor", *arguments]:
            from pipelines.project import doctor

            doctor.main(arguments)
        case ["--help" | "-h"]:
            print(USAGE)
        case _:
            raise UserError(USAGE)


if __name__ == "__main__":
    main()
