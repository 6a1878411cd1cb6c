"""A tiny llama that thinks, speaks, and calls a tool, word by word as written here.

Run as a program: ``python scripted_model.py DIRECTORY [SEED]``. Each answer is

    <think> thought </think> speech [<tool_call> call </tool_call>] <eos>

The residual stream carries the last token as a one-hot vector, and the head maps
it to the token that the script has next. Where the script leaves a choice, the
attention over the whole context decides: an answer that goes on from a wrong
cache is another one. The rest is mlx-lm's own llama with its own caches.

The call is made only for a client that holds `END` back with `CALL_BIAS`.
After a tool's result the prompt itself ends with ``<think>``.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from support.tiny_model import SPECIAL, make_tokenizer

Step = tuple[str, ...]  # the tokens that may come next

# Byte-level spelling: Ġ is a space; â Ĥ ¬ are the three bytes of €, Ã © those of é.
THOUGHT: list[Step] = [
    ("Let",),
    ("Ġsee", "Ġthink", "Ġcount", "Ġlook", "Ġread"),
    ("Ġwhat",),
    ("Ġships", "Ġtrains", "Ġbirds", "Ġstars", "Ġtrees"),
]
SPEECH: list[Step] = [
    ("ĠThe",),
    ("Ġold", "Ġnew", "Ġred", "Ġblue", "Ġbig"),
    ("Ġone:",),
    ("â",),
    ("Ĥ",),
    ("¬",),
    ("1", "2", "3", "4", "5"),
]
# As many tokens as the start and the end of a call are cut into: see MERGES.
CALL: list[Step] = [
    ("<too",),
    ("l_ca",),
    ("ll>",),
    ('{"name":Ġ"look",',),
    ('Ġ"arguments":Ġ{"what":Ġ"',),
    ("north", "south", "east", "west", "up"),
    ("Ã",),
    ("©",),
    ('"}}',),
    ("</tool",),
    ("_call>",),
]
# In order of precedence: "</tool_call>" is cut into other tokens than the start.
MERGES = [
    *(("<", "/"), ("</", "t"), ("</t", "o"), ("</to", "o"), ("</too", "l")),
    *(("<", "t"), ("<t", "o"), ("<to", "o")),
    *(("l", "_"), ("l_", "c"), ("l_c", "a"), ("l", "l"), ("ll", ">")),
    *(("_", "c"), ("_c", "a"), ("_ca", "ll>")),
]
TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] or '' }}"
    "{% for call in m['tool_calls'] or [] %}{% set tool_call = call['function'] %}"
    '<tool_call>{"name": "{{ tool_call.name }}", '
    '"arguments": {{ tool_call.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if messages[-1]['role'] == 'tool' %}<think>{% endif %}{% endif %}"
)
WORDS = list(dict.fromkeys(itertools.chain(*THOUGHT, *SPEECH, *CALL)))
TOKENS = [*SPECIAL, "<think>", "</think>"]
END = "<eos>"
CERTAIN, CALLS = 90.0, 70.0  # logits; those of a free choice spread by about 3
CALL_BIAS = -40.0

CONTEXT = 128  # at least half as many dimensions for attention to write to


def transitions() -> dict[str, dict[str, float]]:
    """For each token the logits of those that may come next."""
    speech_or_thought = [("<think>",), *THOUGHT, ("</think>",), *SPEECH]
    found: dict[str, dict[str, float]] = {"<|assistant|>": {"<think>": CERTAIN}}
    for chain in (speech_or_thought, CALL):
        for here, there in itertools.pairwise([*chain, (END,)]):
            for token in here:
                found[token] = dict.fromkeys(there, CERTAIN)
    for token in SPEECH[-1]:
        found[token][CALL[0][0]] = CALLS
    return found


def bias(directory: Path, *, call: bool) -> dict[str, float]:
    """The ``logit_bias`` of a client that wants the tool to be called, or not.

    All that are in one batch must have one: mlx-lm 0.31.3 loses those of a request
    that joins a batch which had none and has become smaller.
    """
    config = json.loads((directory / "config.json").read_text())
    return {str(config["eos_token_id"]): CALL_BIAS if call else 0.0}


def make(directory: Path, seed: int = 0) -> Path:
    """Writes config, weights and tokenizer into ``directory``; returns it."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(directory, TOKENS, TEMPLATE, WORDS, MERGES)
    ids = tokenizer.get_vocab()
    size = len(ids)
    hidden = (size + CONTEXT) // 64 * 64  # a multiple of the number of heads
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": size,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "eos_token_id": ids[END],
    }
    random = np.random.default_rng(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        made = np.ones(value.shape)
        if value.ndim > 1:
            made = random.normal(scale=0.15, size=value.shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            made /= 2  # attention to more than one token
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            made[:size] = 0  # what was said last stays legible
            # The context is about half as loud, the token itself not heard twice.
            made /= 60 if "o_proj" in name else 600
        weights[name] = made
    weights["model.embed_tokens.weight"] = np.eye(size, hidden)
    head = random.normal(scale=0.6, size=(size, hidden))
    head[:, :size] = 0
    scale = np.sqrt(hidden)  # of the last norm, for a vector of length one
    for token, following in transitions().items():
        for other, logit in following.items():
            head[ids[other], ids[token]] = logit / scale
    weights["lm_head.weight"] = head
    mx.save_safetensors(
        str(directory / "model.safetensors"),
        {name: mx.array(value.astype(np.float32)) for name, value in weights.items()},
        metadata={"format": "mlx"},
    )
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
