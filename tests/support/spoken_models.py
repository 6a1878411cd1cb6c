"""Tiny models that each say one text, whatever they are asked, and then stop.

Run as a program: ``python spoken_models.py DIRECTORY``; writes one model for each
entry of `SPOKEN` into a directory of its name.

They are qwen3 models of one layer that does nothing. The last token goes through as
a one-hot vector, and the head maps it to the one that follows in the script. So no
token can come twice in a script with another after it.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

EOS, START, PROMPT = "<eos>", "GO", "a"
HEAD = 32  # dimensions


class Spoken(NamedTuple):
    """What a model says.

    Attributes:
        pieces: one token each. parser: of mlx-lm, for calls of tools.
        readable: whether the parsers of both versions of mlx-lm read its call;
            None: one of them does not, or there is none.
        thinks: its tokenizer has <think>. ends: otherwise the last piece is
            said for ever.
    """

    pieces: tuple[str, ...]
    parser: str | None = "json_tools"
    readable: bool | None = None
    thinks: bool = False
    ends: bool = True


MARKERS = {
    "json_tools": ("<tool_call>", "</tool_call>"),
    "qwen3_coder": ("<tool_call>", "</tool_call>"),
    "glm47": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]", ""),
    "pythonic": ("<|tool_call_start|>", "<|tool_call_end|>"),
    "function_gemma": ("<start_function_call>", "<end_function_call>"),
    "gemma4": ("<|tool_call>", "<tool_call|>"),
    "longcat": ("<longcat_tool_call>", "</longcat_tool_call>"),
    "minimax_m2": ("<minimax:tool_call>", "</minimax:tool_call>"),
    "kimi_k2": ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
}


def calls(
    text: str, parser: str = "json_tools", readable: bool | None = None
) -> Spoken:
    """A model that calls a tool with ``text``, between two words."""
    start, end = MARKERS[parser]
    last = (end, " done") if end else ()
    return Spoken(("Hm. ", start, text, *last), parser, readable)


def qwen(name: str, value: str, readable: bool | None = None) -> Spoken:
    body = f"<parameter={name}>\n{value}\n</parameter>\n"
    return calls(f"\n<function=run>\n{body}</function>\n", "qwen3_coder", readable)


def kimi(arguments: str, readable: bool | None = None) -> Spoken:
    text = f"functions.run:0<|tool_call_argument_begin|>{arguments}"
    return calls(text, "kimi_k2", readable)


def minimax(value: str, readable: bool | None = None) -> Spoken:
    inside = f'<parameter name="n">{value}</parameter>'
    return calls(f'<invoke name="run">{inside}</invoke>', "minimax_m2", readable)


SPOKEN = {
    "plain": Spoken(("Hello ", "there."), None),
    "nothing": Spoken((), None),
    "less": Spoken(("1 ", "<"), readable=None),  # a marker may begin so
    "good": calls('{"name": "add", "arguments": {"a": 1}}', readable=True),
    "no-arguments": calls('{"name": "add"}', readable=True),
    "null-arguments": calls('{"name": "add", "arguments": null}', readable=True),
    "parameters": calls('{"name": "add", "parameters": {"a": 1}}', readable=True),
    "text-arguments": calls(
        r'{"name": "add", "arguments": "{\"a\": 1}"}', readable=True
    ),
    "no-name": calls('{"arguments": {"a": 1}}', readable=False),
    "null-name": calls('{"name": null, "arguments": {}}', readable=False),
    "object-name": calls('{"name": {"a": 1}, "arguments": {}}', readable=False),
    "number": calls("5", readable=False),
    "null": calls("null", readable=False),
    "true": calls("true", readable=False),
    "string": calls('"add"', readable=False),
    "list": calls('["add", {"a": 1}]', readable=False),
    "empty-list": calls("[]", readable=False),
    "two-in-a-list": calls('[{"name": "a"}, {"name": "b"}]', readable=True),
    "half-a-list": calls('[{"name": "a"}, 5]', readable=False),
    "deep": calls("[" * 20_000, readable=False),
    "deep-arguments": calls(
        '{"name": "a", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}",
        readable=False,
    ),
    "infinity": calls('{"name": "a", "arguments": {"a": Infinity}}', readable=False),
    "nan": calls('{"name": "a", "arguments": {"a": NaN}}', readable=False),
    "number-arguments": calls('{"name": "a", "arguments": 5}', readable=False),
    "list-arguments": calls('{"name": "a", "arguments": [1]}', readable=False),
    "word-arguments": calls('{"name": "a", "arguments": "b"}', readable=False),
    "surrogate": calls(r'{"name": "a", "arguments": {"a": "\ud800"}}', readable=False),
    "escape": calls(r'{"name": "add", "arguments": {"a": \d+}}', readable=False),
    "empty": Spoken(("Hm. ", "<tool_call>", "</tool_call>", " done"), readable=False),
    "blank": calls("\n", readable=False),
    "cut": Spoken(("Hm. ", "<tool_call>", '{"name": "', "xx "), ends=False),
    "unclosed": Spoken(("Hm. ", "<tool_call>", '{"name": "add"}'), readable=True),
    "qwen-good": qwen("cmd", "ls -la", readable=True),
    "qwen-nullable": qwen("nullable", "ls -la src"),
    "qwen-inf": qwen("number", "inf", readable=False),
    "qwen-nan": qwen("number", "nan", readable=False),
    "qwen-date": qwen("integer", "2026-01-15", readable=False),
    "qwen-object": qwen("object", "{a: b c}"),
    "qwen-set": qwen("object", "{1, 2}", readable=False),
    "qwen-empty": calls("\n", "qwen3_coder", readable=False),
    "qwen-nothing": calls("\n<function=></function>\n", "qwen3_coder"),
    "qwen-two": calls(
        "\n<function=a>\n<parameter=x>\n1\n</parameter>\n</function>\n"
        "<function=b>\n<parameter=y>\n2\n</parameter>\n</function>\n",
        *("qwen3_coder", True),
    ),
    "mistral-good": calls('run[ARGS]{"cmd": "ls"}', "mistral", readable=True),
    "mistral-list": calls('[{"name": "run", "arguments": {}}]', "mistral"),
    "mistral-two": calls('a[ARGS]{"x": 1}b[ARGS]{"x": 2}', "mistral"),
    "mistral-cut": calls('run[ARGS]{"cmd": "', "mistral", readable=False),
    "mistral-empty": Spoken(("Hm. ", "[TOOL_CALLS]"), "mistral", readable=False),
    "pythonic-good": calls('[run(cmd="ls")]', "pythonic", readable=True),
    "pythonic-none": calls("run", "pythonic", readable=False),
    "pythonic-inf": calls("[run(x=1e999)]", "pythonic", readable=False),
    "gemma-good": calls("call:run{cmd:<escape>ls<escape>}", "function_gemma", True),
    "gemma-bad": calls("call:run{cmd}", "function_gemma", readable=False),
    "gemma4-good": calls("call:run{n:1}", "gemma4", readable=True),
    "gemma4-bad": calls("call:run{n:}", "gemma4", readable=False),
    "longcat-good": calls(
        "run\n<longcat_arg_key>n</longcat_arg_key>"
        "<longcat_arg_value>1</longcat_arg_value>",
        *("longcat", True),
    ),
    "longcat-bad": calls("run", "longcat", readable=False),
    "longcat-inf": calls(
        "run<longcat_arg_key>n</longcat_arg_key>"
        "<longcat_arg_value>Infinity</longcat_arg_value>",
        *("longcat", False),
    ),
    "glm-good": calls(
        "run<arg_key>n</arg_key><arg_value>1</arg_value>", "glm47", readable=True
    ),
    "glm-empty": calls("\n", "glm47", readable=False),
    "glm-prose": calls("I will look at it.", "glm47", readable=False),
    "glm-bytes": calls(
        "run<arg_key>n</arg_key><arg_value>b'x'</arg_value>", "glm47", readable=False
    ),
    "minimax-good": minimax("1", readable=True),
    "minimax-none": calls("run", "minimax_m2", readable=False),
    "kimi-good": kimi('{"n": 1}', readable=True),
    "kimi-word": kimi("ls", readable=False),
    "kimi-set": kimi("{1, 2}", readable=False),
    "kimi-none": calls("run", "kimi_k2", readable=False),
    "thinks": Spoken(("<think>", "I wonder", "</think>", "Answer."), thinks=True),
    "thinks-on": Spoken(("<think>", "I wonder ", "so "), thinks=True, ends=False),
    "thinks-not": Spoken(("Answer.",), thinks=True),
}


def make(directory: Path, spoken: Spoken) -> None:
    """Writes config, weights and tokenizer into ``directory``."""
    import mlx.core as mx
    import numpy as np

    directory.mkdir(parents=True)
    ids = _write_tokenizer(directory, spoken)
    width = -(-len(ids) // 32) * 32
    (directory / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen3",
                "hidden_size": width,
                "num_hidden_layers": 1,
                "intermediate_size": HEAD,
                "num_attention_heads": 1,
                "num_key_value_heads": 1,
                "head_dim": HEAD,
                "rms_norm_eps": 1e-6,
                "vocab_size": len(ids),
                "max_position_embeddings": 100_000,
                "rope_theta": 1e6,
                "tie_word_embeddings": False,
                "eos_token_id": ids[EOS],
            }
        )
    )
    head = np.zeros((len(ids), width), np.float32)
    script = [START, *spoken.pieces, EOS if spoken.ends else spoken.pieces[-1]]
    for token, following in itertools.pairwise(script):
        assert not head[:, ids[token]].any(), f"{token!r} comes twice"
        head[ids[following], ids[token]] = 5
    layer = "model.layers.0."
    weights: dict[str, Any] = {
        "model.embed_tokens.weight": np.eye(len(ids), width),
        "lm_head.weight": head,
        "model.norm.weight": np.ones(width),
        f"{layer}input_layernorm.weight": np.ones(width),
        f"{layer}post_attention_layernorm.weight": np.ones(width),
        f"{layer}self_attn.q_norm.weight": np.ones(HEAD),
        f"{layer}self_attn.k_norm.weight": np.ones(HEAD),
        f"{layer}self_attn.o_proj.weight": np.zeros((width, HEAD)),
        f"{layer}mlp.gate_proj.weight": np.zeros((HEAD, width)),
        f"{layer}mlp.up_proj.weight": np.zeros((HEAD, width)),
        f"{layer}mlp.down_proj.weight": np.zeros((width, HEAD)),
    }
    for name in ("q", "k", "v"):
        weights[f"{layer}self_attn.{name}_proj.weight"] = np.zeros((HEAD, width))
    mx.save_safetensors(
        str(directory / "model.safetensors"),
        {name: mx.array(value.astype(np.float32)) for name, value in weights.items()},
        metadata={"format": "mlx"},
    )


def _write_tokenizer(directory: Path, spoken: Spoken) -> dict[str, int]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = ["[UNK]", EOS, START, PROMPT, *spoken.pieces]
    words += MARKERS[spoken.parser] if spoken.parser else ()
    words += ("<think>", "</think>") if spoken.thinks else ()
    ids = {word: i for i, word in enumerate(dict.fromkeys(filter(None, words)))}
    tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ids])
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "unk_token": "[UNK]",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %} {{ m.content }} {% endfor %}" + START,
    }
    if spoken.parser:
        config["tool_parser_type"] = spoken.parser
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return ids


if __name__ == "__main__":
    for name, spoken in SPOKEN.items():
        make(Path(sys.argv[1]) / name, spoken)
