"""Numbers out of range: each is an error of the session's, in a process of its own, so that a crash is seen as one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deepseek_trt.engines.sessions.door import Door
from deepseek_trt.export.errors import RequestError

PAGES, PAGE, VOCAB = 12, 8, 256
FAR = 2**31 - 1
# What is changed in the call below, by the name of an input, and a word of the error.
GOOD = "ids=np.full((2, 3), 7, np.int64), new=np.int32([3, 2]), past=np.int32([0, 0]), table=np.int32([[1, 2], [3, 4]])"
PREFILL = {
    "a negative page": ("table=np.int32([[-1, 2], [3, 4]])", "page_table"),
    "a page beyond": ("table=np.int32([[12, 2], [3, 4]])", "page_table"),
    "a page far beyond": (f"table=np.int32([[{FAR}, 2], [3, 4]])", "page_table"),
    "the least page": (f"table=np.int32([[{-(2**31)}, 2], [3, 4]])", "page_table"),
    "an unused page beyond": ("table=np.int32([[1, 99], [3, 4]])", "page_table"),
    "scratch": ("table=np.int32([[0, 2], [3, 4]])", "page_table"),
    "one page twice": ("table=np.int32([[1, 2], [1, 4]])", "page 1 is written"),
    "one page twice in a row": ("past=np.int32([8, 0]), table=np.int32([[1, 1], [3, 4]])", "page 1 is written"),
    "negative past": ("past=np.int32([-1, 0])", "past_lengths"),
    "past beyond the table": ("past=np.int32([14, 0])", "past_lengths"),
    "past far beyond": (f"past=np.int32([{FAR}, 0])", "past_lengths"),
    "no tokens": ("new=np.int32([0, 0])", "sequence_lengths"),
    "negative tokens": ("new=np.int32([-3, 2])", "sequence_lengths"),
    "more tokens than there are": ("new=np.int32([4, 2])", "sequence_lengths"),
    "a negative id": ("ids=np.full((2, 3), -1, np.int64)", "input_ids"),
    "an id beyond": ("ids=np.full((2, 3), 256, np.int64)", "input_ids"),
    "an id far beyond": ("ids=np.full((2, 3), 2**62, np.int64)", "input_ids"),
    "an id beyond in the padding": ("ids=np.int64([[7, 7, 7], [7, 7, 999]])", "input_ids"),
    "no rows": (
        "ids=np.zeros((0, 3), np.int64), new=np.int32([]), past=np.int32([]), table=np.zeros((0, 2), np.int32)",
        "input_ids",
    ),
    "no columns": ("ids=np.zeros((2, 0), np.int64)", "input_ids"),
    "an empty table": ("table=np.zeros((2, 0), np.int32)", "page_table"),
    "ids of int32": ("ids=np.full((2, 3), 7, np.int32)", "input_ids"),
    "ids of float": ("ids=np.full((2, 3), 7.0)", "input_ids"),
    "pages of int64": ("table=np.int64([[1, 2], [3, 4]])", "page_table"),
    "past of uint32": ("past=np.uint32([0, 0])", "past_lengths"),
    "other byte order": ("past=np.array([0, 0], '>i4')", "past_lengths"),
    "a list": ("past=[0, 0]", "past_lengths"),
    "none": ("table=None", "page_table"),
    "objects": ("ids=np.full((2, 3), 7, object)", "input_ids"),
    "fewer rows of past": ("past=np.int32([0])", "rows"),
    "fewer rows of the table": ("table=np.int32([[1, 2]])", "rows"),
    "more rows of lengths": ("new=np.int32([3, 2, 1])", "rows"),
    "a flat table": ("table=np.int32([1, 2])", "page_table"),
    "flat ids": ("ids=np.int64([7, 7])", "input_ids"),
}
DECODE = PREFILL | {
    "nine tokens a row": ("ids=np.full((2, 9), 7, np.int64)", "input_ids"),
    "a row without tokens": ("new=np.int32([3, 0])", "sequence_lengths"),
}
OPEN = {
    "no pages": ("pages=0", "pages"),
    "one page": ("pages=1", "pages"),
    "negative pages": ("pages=-5", "pages"),
    "2^31 pages": ("pages=2**31", "pages"),
    "2^31 - 1 pages": ("pages=2**31 - 1", "memory"),
    "pages of float": ("pages=12.0", "pages"),
    "true pages": ("pages=True", "pages"),
    "negative threads": ("threads=-1", "threads"),
    "10^6 threads": ("threads=10**6", "threads"),
    "2^31 threads": ("threads=2**31", "threads"),
    "true threads": ("threads=True", "threads"),
    "threads of float": ("threads=1.0", "threads"),
}
# All cases of a kind run in one child; what is refused leaves the session as it was.
CHILD = """
import json, os, sys
import numpy as np
from pathlib import Path
from deepseek_trt.engines.sessions.ort import OrtSession
from deepseek_trt.engines.sessions.opening import SessionRequest, open_session
from deepseek_trt.engines.sessions.torch import TorchSession
from deepseek_trt.export.bundle.folder import Bundle
from deepseek_trt.export.errors import DeepseekTrtError

kind, bundle, cases = json.loads(sys.stdin.read())
bundle = Bundle.open(Path(bundle))
KINDS = {
    "compiled": lambda pages=12, threads=1: OrtSession(bundle, pages, threads),
    "as exported": lambda pages=12, threads=1: OrtSession(bundle, pages, threads, compiled=False),
    "torch": lambda pages=12, threads=1: open_session(SessionRequest(bundle, pages, threads), "torch").session,
}
session = KINDS[kind]()
GOOD = "dict(%s)"

def prefill(ids, new, past, table):
    return session.prefill(ids, new, past, table)

def decode(ids, new, past, table):
    return session.decode(ids, new, past, table)

def right(call):
    session.fill(0.0)
    good = eval(GOOD)
    return call(**good).tolist()

def attempt(call, change):
    try:
        if call == "open":
            KINDS[kind](**eval(f"dict({change})"))
        else:
            good = eval(GOOD)
            {"prefill": prefill, "decode": decode}[call](**{**good, **eval(f"dict({change})")})
    except DeepseekTrtError as error:
        return str(error)
    except BaseException as error:
        return f"not ours: {type(error).__name__}: {error}"
    return "it was taken"

before = [right(prefill), right(decode)]
for call, name, change in cases:
    print(json.dumps([call, name, attempt(call, change)]), flush=True)
assert [right(prefill), right(decode)] == before, "the session has changed"
print(json.dumps(["done", "", ""]), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def bundle(small_v2, bundle_of):
    return bundle_of(small_v2.checkpoint, page_size=PAGE)


@pytest.mark.parametrize("kind", ["compiled", "as exported", "torch"])
def test_every_number_out_of_range_is_an_error(bundle, kind):
    tables = {"prefill": PREFILL, "decode": DECODE, "open": OPEN}
    cases = [(call, name, change) for call, table in tables.items() for name, (change, _) in table.items()]
    child = subprocess.run(
        [sys.executable, "-c", CHILD % GOOD],
        input=json.dumps([kind, str(bundle.path), cases]),
        capture_output=True,
        text=True,
        timeout=600,
    )
    answers = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, (answers[-1:], child.stderr[-2000:])
    assert answers.pop() == ["done", "", ""]
    wrong = [a for a in answers if tables[a[0]][a[1]][1] not in a[2] or a[2].startswith("not ours")]
    assert not wrong
    assert len(answers) == len(cases) > 70


def test_arrays_that_are_not_contiguous_are_read_as_they_are(bundle):
    from deepseek_trt.engines.sessions.ort import OrtSession

    session, good = OrtSession(bundle, PAGES, 1), eval(f"dict({GOOD})")
    wide = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in good.items()}
    order = ("ids", "new", "past", "table")
    first = session.prefill(*(good[name] for name in order))
    session.fill(0.0)
    np.testing.assert_array_equal(session.prefill(*(wide[name] for name in order)), first)


def test_the_door_lets_in_what_is_right():
    door = Door(PAGES, PAGE, VOCAB)
    ids, table = np.full((2, 1), 7, np.int64), np.int32([[1, 2, 0], [1, 3, 0]])  # page 1 is full, and shared
    new = np.int32([1, 1])
    for past in range(8, 16):
        door.check_decode(ids, new, np.int32([past, 8]), table)
    with pytest.raises(RequestError, match=r"page_table\[0, 2\] is 0"):
        door.check_decode(ids, new, np.int32([16, 8]), table)
    with pytest.raises(RequestError, match="page 1 is written"):
        door.check_decode(ids, new, np.int32([7, 8]), table)
    door.check_decode(ids, new, np.int32([15, 8]), table)
    several = np.full((2, 8), 7, np.int64)
    door.check_decode(several, np.int32([8, 1]), np.int32([8, 8]), table)
    with pytest.raises(RequestError, match=r"page_table\[0, 2\] is 0"):  # the pages of the last call, one token more
        door.check_decode(several, np.int32([8, 1]), np.int32([9, 8]), table)
    with pytest.raises(RequestError, match=r"past_lengths\[0\] is 17: must lie between 0 and 16 for 8 more in the 3"):
        door.check_decode(several, np.int32([8, 1]), np.int32([17, 8]), table)
    with pytest.raises(RequestError, match=r"input_ids\[1, 0\] is 256"):  # on pages that are known to be right
        door.check_decode(np.int64([[7], [256]]), new, np.int32([15, 8]), table)
    for past in (9, 0):  # of a row that rests
        door.check_prefill(np.full((2, 4), 7, np.int64), np.int32([4, 0]), np.int32([8, past]), table)


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        (np.zeros((1, 2, 5), np.float32), r"float32 \[1, 2, 5\]: give a numpy array of float32 \[1, 2, 6\]"),
        (np.zeros((1, 2, 6)), "float64"),
        (np.zeros((1, 6), np.float32), "give a numpy array"),
        ([[[0.0]]], "list"),
    ],
)
def test_the_door_looks_at_hidden_states(hidden, words):
    door = Door(PAGES, PAGE, VOCAB, 6)
    rest = np.int32([2]), np.int32([0]), np.int32([[1]])
    ids = np.full((1, 2), 7, np.int64)
    door.check_draft(ids, np.zeros((1, 2, 6), np.float32), *rest)
    with pytest.raises(RequestError, match=f"hidden is .*{words}"):
        door.check_draft(ids, hidden, *rest)
    with pytest.raises(RequestError, match=r"input_ids\[0, 0\]"):
        door.check_draft(ids + VOCAB, np.zeros((1, 2, 6), np.float32), *rest)


CHANGES = ["page_table", "negative", "past_lengths", "negative length", "rows", "lengths"]


@pytest.mark.parametrize("change", [*CHANGES, "new tokens", "new tokens beyond the table", "negative new tokens"])
def test_the_compiled_operators_check_once_more(bundle, change):
    """As whoever runs the graph without our session meets them."""
    script = Path(__file__).with_name("raw_graph.py")
    child = subprocess.run(
        [sys.executable, str(script), str(bundle.path), change], capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert "refused" in child.stdout


@pytest.mark.parametrize("attribute", ["top_k", "groups", "top_groups", "activation"])
def test_attributes_of_compiled_operators_are_checked(bundle, attribute):
    script = Path(__file__).with_name("raw_graph.py")
    child = subprocess.run(
        [sys.executable, str(script), str(bundle.path), f"attribute {attribute}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert "refused" in child.stdout
