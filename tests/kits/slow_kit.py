"""The slow way to compute what trainers compute: one sequence, one call, full logits."""

import torch


def slow_logits(model, trunk, branch):
    """(T, V) logits that predict each token of a response: one sequence without padding, every logit."""
    ids = torch.tensor([trunk.ids + branch.ids])
    types = {k: torch.tensor([v + [0] * len(branch.ids)]) for k, v in trunk.types.items()}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **types, **trunk.media).logits
    return logits[0, len(trunk.ids) - 1 : -1].float()


def slow_scores(trainer, model=None):
    """For each branch of the training rows: (T, V) log-probs of a model (the policy) and its T tokens."""
    trees = [trainer.data_collator.encode(example) for example in trainer.train_dataset]
    pairs = [(tree.trunks[branch.trunk], branch) for tree in trees for branch in tree.branches]
    return [(slow_logits(model or trainer.model, *pair).log_softmax(-1), torch.tensor(pair[1].ids)) for pair in pairs]


def of_tokens(scores):
    """(T,) log-probs of the tokens themselves, for each of `slow_scores`."""
    return [logps.gather(-1, ids[:, None])[:, 0] for logps, ids in scores]


def slow_kl(policy, reference):
    """(T,) KL(reference || policy) for each branch, from `slow_scores` of both."""
    return [(r.detach().exp() * (r.detach() - p)).sum(-1) for (p, _), (r, _) in zip(policy, reference)]
