"""RRPO's KL over a vocabulary of 152,000 tokens: in chunks, against all logits at once. Forward and backward."""

from argparse import Namespace

import torch

from benchmarks.common import in_turn, memory_of, peak_mib, show, summary

WIDTH = 896
COLUMNS = {
    "method": "KL",
    "response": "tokens",
    "seconds": "seconds (min-max)",
    "peak_mib": "peak MiB",
    "ratio_vs_plain": "plain / this",
    "memory_vs_plain": "memory / plain's",
}


def plain_kl(hidden, head, ref_hidden, ref_head):
    """Return (N,) KL(reference || model) through the full logits of both."""
    logps = head.logits(hidden).log_softmax(-1)
    ref_logps = ref_head.logits(ref_hidden).log_softmax(-1).detach()
    return (ref_logps.exp() * (ref_logps - logps)).sum(-1)


def make(method: str, tokens: int, vocabulary: int, device: str):
    from trl_vpo.forward.head import Head
    from trl_vpo.forward.kl import token_kl

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weight = torch.randn(vocabulary, WIDTH, device=device, dtype=dtype) / WIDTH**0.5
    hidden, reference = torch.randn(2, tokens, WIDTH, device=device, dtype=dtype)
    hidden.requires_grad_()
    head = Head(weight, None)
    kl = {"chunked": token_kl, "plain": plain_kl}[method]

    def run() -> None:
        kl(hidden, head, reference, head).sum().backward()
        hidden.grad = None

    return run


def measure_memory(args: Namespace) -> dict:
    method, tokens = args.candidate.split(":")
    return {"peak_mib": peak_mib(make(method, int(tokens), args.vocabulary, args.device), args.device)}


def run(args: Namespace) -> list[dict]:
    rows = []
    for tokens in args.tokens:
        candidates = {m: make(m, tokens, args.vocabulary, args.device) for m in ("plain", "chunked")}
        pair = []
        for method, seconds in in_turn(candidates, args.repeats, args.device).items():
            memory = memory_of(args, f"{method}:{tokens}", vocabulary=args.vocabulary)
            pair.append({"method": method, "response": tokens, **summary(seconds), **memory})
        for row in pair:
            row["ratio_vs_plain"] = pair[0]["seconds"] / row["seconds"]
            row["memory_vs_plain"] = row["peak_mib"] / pair[0]["peak_mib"]
        rows += pair
    show(f"KL to the reference, vocabulary {args.vocabulary:,}, width {WIDTH}", rows, COLUMNS)
    return rows
