"""Stand-ins for the tiny models and data sets of the Hub that TRL's DPO tests train on, built offline."""

import json

import transformers as T
from families import template, text_of, tokenizer
from helpers import message

SHORT = {"max_position_embeddings": 512, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"layers_block_type": ["mamba", "attention", "mlp"], "ssm_state_size": 8, "mamba_num_heads": 4}
MAMBA |= {"mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16}
LFM = {"layer_types": ["conv", "full_attention"]}
TOOLS_TEMPLATE = (
    "{%- if tools -%}{{ '<|im_start|>system\n' }}{%- for t in tools -%}{{ t | tojson }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}{%- endif -%}{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and enable_thinking is false -%}{{ '<think></think>' }}{%- endif -%}"
    "{%- if m.tool_calls -%}{%- for c in m.tool_calls -%}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{%- endfor -%}{%- else -%}{{ m.content }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is false -%}{{ '<think></think>' }}{%- endif -%}{%- endif -%}"
)
TEXT_MODELS = {  # name -> classes of config and model, fields of the config
    "Qwen2.5": (T.Qwen2Config, T.Qwen2ForCausalLM, {}),
    "Qwen2-MoE": (
        T.Qwen2MoeConfig,
        T.Qwen2MoeForCausalLM,
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3-MoE": (T.Qwen3MoeConfig, T.Qwen3MoeForCausalLM, {**EXPERTS, "num_experts": 4}),
    "Cohere2": (T.Cohere2Config, T.Cohere2ForCausalLM, {"sliding_window": 64}),
    "GLM-4-MoE": (T.Glm4MoeConfig, T.Glm4MoeForCausalLM, {**EXPERTS, "n_routed_experts": 4}),
    "GPT-OSS": (T.GptOssConfig, T.GptOssForCausalLM, {"num_experts_per_tok": 2, "num_local_experts": 4}),
    "Nemotron-H": (T.NemotronHConfig, T.NemotronHForCausalLM, MAMBA),
    "OLMo-3": (T.Olmo3Config, T.Olmo3ForCausalLM, {"layer_types": ["sliding_attention", "full_attention"]}),
    "LFM2": (T.Lfm2Config, T.Lfm2ForCausalLM, LFM),
    "LFM2-MoE": (T.Lfm2MoeConfig, T.Lfm2MoeForCausalLM, LFM | EXPERTS | {"num_experts": 4, "num_dense_layers": 1}),
}
EXCHANGES = [  # prompt, chosen, rejected
    ("What moves left?", " a red square moves left.", " nothing."),
    ("What is blue?", " the circle.", " the square is blue, and so is the circle."),
    ("Describe the video.", " a square moves right and then left again.", " it moves."),
    ("What is in the picture?", " two circles.", " a red square."),
]


def text_standin(name, **other):
    """(model, tokenizer); `other` fields of the config."""
    tok = tokenizer()
    tok.chat_template = template()
    config, model, more = TEXT_MODELS[name]
    return model(config(**{**text_of(tok), **SHORT, **more, **other})), tok


def plain(implicit=False):
    """Rows of texts; implicit: the prompt stands before both responses."""
    rows = [dict(zip(("prompt", "chosen", "rejected"), texts)) for texts in EXCHANGES]
    return _implicit(rows) if implicit else rows


def _implicit(rows):
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


def turn(role, text):
    return [{"role": role, "content": text}]


def conversations(implicit=False):
    rows = [
        {"prompt": turn("user", p), "chosen": turn("assistant", c.strip()), "rejected": turn("assistant", r.strip())}
        for p, c, r in EXCHANGES
    ]
    return _implicit(rows) if implicit else rows


def tool_rows():
    """Conversations whose answers call a function; arguments that the calls do not share are None in Arrow."""

    def call(name, **arguments):
        function = {"name": name, "arguments": arguments}
        return [{"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]

    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "ab"]
    more = {"rejected": call("b", n=1), "tools": json.dumps(tools)}
    return [{"prompt": turn("user", p), "chosen": call("a", text=c), **more} for p, c, _ in EXCHANGES]


def typed(pictures):
    """Conversations on a list of images each; an empty list is a row without any."""
    return [
        {
            "prompt": message("user", *["<image>"] * len(images), p),
            "chosen": message("assistant", c.strip()),
            "rejected": message("assistant", r.strip()),
            "images": images,
        }
        for (p, c, r), images in zip(EXCHANGES, pictures)
    ]
