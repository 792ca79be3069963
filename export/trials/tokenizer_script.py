"""Run by itself, within limits: load a tokenizer.json, and encode and decode texts with it.

stdin: one line of JSON with the tokens to add and the texts, then the file's bytes. What the library refuses with an
exception is left to who loads it; a panic of its Rust code, and texts that become too many tokens, are said on stdout.
"""

import json
import os
import resource
import sys

REFUSED = 3  # the exit code
_MOST_TOKENS = 16  # for each character of a text: a character is four bytes at most
_FREE = 1024  # and beside them


def main() -> None:
    seconds, memory = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_CPU, seconds)
    _limit(resource.RLIMIT_AS, memory)
    given = json.loads(sys.stdin.buffer.readline())
    try:
        _try(sys.stdin.buffer.read(), given)
    except MemoryError:
        _refuse("it takes too much memory")
    except Exception:  # whoever loads it meets the same, and says it
        return
    except BaseException as panic:
        _refuse(f"the tokenizers library panics: {panic}")


def _try(data: bytes, given: dict) -> None:  # type: ignore[type-arg]
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_buffer(data)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = given["split_special"]
    tokenizer.add_tokens([AddedToken(**token) for token in given["tokens"]])
    for text in given["texts"]:
        for special in (False, True):
            try:
                ids = tokenizer.encode(text, add_special_tokens=special).ids
                if len(ids) > _MOST_TOKENS * len(text) + _FREE:
                    _refuse(f"it makes {len(ids)} tokens of a text of {len(text)} characters")
                tokenizer.decode(ids)
            except MemoryError:
                raise
            except Exception:  # what a vocabulary without <unk> does not hold
                continue


def _refuse(reason: str) -> None:
    print(reason)
    sys.stdout.flush()
    os._exit(REFUSED)  # nothing of the library runs any more


def _limit(kind: int, most: int) -> None:
    """No higher than it is: nobody may raise it."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, hard))


if __name__ == "__main__":
    main()
