"""What an instruction asks of the hand before anything else: to get to the thing it names."""

import re

_ARTICLES = "the|a|an"
_ENDS = (
    r"with|by|to|into|in|from|on|onto|using|and|off|under|out|behind|through|between|beside|away|over|above|below|at|of|"
    r"until|so|down|up|back|open|shut|clockwise|counter-clockwise|\d+"
)
_THING = re.compile(rf"\b(?:{_ARTICLES}) (.+?)(?= (?:{_ENDS})\b|[,.]|$)")
_AROUND = re.compile(r"^(?:bypass|avoid|go around) [^,]*?(?:,| and )\s*")
_STATEMENT = re.compile(rf"^(?:{_ARTICLES}|there) ")


def approach(instruction: str) -> str | None:
    """The sentence that asks for the hand at what an instruction names first, or None where it names nothing.

    English imperatives alone; a statement ("the drawer is open") asks for no hand. What is to be gone around is
    passed over.

    >>> approach("open the green drawer by its handle")
    'touch the green drawer'
    >>> approach("bypass the wall and press the button")
    'touch the button'
    """
    text = _AROUND.sub("", " ".join(instruction.lower().split()))
    if _STATEMENT.match(text):
        return None
    found = _THING.search(text)
    words = text.rstrip(".").split()
    thing = found[1] if found else words[-1] if len(words) > 1 else ""
    return f"touch the {thing}" if thing else None
