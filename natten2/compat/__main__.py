"""`python -m natten2.compat script.py ...`: runs a program for which `import natten` means natten2."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from natten2.compat import VERSIONS, install


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m natten2.compat", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", choices=VERSIONS, help="the generation of natten that the program is written for")
    parser.add_argument("-m", dest="is_module", action="store_true", help="the program is a module, as for python -m")
    parser.add_argument("program", metavar="script.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed on to the program")
    options = parser.parse_args(arguments)
    install(options.version)
    sys.argv = [options.program, *options.arguments]
    if options.is_module:
        sys.path.insert(0, "")
        runpy.run_module(options.program, run_name="__main__", alter_sys=True)
        return
    if not Path(options.program).is_file():
        parser.error(f"there is no file {options.program}")
    sys.path.insert(0, str(Path(options.program).resolve().parent))
    runpy.run_path(options.program, run_name="__main__")


if __name__ == "__main__":
    main()
