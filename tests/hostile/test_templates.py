"""Chat templates and messages made to hurt: stopped within a bound, whatever they ask of Python's own code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deepseek_trt.engines.text.limits import SECONDS

# Each renders one template in a child with little memory; the messages hold one text of a million characters.
CHILD = """
import resource, sys, threading, time
from deepseek_trt.engines.text.template import render_chat
from deepseek_trt.engines.text.template_files import ChatTemplate
from deepseek_trt.export.errors import RequestError
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
content = sys.argv[2] * (10**6 // len(sys.argv[2]))
lates, over = [], threading.Event()

def tick():  # another thread of the server, which needs the interpreter
    last = time.monotonic()
    while not over.wait(0.01):
        now = time.monotonic()
        lates.append(now - last)
        last = now

ticker = threading.Thread(target=tick)
ticker.start()
begin = time.monotonic()
try:
    render_chat(ChatTemplate(text=sys.argv[1], place="template"), [{"role": "user", "content": content}] * 4)
    print("rendered")
except RequestError as error:
    print("refused:", error)
took = time.monotonic() - begin
over.set()
ticker.join()
print(f"took {took:.1f} s, held others for {max(lates, default=0):.1f} s", file=sys.stderr)
sys.exit(3 if took > float(sys.argv[3]) else 0)
"""
DOUBLED = (
    "{% set ns = namespace(t=messages[0].content) %}{% for i in range(30) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"
)
C = "messages[0].content"
TEMPLATES = {
    "a text times a number": "{{ 'x' * 3000000000 }}",
    "a number times a text": "{{ 3000000000 * 'x' }}",
    "a list times a number": "{{ [0] * 3000000000 }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop of loops that print": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "a power of a power": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x ** 9 %}{% endfor %}",
    "a long range": "{{ range(10 ** 12) | list }}",
    "doubling": DOUBLED,
    "a recursive macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a width": "{{ '%*d' % (2000000000, 1) }}",
    "a width in words": "{{ '{:>2000000000}'.format(1) }}",
    "a width from a value": "{{ '{:>{}}'.format(1, 2000000000) }}",
    "a precision": "{{ '%.2000000000f' % 1.5 }}",
    "center": "{{ 'x' | center(2000000000) }}",
    "ljust": "{{ 'x'.ljust(2000000000) }}",
    "zfill": "{{ 'x'.zfill(2000000000) }}",
    "indent": f"{{{{ {C} | indent(2000000) }}}}",
    "tojson's indent": "{{ messages | tojson(indent=2000000000) }}",
    "replace": f"{{{{ {C}.replace('a', {C}) }}}}",
    "replace by the filter": f"{{{{ {C} | replace('a', {C}) }}}}",
    "join": f"{{{{ ({C} | list) | join({C}) }}}}",
    "join by the method": f"{{{{ {C}.join({C} | list) }}}}",
    "expandtabs": "{{ ('\\t' * 100000).expandtabs(2000000) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "batch": "{{ [1] | batch(2000000000, 0) | list }}",
    "slice": "{{ [1] | slice(2000000000) | list }}",
    "round": "{{ 1.5 | round(1000000000, 'floor') }}",
    "round to a negative": "{{ 1.5 | round(-1000000000, 'ceil') }}",
    "round by a name": "{{ 1.5 | round(precision=1000000000, method='ceil') }}",
    "striptags": f"{{{{ ('<!--' ~ {C}) | striptags }}}}",
    "striptags of comments": "{{ ('<!-- -->' * 1000000) | striptags }}",
    "urlize": f"{{{{ {C} | urlize }}}}",
    "wordwrap": f"{{{{ {C} | wordwrap(1) }}}}",
    "pprint": f"{{{{ ({C} * 4) | pprint }}}}",
    "title": f"{{% for i in range(9999) %}}{{{{ {C} | title }}}}{{% endfor %}}",
    "truncate": f"{{% for i in range(9999) %}}{{{{ {C} | truncate(900000) }}}}{{% endfor %}}",
    "sort": "{{ ([1] * 4000000) | sort | length }}",
    "sort many times": "{% for i in range(9999) %}{{ range(90000) | sort | length }}{% endfor %}",
    "unique": "{{ ([1] * 4000000) | unique | list | length }}",
    "maps of maps": "{% for i in range(9999) %}{{ range(90000)|map('string')|map('upper')|list|length }}{% endfor %}",
    "selects": "{% for i in range(99999) %}{{ range(90000) | select('odd') | list | length }}{% endfor %}",
    "split": f"{{% for i in range(999) %}}{{% set x = {C}.split('a') %}}{{% endfor %}}",
    "a deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long sum": "{{ " + "+".join(["1"] * 50000) + " }}",
    "many filters": "{{ 'a'" + "|upper" * 20000 + " }}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_stopped(name):
    made = subprocess.run(
        [sys.executable, "-c", CHILD, TEMPLATES[name], "ab <!-- --> \t", str(2 * SECONDS)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, (made.stdout[-500:], made.stderr[-1500:])
    assert made.stdout.startswith("refused:"), made.stdout[:200]
    assert "chat template" in made.stdout


@pytest.mark.parametrize("text", ["a", " ", "\t", "<!--", "{{", "{%", "\\", "]]>", "\x00", "é", "http://a ", "%s{0}"])
def test_hostile_text_in_an_honest_template_is_rendered(text):
    honest = "{% for m in messages %}{{ m.role | title }}: {{ m.content | trim }}{{ m | tojson }}{% endfor %}"
    made = subprocess.run(
        [sys.executable, "-c", CHILD, honest, text.replace("\x00", "\u0001"), str(2 * SECONDS)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (made.returncode, made.stdout) == (0, "rendered\n"), made.stderr[-1500:]
