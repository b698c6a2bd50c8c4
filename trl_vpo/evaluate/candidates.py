"""The base and its adapters in one model: loaded once, switched by PEFT, scored and asked on the same batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from trl_vpo.data.rows import Row
from trl_vpo.errors import AdapterError, EvaluateError, GenerateError
from trl_vpo.evaluate.answering import Answer, AnswersAsTheyAre
from trl_vpo.evaluate.config import EvaluateConfig
from trl_vpo.evaluate.results import BASE
from trl_vpo.evaluate.scoring import Scored
from trl_vpo.forward.tree import Tree, tree_batch
from trl_vpo.models.adapters import loses_base
from trl_vpo.models.attach import attach_adapter
from trl_vpo.models.load import answering_model, checked_adapter
from trl_vpo.models.local import LocalModel, stackable
from trl_vpo.models.requests import Sampling


class Contestants(AnswersAsTheyAre):
    """A base model and its adapters.

    Every response stands behind a prompt of its own, and answers are greedy, so that a row's numbers depend neither on
    the batch nor on the other contestants.

    Args:
        plain: the base, as `generate.models.answering_model` loads it.
        adapters: folders or Hub names; layers of all of them go into the base side by side.

    Raises:
        EvaluateError: an adapter that cannot be read, does not fit, or changes its base.
    """

    def __init__(self, plain: LocalModel, adapters: Sequence[str] = (), *, max_pixels: int | None = None):
        super().__init__(
            plain.model,
            plain.processor,
            batch_size=plain.batch_size,
            max_pixels=max_pixels,
            description=plain.record(),
        )
        names = contestant_names(adapters)
        self.names = [BASE, *names]
        self.adapters = dict(zip(names, adapters))
        self._switches = {name: f"contestant_{number:03d}" for number, name in enumerate(names)}
        self._peft = _attached(self.model, list(zip(self._switches.values(), adapters)))

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """The model is this contestant for a while."""
        if self._peft is None:
            yield
        elif name == BASE:
            with self._peft.disable_adapter():
                yield
        else:
            self._peft.set_adapter(self._switches[name], inference_mode=True)
            yield

    def encode(self, row: Row, sides: tuple[str, ...]) -> Tree:
        """A row with decoded media and some of its responses. Raises RowError, naming the row."""
        return self._encode(row, sides)

    def score(self, trees: Sequence[Tree], kl: bool = False) -> dict[str, list[list[Scored]]]:
        """The scores of all branches under every contestant, tree by tree. Without `kl` that stays 0.

        Raises:
            GenerateError: one response behind its prompt does not fit on the device.
        """
        single = [Tree(tree.name, tree.trunks, [branch]) for tree in trees for branch in tree.branches]
        found = self._in_batches([(None, None, tree) for tree in single], lambda batch: self._score_all(batch, kl))
        scores: dict[str, list[list[Scored]]] = {}
        for name in self.names:
            values = iter([one[name] for one in found])
            scores[name] = [[next(values) for _ in tree.branches] for tree in trees]
        return scores

    def ask(self, trees: Sequence[Tree], max_new_tokens: int) -> dict[str, list[Answer]]:
        """The greedy answer of every contestant to each prompt.

        Raises:
            GenerateError: one prompt does not fit on the device.
        """
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0)

        def run(batch: list) -> list[dict[str, Answer]]:
            trunks, answers = [tree.trunks[0] for *_, tree in batch], {}
            for name in self.names:
                with self.use(name):
                    answers[name] = self._generate(trunks, [0] * len(trunks), sampling)
            return [{name: answers[name][i] for name in self.names} for i in range(len(batch))]

        found: dict[int, dict[str, Answer]] = {}
        for group in stackable([(place, None, tree) for place, tree in enumerate(trees)]):
            found |= {place: one for (place, *_), one in zip(group, self._in_batches(group, run), strict=True)}
        return {name: [found[place][name] for place in range(len(trees))] for name in self.names}

    # --- one call ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _score_all(self, waiting: list[tuple[None, None, Tree]], kl: bool) -> list[dict[str, Scored]]:
        from trl_vpo.forward.scorer import Scorer  # imports TRL
        from trl_vpo.forward.scoring import lm_head

        if self._scorer is None:
            self._scorer = Scorer(self.model, layout="separate", pad_token_id=self._pad)
        batch = send_to_device(tree_batch([tree for *_, tree in waiting], self._pad), self.model.device)
        found: list[dict[str, Scored]] = [{} for _ in waiting]
        reference = None
        for name in self.names:  # the base comes first
            with self.use(name):
                scores = self._scorer.score(self.model, batch, reference)
                if kl and name == BASE:
                    reference, scores.head = scores, lm_head(self.model)
            totals = zip(scores.sums.tolist(), scores.mask.sum(-1).tolist(), _kl_sums(scores))
            for one, values in zip(found, totals, strict=True):
                one[name] = Scored(*values)
        return found


def _kl_sums(scores: Any) -> list[float]:
    return scores.kl.sum(-1).tolist() if scores.kl is not None else [0.0] * len(scores.mask)


# --- loading ------------------------------------------------------------------------------------------------------


def load_contestants(config: EvaluateConfig) -> Contestants:
    """The base and the adapters of a run.

    Raises:
        GenerateError: there is no such model, or it cannot be loaded here.
        EvaluateError: an adapter cannot be used.
    """
    for path in config.adapters:  # before gigabytes of weights
        _checked_config(path, config.model_name_or_path)
    return Contestants(answering_model(config.generate_config()), config.adapters, max_pixels=config.max_pixels)


def contestant_names(adapters: Sequence[str]) -> list[str]:
    """What the adapters are called: the last part of each path, or as many more as it takes to tell them apart.

    Raises:
        EvaluateError: the same adapter twice.
    """
    parts = [[part for part in adapter.replace("\\", "/").split("/") if part] for adapter in adapters]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len({BASE, *names}) == len(names) + 1:
            return names
    if not parts:
        return []
    raise EvaluateError(f"adapters: {', '.join(adapters)} cannot be told apart: give each once, by its path.")


def fingerprint(adapter: str) -> str:
    """What tells an adapter from another in the same place: a hash of its files. A Hub adapter goes by its name."""
    files = sorted(Path(adapter).glob("adapter_*"))
    if not files:
        return adapter
    total = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


def _checked_config(path: str, model: str) -> Any:
    """The adapter's config. Base and adapter are only told apart where switching it off gives the base back."""
    try:
        config = checked_adapter(path, model)
    except GenerateError as error:
        raise EvaluateError(f"adapter {str(error).removeprefix('from_adapter: ')}") from error
    if why := loses_base(config):
        raise EvaluateError(
            f"adapter {path}: {why}, so the base is not there any more when it is switched off. Merge it with its "
            "base, and evaluate the merged model as a base of its own."
        )
    return config


def _attached(model: PreTrainedModel, adapters: list[tuple[str, str]]) -> PeftModel | None:
    """PEFT around a base that all adapters (name within PEFT, path) are loaded into; None without adapters."""
    wrapped = None
    for name, path in adapters:
        config = _checked_config(path, model.config._name_or_path)
        try:
            wrapped = attach_adapter(model, path, config=config, name=name, wrapped=wrapped)
        except AdapterError as error:
            raise EvaluateError(str(error)) from error
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise EvaluateError(
                f"adapter {path} adapts the LM head by low-rank layers, which log-probs do not pass. Merge it with "
                "its base, and evaluate the merged model as a base of its own."
            )
    return wrapped.eval() if wrapped is not None else None
