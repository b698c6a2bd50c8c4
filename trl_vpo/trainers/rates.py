"""Learning rates of vision tower and projector, where those train: groups of the optimizer's parameters."""

from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from trl import DPOTrainer

from trl_vpo.errors import RecipeError
from trl_vpo.forward.parts import part_of

KEYS = {"vision": "vision_learning_rate", "projector": "projector_learning_rate"}  # part -> field of the config


class RatesTrainer(DPOTrainer):
    """`trl.DPOTrainer` with `vision_learning_rate` and `projector_learning_rate`.

    Scheduler, weight decay and checkpoints work on groups of parameters, so they hold for each part as for the rest.
    """

    _groups: MappingProxyType | dict[str, int] = MappingProxyType({})  # part with a rate of its own -> its first group

    def create_optimizer(self, model=None):
        if self.optimizer is not None:
            return super().create_optimizer(model)
        check_rates(self)
        optimizer = super().create_optimizer(model)
        self._groups = set_rates(optimizer, self.model if model is None else model, self.args)
        return optimizer

    def _part_rates(self) -> dict[str, float]:
        """Return the metrics of the rates as they are now."""
        return {f"learning_rate/{part}": self.optimizer.param_groups[i]["lr"] for part, i in self._groups.items()}


def check_rates(trainer: Any) -> None:
    """Raise RecipeError where the learning rate of a part would have no effect.

    Nothing of the part trains, or the optimizer's groups of parameters are made elsewhere.
    """
    args = trainer.args
    rates = _rates(args)
    if not rates:
        return
    check_trained_parts(args, trainer.model)
    deepspeed = args.deepspeed_plugin.hf_ds_config.config if args.deepspeed_plugin else {}
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    flat = fsdp is not None and fsdp.fsdp_version == 1 and not fsdp.use_orig_params
    elsewhere = [
        (trainer.optimizer is not None, "the optimizer is given. Set the rates in its groups of parameters"),
        ("optimizer" in deepspeed, "`optimizer` of the DeepSpeed config has one group for all. Leave it out there"),
        ("scheduler" in deepspeed, "`scheduler` of the DeepSpeed config has one rate for all. Leave it out there"),
        (flat, "FSDP 1 mixes the parts in flat parameters. Use FSDP 2, or fsdp_use_orig_params: true"),
    ]
    for part, rate in rates.items():
        for applies, problem in elsewhere:
            if applies:
                raise RecipeError(f"{KEYS[part]}={rate:g}: {problem}.")


def check_trained_parts(args: Any, model: nn.Module) -> None:
    """Raise RecipeError where nothing trains of a part that has a learning rate."""
    trained = set(_parts(model).values())
    for part, rate in _rates(args).items():
        if part not in trained:
            preset = "all" if part == "vision" else "language+projector"
            raise RecipeError(
                f"{KEYS[part]}={rate:g}: nothing of the {'vision tower' if part == 'vision' else part} trains. Leave "
                f"it out, or train that: with lora_target_modules: {preset}, or all weights without freeze_vision."
            )


def set_rates(optimizer: Optimizer, model: nn.Module, args: Any) -> dict[str, int]:
    """Split the groups of a new optimizer by part, and give each part its rate; returns the first group of each.

    What else a group has, such as its weight decay, stays. Groups without parameters are dropped: DeepSpeed would drop
    them later, and move the others.
    """
    rates, parts = _rates(args), _parts(model)
    if not rates:
        return {}
    groups = []
    for own in (None, *rates):
        for group in optimizer.param_groups:
            params = [p for p in group["params"] if (parts[p] if parts.get(p) in rates else None) == own]
            if params:
                groups.append((own, group | {"params": params} | ({"lr": rates[own]} if own else {})))
    optimizer.param_groups[:] = [group for _, group in groups]
    first = {part: index for index, (part, _) in reversed([*enumerate(groups)]) if part}
    if missing := rates.keys() - first:
        raise RecipeError(f"{KEYS[missing.pop()]}: optim={args.optim} has no groups of parameters. Use another one.")
    return first


def _rates(args: Any) -> dict[str, float]:
    return {part: getattr(args, key) for part, key in KEYS.items() if getattr(args, key) is not None}


def _parts(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return the part of each parameter that trains, also in a model that FSDP 1 has wrapped."""
    named = model.named_parameters()
    return {p: part_of(name.replace("_fsdp_wrapped_module.", "")) for name, p in named if p.requires_grad}
