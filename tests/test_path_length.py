"""How many functions of the package lie on the way from `load` to an answer: what a reader has to follow.

Counted are functions and methods (properties among them) that are defined in the package and called, each once; not
class bodies, lambdas, comprehensions and what dataclasses generate. All modules of the path are imported before.
"""

import json
import subprocess
import sys

PROGRAM = """
import json, os, sys
import fewstep, fewstep.engine.language_model

home = os.path.dirname(fewstep.__file__)
called = {"load": set(), "generate": set(), "round": set()}
phase = "load"

def note(frame, event, _):
    code = frame.f_code
    is_function = code.co_flags & 1 and not code.co_name.startswith("<")  # a class body has no locals of its own
    if event == "call" and is_function and code.co_filename.startswith(home):
        called[phase].add(f"{os.path.relpath(code.co_filename, home)}:{code.co_qualname}")

question = "Tom has 3 boxes of 12 pens. He gives away 8 pens. How many pens are left?"
sys.setprofile(note)
lm = fewstep.load("gsm-student", device="cpu")
plain = {"engine": "off"}
phase = "generate"
lm.generate(question, max_new_tokens=32, **plain)
sys.setprofile(None)
stream = iter(lm.stream(question, max_new_tokens=96, **plain))
while next(stream).step < 3:
    pass
phase = "round"
sys.setprofile(note)
while next(stream).step < 7:
    pass
sys.setprofile(None)
print(json.dumps({name: sorted(functions) for name, functions in called.items()}))
"""


def test_few_functions_lie_on_the_way_from_load_to_an_answer() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    called = {name: set(functions) for name, functions in json.loads(done.stdout).items()}
    assert len(called["round"]) < 90, sorted(called["round"])
    # Many of these check what strangers' checkpoints, templates and settings may hold; make it fewer, not more.
    assert len(called["load"] | called["generate"]) <= 195, sorted(called["load"] | called["generate"])
