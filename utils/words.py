"""What is printed: counts, programs, and lines that are longer than a terminal is wide."""

import re
import shutil
import textwrap
from pathlib import Path

# A word of a command or of code: what is quoted in it belongs together.
WORD = re.compile(r"(?:'[^']*'|\"[^\"]*\"|\S)+")


def counted(number: int, noun: str) -> str:
    """``1 thread``, ``2 threads``, ``2 classes``."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def shortest(program: Path) -> str:
    """How a shell in the current folder finds it: by name, below the folder, or by its whole path."""
    if shutil.which(program.name) == str(program):
        return program.name
    return str(program.relative_to(Path.cwd())) if program.is_relative_to(Path.cwd()) else str(program)


def wrapped(text: str, columns: int) -> str:
    """Break lines that are too long between words, as a terminal breaks them anywhere.

    A line that begins with two blanks is a command: it is continued with backslashes. Text that moves the cursor, such
    as a progress bar, is left as it is.
    """
    if "\r" in text or "\x1b" in text:
        return text
    return "\n".join(_broken(line, columns) if len(line) > columns else line for line in text.split("\n"))


def _broken(line: str, columns: int) -> str:
    if not line.startswith("  "):
        first, *others = line.split("  ")  # what belongs together stays so, where there is room for it
        lines = [first]
        for part in others:
            if len(lines[-1]) + 2 + len(part) > columns:
                lines.append("")
            lines[-1] += f"  {part}"
        options = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
        return "\n".join("\n".join(textwrap.wrap(each, columns, **options)) for each in lines)
    lines = [" "]
    for word in WORD.findall(line):
        if len(lines[-1]) + 1 + len(word) + 2 > columns and lines[-1].strip():
            lines.append("   ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines)
