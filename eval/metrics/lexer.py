"""A longest-match scanner: rules in, (rule, end) out, in time linear in the text.

Python's `re` takes the first alternative that matches; a scanner of the lex family takes the longest match
over all rules, and the earlier rule on a tie. The two disagree often enough that caption scores move, so the
rules are compiled to one automaton (Thompson's construction), made deterministic a state at a time as text
asks for it, and cached.

Pattern syntax: literals (both cases match, as in a caseless scanner), `\\` escapes, `[...]` classes (case
sensitive, `^` negates), groups, `|`, `*`, `+`, `?`, `{m}`, `{m,n}`, `{NAME}` for a definition, and `\\l`,
`\\u`, `\\d`, `\\a` for any letter, any capital, any digit of Unicode and any character at all.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

CharSet = Callable[[str], bool]
# Characters outside ASCII that Unicode's case rules tie to a letter inside it.
_FOLDED = {"s": "\u017f", "k": "\u212a", "i": "\u0130\u0131"}
_MACRO = re.compile(r"\{([A-Z][A-Z0-9_]*)\}")
_COUNT = re.compile(r"\{(\d+)(?:,(\d+))?\}")


def is_letter(char: str) -> bool:
    """Any character of Unicode's letter categories."""
    return unicodedata.category(char)[0] == "L"


def is_digit(char: str) -> bool:
    """Any decimal digit of Unicode."""
    return unicodedata.category(char) == "Nd"


def expand(pattern: str, definitions: Mapping[str, str]) -> str:
    """Replaces every `{NAME}` by its definition, in brackets, until none is left."""
    while match := _MACRO.search(pattern):
        pattern = f"{pattern[: match.start()]}({definitions[match[1]]}){pattern[match.end() :]}"
    return pattern


@dataclass
class _Nfa:
    """States are integers; `arcs[s]` are (character set, target) pairs, `empty[s]` the free moves."""

    arcs: list[list[tuple[CharSet, int]]] = field(default_factory=list)
    empty: list[list[int]] = field(default_factory=list)
    rule: dict[int, int] = field(default_factory=dict)

    def state(self) -> int:
        self.arcs.append([])
        self.empty.append([])
        return len(self.arcs) - 1

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """`states` and all that free moves reach."""
        found, todo = set(), list(states)
        while todo:
            state = todo.pop()
            if state not in found:
                found.add(state)
                todo.extend(self.empty[state])
        return frozenset(found)


class _Parser:
    """Recursive descent over one pattern, adding its states to an `_Nfa`."""

    def __init__(self, pattern: str, nfa: _Nfa, sets: dict[str, CharSet]) -> None:
        self.text, self.at, self.nfa, self.sets = pattern, 0, nfa, sets

    def alternatives(self, start: int) -> int:
        ends = [self.sequence(start)]
        while self.at < len(self.text) and self.text[self.at] == "|":
            self.at += 1
            ends.append(self.sequence(start))
        end = self.nfa.state()
        for each in ends:
            self.nfa.empty[each].append(end)
        return end

    def sequence(self, start: int) -> int:
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            begin = self.at
            entry = self.nfa.state()
            self.nfa.empty[start].append(entry)
            end = self.atom(entry)
            start = self.repeated(begin, self.at, entry, end)
        return start

    def repeated(self, begin: int, stop: int, entry: int, end: int) -> int:
        """Applies the quantifier after `text[begin:stop]`, copying the atom for counted repeats."""
        rest = self.text[self.at :]
        if rest[:1] in ("*", "+", "?") and rest:
            self.at += 1
            out = self.nfa.state()
            self.nfa.empty[end].append(out)
            if rest[0] in "*+":
                self.nfa.empty[end].append(entry)
            if rest[0] in "*?":
                self.nfa.empty[entry].append(out)
            return out
        if count := _COUNT.match(rest):
            least, most = int(count[1]), int(count[2] or count[1])
            after = self.at + count.end()
            ends = [end] if least <= 1 else []
            for number in range(2, most + 1):
                self.at = begin
                end = self.atom(self._step(end))
                if number >= least:
                    ends.append(end)
            out = self.nfa.state()
            for each in [*ends, entry] if least == 0 else ends:
                self.nfa.empty[each].append(out)
            self.at = after
            return out
        return end

    def _step(self, state: int) -> int:
        new = self.nfa.state()
        self.nfa.empty[state].append(new)
        return new

    def atom(self, start: int) -> int:
        char = self.text[self.at]
        if char == "(":
            self.at += 1
            end = self.alternatives(start)
            self.at += 1
            return end
        end = self.nfa.state()
        self.nfa.arcs[start].append((self.charset(), end))
        return end

    def charset(self) -> CharSet:
        """Reads one literal, escape or class; equal sources share one function."""
        begin = self.at
        char = self.text[begin]
        if char == "[":
            self.at = begin + 1 + (self.text[begin + 1] == "^")
            while self.text[self.at] != "]":
                self.at += 2 if self.text[self.at] == "\\" else 1
        elif char == "\\":
            self.at += 1
        self.at += 1
        source = self.text[begin : self.at]
        if source not in self.sets:
            self.sets[source] = _charset(source)
        return self.sets[source]


_NAMED: dict[str, CharSet] = {
    "\\l": is_letter,
    "\\u": str.isupper,
    "\\d": is_digit,
    "\\a": lambda char: True,
}


def _charset(source: str) -> CharSet:
    if source in _NAMED:
        return _NAMED[source]
    if source.startswith("["):
        pattern = re.compile(source)
        return lambda char: pattern.match(char) is not None
    literal = source[-1]
    return {literal, literal.lower(), literal.upper(), *_FOLDED.get(literal.lower(), "")}.__contains__


class _State:
    """A deterministic state: the automaton states it stands for, its rule and the moves known so far."""

    __slots__ = ("members", "moves", "rule")

    def __init__(self, members: frozenset[int], rule: int) -> None:
        self.members, self.rule = members, rule
        self.moves: dict[str, _State | None] = {}


class Scanner:
    """The longest match of any of `patterns` at a place in a text; the earliest pattern on a tie."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._nfa = _Nfa()
        self._states: dict[frozenset[int], _State] = {}
        first, sets = self._nfa.state(), dict[str, CharSet]()
        for number, pattern in enumerate(patterns):
            entry = self._nfa.state()
            self._nfa.empty[first].append(entry)
            self._nfa.rule[_Parser(pattern, self._nfa, sets).alternatives(entry)] = number
        start = self._state([first])
        assert start is not None
        self._start = start

    def _state(self, members: Iterable[int]) -> _State | None:
        closed = self._nfa.closure(members)
        if not closed:
            return None
        if closed not in self._states:
            rules = [self._nfa.rule[state] for state in closed if state in self._nfa.rule]
            self._states[closed] = _State(closed, min(rules, default=-1))
        return self._states[closed]

    def _move(self, state: _State, char: str) -> _State | None:
        arcs = (arc for member in state.members for arc in self._nfa.arcs[member])
        target = self._state([end for accepts, end in arcs if accepts(char)])
        state.moves[char] = target
        return target

    def match(self, text: str, start: int) -> tuple[int, int]:
        """The rule and the end of the longest match from `start`; (-1, start) where nothing matches."""
        state: _State | None = self._start
        rule, end = -1, start
        for at in range(start, len(text)):
            assert state is not None
            char = text[at]
            state = state.moves[char] if char in state.moves else self._move(state, char)
            if state is None:
                break
            if state.rule >= 0:
                rule, end = state.rule, at + 1
        return rule, end

    def ends(self, text: str, start: int, stop: int) -> list[int]:
        """Every place up to `stop` where some rule's match from `start` could end, in order."""
        state: _State | None = self._start
        found = []
        for at in range(start, stop):
            assert state is not None
            char = text[at]
            state = state.moves[char] if char in state.moves else self._move(state, char)
            if state is None:
                break
            if state.rule >= 0:
                found.append(at + 1)
        return found
