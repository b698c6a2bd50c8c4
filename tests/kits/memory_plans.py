"""A text model whose weights can be counted by hand, and plans for it."""

from dataclasses import replace
from types import SimpleNamespace

import transformers as T
from peft import LoraConfig
from published_models import KEYS

from trl_vpo import LeanPOConfig, RRPOConfig, VisualDPOConfig
from trl_vpo.doctor.activation_estimate import Call
from trl_vpo.doctor.loaded_recipe import LoadedRecipe
from trl_vpo.doctor.memory import plan_of
from trl_vpo.doctor.workload import Workload
from trl_vpo.forward.tree import Branch, Tree, Trunk
from trl_vpo.models.model_size import adapt, empty_model
from trl_vpo.training.sharding import Sharding

METHODS = {VisualDPOConfig: "dpo", LeanPOConfig: "leanpo", RRPOConfig: "rrpo"}
TEXT = dict(zip(KEYS, (8, 16, 2, 2, 2, 32, False))) | {"architectures": ["Qwen2ForCausalLM"]}
LAYER = 4 * 64 + 3 * 8 + 3 * 8 * 16 + 2 * 8  # attention with biases of q, k, v; MLP; norms
LINEAR = 2 * (4 * 64 + 3 * 8 * 16)
TOTAL = 2 * LAYER + 2 * 32 * 8 + 8
ADAPTER = 2 * 2 * (8 + 8)  # rank 2 on q_proj of two layers
LOAD = Workload(Call(rows=2, length=10, masked=False, scored=12), inputs=100)
ROW = Tree("row", [Trunk([1, 2, 3])], [Branch([4]), Branch([5])])


def args_of(kind=VisualDPOConfig, **options):
    defaults = {"bf16": True, "report_to": "none", "per_device_train_batch_size": 1, "use_cpu": True}
    return kind("out", **defaults | options)


def plan(args, model_args, *, sharding=None, load=LOAD):
    """(plan, empty model) of a two-layer text model, with LoRA on q_proj if the recipe says so."""
    recipe = LoadedRecipe(METHODS[type(args)], None, args, model_args, None, sharding or Sharding())
    recipe.config, recipe.processor = T.Qwen2Config(**TEXT), SimpleNamespace(pad_token_id=0)
    recipe.base = recipe.model = empty_model(recipe.config)
    if model_args.use_peft:
        recipe.model, _ = adapt(recipe.model, LoraConfig(r=2, target_modules=["q_proj"]))
    return replace(plan_of(recipe, [ROW]), load=load, pair=load), recipe.model
