"""One voice: docstrings in the imperative, messages in one dialect, pages in plain words.

The functions are those of the source beside this file, read as syntax trees; nothing is imported.
"""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("ddim_schedulers", "pipelines", "training")

# A docstring of a function begins with one of these. Another verb may be added; a noun may not.
VERBS = set(
    """
    Serve Add Append Apply Ask Assign Bound Build Calibrate Call Change Check Choose Clip Close
    Compare Compile Compute Continue Convert Copy Count Create Decode Delete Divide Do Draw Drop
    Embed Encode Estimate Evaluate Export Fetch Fill Find Fit Fix Follow Forget Gather Generate
    Give Go Hand Hash Interpolate Join Keep Label Leave Let List Load Log Look Make Map Mark
    Measure Minimise Move Name Note Open Own Plan Plot Predict Prepare Print Push Put Raise Read
    Reconstruct Refine Refuse Rely Remove Replace Restore Return Round Run Sample Save Say Scale
    Send Serve Set Settle Share Shift Show Split Start Stop Store Sum Swap Take Tell Train Turn Undo
    Unpack Update Use Walk Warn Write
    """.split()
)
KINDS = ("ValueError", "TypeError")
# A message begins with a name in backticks; a place in the settings, or a file, may come first.
NAMED = re.compile(r"(?:value(?:: )?)?`[^`]+`:? \w+|(?:(?:[a-z]+|value): )*'?value'?( \w+|\.?$)")
# It says what is allowed, or what to do; or it ends with an error that does.
ALLOWED = re.compile(r"\bmust\b|\ballowed\b|; [a-z`]+ |value\.?$")
# The messages that are others, with the reason.
OTHERS = {
    "ddim_schedulers/archives.py": 1,  # its caller puts the file before it
    "ddim_schedulers/plain_files.py": 1,  # its caller puts the file before it
    "ddim_schedulers/scheduling_ddim_inverse.py": 1,  # Python's own words for an unknown argument
}
# `name is value; it must be ...` without backticks round the name, or a name of several words.
BARE_NAME = re.compile(r"(?:[a-z]\w* (?:is|are) [^;]*; (?:it|they) must|[a-z]+_\w+ )")
RIDDLES = re.compile(
    r"\bstands?\b(?! in\b)|\b(?:is|are) said\b|\bwhat is there\b|\bnone of (?:its|their|our)\b"
    r"|\bat hand\b|\bneeds? a word\b|\bunasked\b|\bbusiness\b"
    r"|\b(?:is|are) what (?:it|they) (?:was|were)\b"
)


def trees():
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def functions(tree):
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def is_imperative(docstring):
    return re.match(r"\w*", docstring)[0] in VERBS


def text_of(node):
    """Return a message with `value` in the place of each inserted value; None if it is no "
    "string."""
    if isinstance(node, ast.JoinedStr):
        parts = (p.value if isinstance(p, ast.Constant) else "value" for p in node.values)
        return "".join(map(str, parts))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def messages(tree):
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) in KINDS and call.args:
            yield node.lineno, text_of(call.args[0])


def test_docstrings_of_functions_are_in_the_imperative():
    seen, wrong = 0, []
    for path, tree in trees():
        for function in functions(tree):
            docstring = ast.get_docstring(function)
            seen += docstring is not None
            public = not function.name.startswith("_") or function.name == "__call__"
            if docstring is not None and public and not is_imperative(docstring):
                wrong.append(f"{path}:{function.lineno}: {docstring.splitlines()[0]}")
    assert seen > 700 and wrong == []


def test_messages_name_the_argument_in_backticks():
    seen, wrong = 0, []
    for path, tree in trees():
        for line, message in messages(tree):
            seen += message is not None
            if message is not None and BARE_NAME.match(message):
                wrong.append(f"{path}:{line}: {message}")
    assert seen > 400 and wrong == []


def test_messages_name_the_argument_and_what_is_allowed():
    seen, wrong = 0, Counter()
    for path, tree in trees():
        for _, message in messages(tree):
            seen += message is not None
            if message is not None and not (NAMED.match(message) and ALLOWED.search(message)):
                wrong[path.as_posix()] += 1
    assert seen > 400 and wrong == OTHERS


def test_pages_are_in_plain_words_and_explain_their_terms():
    for page in [
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]:
        text = page.read_text(encoding="utf-8")
        assert [m[0] for m in RIDDLES.finditer(text)] == [], page.name
        if page.name not in ("glossary.md", "CONTRIBUTING.md"):
            assert "glossary.md)" in text, page.name


def test_other_voices_are_noticed():
    for docstring in ("Returns x.", "The rate.", "(B, C).", "`row` as text.", "Distance of rows."):
        assert not is_imperative(docstring)
    for docstring in ("Return x.", "Evaluate, and print."):
        assert is_imperative(docstring)

    def message(source):
        return next(messages(ast.parse(f"raise ValueError({source})")))[1]

    for source in (
        "f'eta is {x}; it must be 0'",
        "'batch_size needs a number'",
        "f'{a} is 0; it must be 1'",
    ):
        assert BARE_NAME.match(message(source))
    for source in (
        "f'`eta` is {x}; it must be 0'",
        "'--eta is 1; it must be 0'",
        "f'`{a}` is 0; it must be 1'",
    ):
        assert not BARE_NAME.match(message(source))
    for source in (
        "'the array has no labels; name them'",
        "f'{path}: images are {x}'",
        "f'lr is {x}; it must be 0'",
        "f'`lr` is {x}, which is odd'",
    ):
        assert not (NAMED.match(message(source)) and ALLOWED.search(message(source)))
    for source in (
        "f'`lr` is {x}; it must be 0'",
        "f'{where}: `lr` is {x}; it must be 0'",
        "f'{path} holds a token; remove it'",
        "f'`{name}` is {x}: {error}'",
    ):
        assert NAMED.match(message(source)) and ALLOWED.search(message(source))
    assert RIDDLES.search("n stands with every figure") and not RIDDLES.search(
        "it stands in for it"
    )
