"""Break the source on purpose, one mutant at a time, and show the test that notices.

    make mutants                          all of them, two at a time, in a temporary copy
    make mutants ARGS="--only fold_lora"  those whose part, fault or file contains a text
    make mutants ARGS="--list"            what there is

Ends with 1 where a mutant survives, with 2 where the check cannot run: a mutant whose text is not
found any more, or a test that fails without any mutant.
"""

from __future__ import annotations

import sys

from mutation_command import main

if __name__ == "__main__":
    sys.exit(main())
