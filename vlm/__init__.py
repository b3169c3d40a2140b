"""Ask a small vision-language model about pictures, train its adapter, measure it.

    from vlm import VLM
    model = VLM.from_pretrained("default")
    print(model.ask(["photo.jpg"], "What is in the picture?").text)

Importing this package costs nothing: torch is imported when a model is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlm.conversation import Conversation, Turn
    from vlm.errors import VLMError
    from vlm.images import ImageError, open_picture
    from vlm.model import VLM

__all__ = ["VLM", "Conversation", "ImageError", "Turn", "VLMError", "load", "open_picture"]

_LAZY = {
    "VLM": "vlm.model",
    "Conversation": "vlm.conversation",
    "Turn": "vlm.conversation",
    "VLMError": "vlm.errors",
    "ImageError": "vlm.images",
    "open_picture": "vlm.images",
}


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'vlm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(adapter: str | Path = "default", **options: Any) -> VLM:
    """Short for `VLM.from_pretrained(adapter, **options)`."""
    from vlm.model import VLM

    return VLM.from_pretrained(adapter, **options)


class _CloneFinder:
    """Finds `vlm.train`, `vlm.eval` and `vlm.data` beside the package, where a bare clone keeps them.

    Only those three names: what is inside them is found through their own `__path__`. Appending the
    clone's folder to `vlm.__path__` instead would make `vlm.vlm.model` a second copy of `vlm.model`.
    """

    clone = Path(__file__).resolve().parent.parent
    rooms = ("train", "eval", "data")

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, room = fullname.partition(".")
        if package != "vlm" or room not in self.rooms:
            return None
        folder = self.clone / room
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def _is_bare_clone() -> bool:
    """True where the three rooms are beside this package and not inside it."""
    inside, beside = Path(__file__).parent, _CloneFinder.clone
    return not (inside / "train").is_dir() and (beside / "train" / "__init__.py").is_file()


if _is_bare_clone() and not any(type(finder).__qualname__ == "_CloneFinder" for finder in sys.meta_path):
    # First in line: an editable install of another checkout would answer for these names too.
    sys.meta_path.insert(0, _CloneFinder())
