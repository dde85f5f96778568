#!/usr/bin/env bash
# dynamicprompts 0.31.0, the template language of the WebUI's extension and of many scripts
#
# Expected: a plain prompt is a valid template and comes out as it is. The README's overview gives braces and double
#   underscores their meaning, and "# Add comments like this" as a line of its own; of % and $ it says nothing there.
# Seen: a plain prompt with a per cent or dollar sign is a syntax error (pyparsing's ParseException, for the whole
#   prompt), a colour such as #ff8800 cuts the rest of the line away in silence, and no backslash saves any of them.
# Why: dynamicprompts/parser/parse.py, _configure_literal_sequence: `$` begins a variable and `%` a wrap command, so
#   neither may stand in a literal; `#` begins a comment anywhere in a line.
# Output:
#   'a jumper, 100% wool'                 ParseException
#   'a jumper, 100\\% wool'               ParseException
#   'a sign "only $5"'                    ParseException
#   'a car, #ff8800 paint, night'         'a car, '
#   'a car, \\#ff8800 paint, night'       'a car, \\'
#   'a car (orange:1.2), [day:night:0.5]' 'a car (orange:1.2), [day:night:0.5]'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq dynamicprompts==0.31.0
"$work/venv/bin/python" -W ignore - <<'EOF'
from dynamicprompts.generators import RandomPromptGenerator

WEIGHTED = "a car (orange:1.2), [day:night:0.5]"
cases = {
    "a jumper, 100% wool": None,
    "a jumper, 100\\% wool": None,
    'a sign "only $5"': None,
    "a car, #ff8800 paint, night": "a car, ",
    "a car, \\#ff8800 paint, night": "a car, \\",
    WEIGHTED: WEIGHTED,
}
for prompt, expected in cases.items():
    try:
        seen = RandomPromptGenerator().generate(prompt, 1)[0]
    except Exception as error:
        assert type(error).__name__ == "ParseException", error
        seen = None
    print(f"{prompt!r:37} {'ParseException' if seen is None else repr(seen)}")
    assert seen == expected, f"changed: {expected!r} before"
EOF
