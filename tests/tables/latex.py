"""What is wrong with a table in LaTeX, read independently of how it was written."""

import re


def latex_problems(text: str) -> list[str]:
    """Braces, environments, unescaped specials and the width of every row."""
    problems, depth = [], 0
    for character in re.sub(r"\\[{}%&_#$]", "", text):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            problems.append("brace closed that was not open")
    if depth:
        problems.append("brace left open")
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{([^}]*)\}", text):
        if kind == "begin":
            stack.append(name)
        elif not stack or stack.pop() != name:
            problems.append(f"environment {name}")
    width = len(re.search(r"\\begin\{tabular\}\{([lcr]+)\}", text)[1])
    for line in text.splitlines():
        if line.endswith(r"\\"):
            spans = (re.search(r"\\multicolumn\{(\d+)\}", cell) for cell in re.split(r"(?<!\\)&", line))
            if sum(int(span[1]) if span else 1 for span in spans) != width:
                problems.append(line)
    if re.search(r"(?<!\\)[%_#$]", re.sub(r"\\label\{[^}]*\}|\\begin\{[^}]*\}", "", text)):
        problems.append("unescaped special character")
    if not text.isascii():
        problems.append("not ASCII")
    return problems + stack
