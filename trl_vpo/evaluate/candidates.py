"""The base and its adapters in one model: loaded once, switched by PEFT, scored and asked on the same batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from trl_vpo.errors import AdapterError, EvaluateError, ModelError
from trl_vpo.evaluate.results import BASE
from trl_vpo.forward.head import lm_head
from trl_vpo.forward.parts import output_head
from trl_vpo.forward.tree import Tree
from trl_vpo.models.adapters import loses_base
from trl_vpo.models.attach import attach_adapter
from trl_vpo.models.load import checked_adapter, load_model
from trl_vpo.models.local import LocalModel
from trl_vpo.models.requests import Answer, Sampling
from trl_vpo.models.scoring import Scored, by_tree


class ModelSet:
    """A base model and its adapters, which lie in it side by side.

    Every response stands behind a prompt of its own, and answers are greedy, so that a row's numbers depend neither on
    the batch nor on the other candidates. An adapter that cannot be read, does not fit, or changes its base, is an
    EvaluateError.
    """

    def __init__(self, model: LocalModel, adapters: Sequence[str] = ()):
        self.model = model
        self.names = [BASE, *candidate_names(adapters)]  # who is scored and asked; fewer may be set
        self._inside_peft = {name: f"candidate_{number:03d}" for number, name in enumerate(self.names[1:])}
        self._peft = _attached(model.model, list(zip(self._inside_peft.values(), adapters)))

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Make the model this candidate for a while."""
        if self._peft is None:
            yield
        elif name == BASE:
            with self._peft.disable_adapter():
                yield
        else:
            self._peft.set_adapter(self._inside_peft[name], inference_mode=True)
            yield

    def score(self, trees: Sequence[Tree], kl: bool = False) -> dict[str, list[list[Scored]]]:
        """Return the scores of all branches under each candidate, tree by tree.

        With `kl`, the base is scored, too, whether it is among the names or not; else the KL stays 0.
        """
        names = list(dict.fromkeys([BASE, *self.names] if kl else self.names))
        single = {
            (place, side): Tree(tree.name, tree.trunks, [branch])
            for place, tree in enumerate(trees)
            for side, branch in enumerate(tree.branches)
        }

        def run(keys: list) -> list[list[Scored]]:
            batch, reference, columns = self.model.batch([single[key] for key in keys]), None, []
            for name in names:
                with self.use(name):
                    scores = self.model.score(batch, reference)
                    if kl and name == BASE:
                        reference, scores.head = scores, lm_head(self.model.model)
                columns.append([scored for (scored,) in by_tree(scores, [single[key] for key in keys])])
            return list(zip(*columns))

        results = self.model.in_batches(single, run)
        return {
            name: [[results[place, side][i] for side in range(len(t.branches))] for place, t in enumerate(trees)]
            for i, name in enumerate(names)
        }

    def ask(self, trees: Sequence[Tree], max_new_tokens: int) -> dict[str, list[Answer]]:
        """Return the greedy answer of each candidate to every prompt."""
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0)

        def run(places: list[int]) -> list[tuple[Answer, ...]]:
            columns = []
            for name in self.names:
                with self.use(name):
                    columns.append(self.model.generate([trees[i] for i in places], [0] * len(places), sampling))
            return list(zip(*columns))

        results = self.model.in_batches(dict(enumerate(trees)), run)
        return {name: [results[place][i] for place in range(len(trees))] for i, name in enumerate(self.names)}


def load_candidates(adapters: Sequence[str], **options: Any) -> ModelSet:
    """Load a base, with the arguments of `load_model`, and its adapters. Raises ModelError or EvaluateError."""
    for path in adapters:  # before gigabytes of weights
        _checked_config(path, options["name"])
    return ModelSet(load_model(**options), adapters)


def candidate_names(adapters: Sequence[str]) -> list[str]:
    """Name adapters by the last part of their paths, or by as many parts as it takes to tell them apart."""
    parts = [[part for part in adapter.replace("\\", "/").split("/") if part] for adapter in adapters]
    for depth in range(max(map(len, parts), default=0) + 1):
        names = ["/".join(path[-depth - 1 :]) for path in parts]
        if len({BASE, *names}) == len(names) + 1:
            return names
    raise EvaluateError(f"adapters: {', '.join(adapters)} cannot be told apart: give each once, by its path.")


def _checked_config(path: str, model: str) -> PeftConfig:
    """Return an adapter's config; refuse one that gives no base back when it is switched off."""
    try:
        config = checked_adapter(path, model)
    except ModelError as error:
        raise EvaluateError(f"adapter {str(error).removeprefix('from_adapter: ')}") from error
    if why := loses_base(config):
        raise EvaluateError(
            f"adapter {path}: {why}, so switching it off does not give the base back. Merge it with its base, and "
            "evaluate the merged model as a base of its own."
        )
    return config


def _attached(model: PreTrainedModel, adapters: list[tuple[str, str]]) -> PeftModel | None:
    """Load all adapters (name within PEFT, path) into a base; return the PeftModel, or None without adapters."""
    wrapped = None
    for name, path in adapters:
        config = _checked_config(path, model.config._name_or_path)
        try:
            wrapped = attach_adapter(model, path, config=config, name=name, wrapped=wrapped)
        except AdapterError as error:
            raise EvaluateError(str(error)) from error
        if isinstance(output_head(model), BaseTunerLayer):
            raise EvaluateError(
                f"adapter {path} adapts the LM head by low-rank layers, which log-probs do not pass. Merge it with "
                "its base, and evaluate the merged model as a base of its own."
            )
    return wrapped.eval() if wrapped is not None else None
