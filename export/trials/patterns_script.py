"""Run by itself, within limits: match every pattern against every name, both from stdin as JSON.

An adapter's patterns are foreign code: some look back for ever, and Python's matching has no limit of its own.
"""

import json
import re
import resource
import sys


def main() -> None:
    seconds, memory = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_CPU, seconds)
    _limit(resource.RLIMIT_AS, memory)
    given = json.load(sys.stdin)
    for pattern in given["patterns"]:
        for name in given["names"]:
            re.match(pattern, name)
            re.fullmatch(pattern, name)


def _limit(kind: int, most: int) -> None:
    """No higher than it is: nobody may raise it."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, hard))


if __name__ == "__main__":
    main()
