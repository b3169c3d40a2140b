"""Everything the Python API does, on the sample pictures.

python examples/ask_pictures.py [--adapter DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm import VLM
from vlm.conversation import Conversation

SAMPLES = Path(__file__).parents[1] / "data" / "samples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", default="default")
    model = VLM.from_pretrained(parser.parse_args().adapter, offline=True)
    cat, coffee, rocket = (SAMPLES / name for name in ("cat.jpg", "coffee.jpg", "rocket.jpg"))

    # One picture, one question; the answer knows how sure the model was.
    answer = model.ask([cat], "What animal is in the picture?")
    print(f"ask      {answer.text!r}  log-probability {answer.logprob:.2f}  {answer.finish_reason}")

    # Many conversations at once, each answered as it would be alone.
    questions = [Conversation.ask([picture], "Is there a cat in the picture?") for picture in (cat, coffee)]
    print("batch   ", [reply.text for reply in model.ask_batch(questions)])

    # How likely is each of two answers?
    yes, no = model.score(questions[:1], [["yes", "no"]])[0]
    print(f"score    yes {yes:.2f}, no {no:.2f}")

    print("caption ", [reply.text for reply in model.caption([cat, rocket])])

    # Examples in the prompt: pictures with their answers, then the picture in question.
    shots = Conversation.ask([cat], "What is this?").answered("cat").then("What is this?", [coffee])
    print("few-shot", model.ask_batch([shots.answered("cup").then("What is this?", [rocket])])[0].text)

    chat = model.chat([coffee])
    print("chat    ", chat.ask("What is on the table?").text, "|", chat.ask("What colour is it?").text)

    print("stream   ", end="")
    for piece in model.stream(Conversation.ask([rocket], "Describe the picture.")):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
