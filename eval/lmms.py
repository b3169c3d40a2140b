"""The model as lmms-eval's harness wants it, so that its own tasks can run it.

    pip install -e '.[lmms]'
    python -m lmms_eval --model vlm --model_args adapter=default --tasks mme --batch_size 16

The package's entry point in the group `lmms_eval.models` names `MANIFEST`; nothing of ours imports this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from vlm.conversation import Conversation

if TYPE_CHECKING:
    from vlm.model import VLM

MANIFEST = ModelManifest("vlm", simple_class_path="vlm.eval.lmms.Harnessed")
_PASSED_ON = ("max_new_tokens", "num_beams", "temperature", "top_p")


class Harnessed(lmms):
    """Answers lmms-eval's requests with one of our models."""

    def __init__(
        self,
        adapter: str = "default",
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int | str = 16,
        model: VLM | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if model is None:
            from vlm.model import VLM

            model = VLM.from_pretrained(adapter, device=device, dtype=dtype).pack()
        self.model, self.batch_size = model, int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer for each request; requests with equal options are decoded together."""
        answers: list[str | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():
            options = generation(requests[numbers[0]].args[1]) | {"batch_size": self.batch_size}
            asked = [self._conversation(requests[n].args[0], *requests[n].args[2:]) for n in numbers]
            for number, answer in zip(numbers, self.model.ask_batch(asked, **options), strict=True):
                answers[number] = answer.text
                self.cache_hook.add_partial("generate_until", requests[number].args[:2], answer.text)
        return [answer or "" for answer in answers]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation with its end, and whether greedy decoding writes it."""
        found = []
        for request in requests:
            context, target, *where = request.args
            doc = self._document(*where[1:])
            wanted = (target if isinstance(target, str) else target(doc)).strip()
            conversation = self._conversation(context, *where)
            score = self.model.score([conversation], [[wanted]])[0][0]
            found.append((score, self.model.ask_batch([conversation])[0].text.strip() == wanted))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Several rounds are asked as several requests.

        Raises:
            ValueError: always; no task of one round needs it.
        """
        raise ValueError("tasks of several rounds cannot be run with this model")

    def _document(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _conversation(self, context: str, to_visual: Any, doc_id: Any, task: str, split: str) -> Conversation:
        visuals = to_visual(self._document(doc_id, task, split)) if to_visual else []
        return Conversation.ask(_flat(visuals), context.replace("<image>", "").strip())


def _flat(visuals: Any) -> list[Any]:
    if isinstance(visuals, list | tuple):
        return [image for each in visuals for image in _flat(each)]
    return [] if visuals is None else [visuals]


def generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """lmms-eval's generation options as ours; sampling off means temperature 0."""
    chosen = {name: options[name] for name in _PASSED_ON if options.get(name) is not None}
    if options.get("do_sample") is False:
        chosen["temperature"] = 0.0
    until = options.get("until", ())
    texts = (until,) if isinstance(until, str) else tuple(until)
    return chosen | {"stop": tuple(text for text in texts if text)}
