"""The base: what projector and LoRA learn from questions and right answers, `python -m studies.real.pictures.base`.

With `look` behind it the command shows what the base answers.

First the projector alone: each of a picture's tokens is to be the sum of the words for its colour and shape. Then
both, through the language model. The command writes `adapter/`, which the study loads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from studies.real import model as real_model
from studies.real.pictures import model as picture_model
from studies.real.pictures import questions

ADAPTER = Path(__file__).parent / "adapter"
OUT = Path("outputs/study-real")
RANK, SEED = 8, 0
WARM_STEPS, WARM_BATCH = 150, 64
STEPS, RATE, WARM_UP = 16, 1e-3, 4
BATCH = {"colour": 8, "shape": 4, "yes/no": 4}  # questions of a step
PICTURES = 1000  # the first pictures of those for training: the others are kept for preferences
LOOK_EVERY, LOOKS, FIRST_LOOKED_AT = 16, 48, 500  # steps; questions of a kind; test picture


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    language = real_model.language_model(OUT / "model")
    model, processor = picture_model.assemble(language, picture_model.tower_file())
    data = questions.data_folder()
    asked = [row for row in questions.rows(data, "train") if row["picture"] < PICTURES]
    maps = picture_model.tower_maps(model, processor, {row["picture"]: row["file"] for row in asked})
    print(f"{len(maps)} pictures, {time.process_time():.0f} CPU s", flush=True)
    warm_start(model, processor.tokenizer, maps, questions.facts(asked))
    print(f"Warm start, {time.process_time():.0f} CPU s", flush=True)
    adapted = teach(model, processor, asked, maps, looked_at(data))
    save(adapted, ADAPTER)
    print(f"Written: {ADAPTER}, {time.process_time():.0f} CPU s")


def looked_at(data: Path) -> list[dict[str, Any]]:
    """Questions of each kind about test pictures, not the first ones: those are the study's."""
    late = [row for row in questions.rows(data, "test") if row["picture"] >= FIRST_LOOKED_AT]
    return [row for kind in BATCH for row in random.Random(SEED).sample(questions.of_kind(late, kind), LOOKS)]


def warm_start(model: Any, tokenizer: Any, maps: Mapping[int, Tensor], facts: Mapping[int, Mapping[str, str]]) -> None:
    """Teach the projector the words of each picture, in place."""
    known = [picture for picture, words in facts.items() if len(words) == 2]
    words = [
        [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in facts[p].values()] for p in known
    ]
    embeddings = model.get_input_embeddings().weight.detach().float()
    targets = torch.stack([sum(embeddings[ids].sum(0) for ids in own) for own in words])  # (N, H)
    projector, draw = model.model.multi_modal_projector.float(), random.Random(SEED)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=0.0)
    for _ in range(WARM_STEPS):
        places = draw.sample(range(len(known)), min(WARM_BATCH, len(known)))
        made = projector(torch.stack([maps[known[place]] for place in places]).float())  # (B, TOKENS, H)
        loss = F.mse_loss(made, targets[places][:, None].expand_as(made))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def batches(asked: Sequence[Mapping[str, Any]], steps: int) -> Iterator[list[Mapping[str, Any]]]:
    """The questions of each step: all of a kind in a random order, again and again."""
    draw = random.Random(SEED)
    of_kind = {kind: questions.of_kind(asked, kind) for kind in BATCH}
    waiting: dict[str, list] = {kind: [] for kind in BATCH}
    for _ in range(steps):
        batch = []
        for kind, count in BATCH.items():
            if len(waiting[kind]) < count:
                waiting[kind] = draw.sample(of_kind[kind], len(of_kind[kind]))
            batch += [waiting[kind].pop() for _ in range(min(count, len(waiting[kind])))]
        yield batch


def teach(
    model: Any, processor: Any, asked: Sequence[Mapping], maps: Mapping[int, Tensor], held_out: Sequence[Mapping]
) -> Any:
    """Train projector and LoRA on right answers; gives the adapted model."""
    adapted = adapt(model)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    slope = lambda step: min(1.0, (step + 1) / WARM_UP, (STEPS - step) / (STEPS / 2))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, slope)
    sums: list[float] = []
    for step, batch in enumerate(batches(asked, STEPS), 1):
        texts = [picture_model.text(processor, r["question"], questions.sentence(r, r["answer"])) for r in batch]
        with real_model.precision(model):
            shown = model.model.multi_modal_projector(torch.stack([maps[row["picture"]] for row in batch]))
        losses = []
        for hidden, (_, response) in zip(real_model.states_of_batch(adapted, texts, list(shown)), texts):
            logits = model.get_output_embeddings()(hidden)  # (T, V)
            losses.append(F.cross_entropy(logits.float(), torch.tensor(response), reduction="sum"))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        sums.append(loss.item())
        if step % LOOK_EVERY == 0 or step == STEPS:
            found = accuracies(adapted, processor, held_out)
            shown_loss = sum(sums[-LOOK_EVERY:]) / len(sums[-LOOK_EVERY:])
            line = {"step": step, "loss": round(shown_loss, 3), **found, "cpu_seconds": round(time.process_time())}
            print(json.dumps(line), flush=True)
    return adapted


def adapt(model: Any) -> Any:
    """The model with a new adapter: LoRA in the language model, and the projector whole."""
    from peft import LoraConfig, get_peft_model

    from trl_vpo.models.adapters import resolve_targets

    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="language", modules_to_save=["multi_modal_projector"]
    )
    resolve_targets(config, model)
    adapted = get_peft_model(model, config)
    for weight in adapted.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
    return adapted


def accuracies(model: Any, processor: Any, rows: Sequence[Mapping], *, blind: bool = False) -> dict[str, float]:
    """The share of right greedy answers by kind; blind: to the questions alone."""
    pictures = picture_model.pictures(model, processor, {row["picture"]: row["file"] for row in rows})
    shown = [None if blind else pictures[row["picture"]] for row in rows]
    said = picture_model.answers(model, processor, rows, shown)
    right = [questions.is_right(row, text) for row, text in zip(rows, said)]
    kinds = [row["kind"] for row in rows]
    of_kind = lambda kind: [ok for ok, own in zip(right, kinds) if own == kind]  # noqa: E731
    return {kind: round(sum(of_kind(kind)) / len(of_kind(kind)), 3) for kind in dict.fromkeys(kinds)}


# --- the adapter on disk ------------------------------------------------------------------------------------------


def save(adapted: Any, folder: Path) -> None:
    """Write the adapter in bfloat16, without the name of a base that only this machine has."""
    for weight in adapted.parameters():
        weight.data = weight.data.bfloat16()
    adapted.peft_config["default"].base_model_name_or_path = None
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()  # a model card to fill in


def base_model(folder: Path, language: Path, tower: Path, adapter: Path = ADAPTER) -> Path:
    """Write the base as a folder that transformers loads, the adapter merged, unless it is there."""
    if (folder / "model.safetensors").is_file():
        return folder
    from peft import PeftModel

    model, processor = picture_model.assemble(language, tower)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().to(torch.bfloat16)
    part = folder.with_name(f"{folder.name}.part")
    merged.save_pretrained(part), processor.save_pretrained(part)
    os.replace(part, folder)
    return folder


def look() -> None:
    """Print what the base answers rightly, and what without pictures."""
    torch.set_num_threads(1)
    where = base_model(OUT / "picture-model", real_model.language_model(OUT / "model"), picture_model.tower_file())
    model, processor = picture_model.load(where)
    for blind in (False, True):
        found = accuracies(model, processor, looked_at(questions.data_folder()), blind=blind)
        print(json.dumps({"blind": blind, "questions": LOOKS, **found}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m studies.real.pictures.base", description=__doc__)
    parser.add_argument("look", nargs="?", choices=["look"], help="train nothing")
    look() if parser.parse_args().look else main()
