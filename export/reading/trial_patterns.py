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
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    given = json.load(sys.stdin)
    for pattern in given["patterns"]:
        for name in given["names"]:
            re.match(pattern, name)
            re.fullmatch(pattern, name)


if __name__ == "__main__":
    main()
