"""The protected server, where requests fail by exceptions of their own.

What marks them is its first argument; see test_server_isolation.py.
"""

import sys
from functools import partial, wraps

import mlx.core as mx
import mlx_lm.server as server
from mlx_lm import tokenizer_utils
from mlx_lm.models import llama

from mlx_safe.cli import main
from mlx_safe.server import logprobs as shown
from mlx_safe.server import replay
from mlx_safe.server.stop_words import StopsAtWords

PLACES, FORWARD, POISONED, LATE = eval(sys.argv.pop(1))
places = {value: name for name, value in PLACES.items()}
make_sampler, make_processors = server._make_sampler, server._make_logits_processors
FORWARD_ID: bytes
POISONED_ID: bytes
LATE_ID: bytes
fails_next = fails_late = False


def place(args):
    return places.get(args.sampling.min_p)


def after(count, call, *shown):
    left = [count]

    def counted(*args):
        left[0] -= 1
        return call(*args) if left[0] < 0 else shown[0](*args)

    return counted


def fail(*args):
    raise LookupError("of one request")


def draw_and_fail(logprobs):
    @partial(mx.compile, inputs=mx.random.state, outputs=mx.random.state)
    def drawn(x):
        mx.random.categorical(x)
        raise LookupError("of one request")

    return drawn(logprobs)


@wraps(make_sampler)
def sampler(args, tokenizer):
    global fails_next
    where = place(args)
    if where == "sampler made":
        raise LookupError("of one request")
    fails_next = where == "detokenizer"
    made = make_sampler(args, tokenizer)
    if where == "greedy sampler":
        return after(3, fail, made)
    return after(3, draw_and_fail, made) if where == "sampler" else made


@wraps(make_processors)
def processors(args):
    if place(args) == "processors made":
        raise LookupError("of one request")
    made = make_processors(args)
    if place(args) == "processor":
        made.append(after(3, fail, lambda tokens, logits: logits))
    return made


server._make_sampler, server._make_logits_processors = sampler, processors


class BadStops(StopsAtWords):
    def __init__(self, stops, words):
        super().__init__(stops, words)
        self.fails = "fails" in words

    def matcher(self):
        return self if self.fails else super().matcher()

    def match(self, state, token):
        if self.fails:
            raise LookupError("of one request")
        return super().match(state, token)

    def advance(self, token):
        raise LookupError("of one request")


vars(replay)["StopsAtWords"] = BadStops
show_top = shown.top_logprobs


@wraps(show_top)
def top_or_fail(logprobs, count, tokenizer):
    if count == 7:
        raise LookupError("of one request")
    return show_top(logprobs, count, tokenizer)


shown.top_logprobs = top_or_fail
add_token = tokenizer_utils.BPEStreamingDetokenizer.add_token
reset = tokenizer_utils.BPEStreamingDetokenizer.reset


def reset_and_mark(self):
    global fails_next
    self.fails, fails_next = fails_next, False
    reset(self)


def add_or_fail(self, token):
    if self.fails:
        raise LookupError("of one request")
    add_token(self, token)


tokenizer_utils.BPEStreamingDetokenizer.add_token = add_or_fail
tokenizer_utils.BPEStreamingDetokenizer.reset = reset_and_mark
insert = server.BatchGenerator.insert_segments


@wraps(insert)
def insert_or_fail(self, *args, **kwargs):
    if kwargs["max_tokens"] == [77]:
        raise LookupError("of one request")
    return insert(self, *args, **kwargs)


server.BatchGenerator.insert_segments = insert_or_fail
forward = llama.Model.__call__


@wraps(forward)
def forward_or_fail(self, inputs, cache=None, **kwargs):
    poisoned = any(getattr(c, "poisoned", False) for c in cache or ())
    found = any(bytes_of(row).count(FORWARD_ID) for row in inputs.tolist())
    if poisoned or found or (fails_late and inputs.shape[1] == 1):
        raise LookupError("of a step")
    return forward(self, inputs, cache=cache, **kwargs)


def bytes_of(tokens):
    return str(list(tokens)).strip("[]").encode()


fetch = server.LRUPromptCache.fetch_nearest_cache


@wraps(fetch)
def fetch_and_mark(self, model, tokens):
    global fails_late
    cache, rest = fetch(self, model, tokens)
    long = len(tokens) - len(rest) > 400  # all prompts begin alike
    fails_late = long and LATE_ID in bytes_of(tokens)
    for c in cache or () if long and POISONED_ID in bytes_of(tokens) else ():
        c.poisoned = True
    return cache, rest


load = server.load


@wraps(load)
def load_and_look(*args, **kwargs):
    global FORWARD_ID, POISONED_ID, LATE_ID
    found = load(*args, **kwargs)
    tokenizer = found[1]
    encode = partial(tokenizer.encode, add_special_tokens=False)
    marks = FORWARD, POISONED, LATE
    FORWARD_ID, POISONED_ID, LATE_ID = map(bytes_of, map(encode, marks))
    llama.Model.__call__ = forward_or_fail
    server.LRUPromptCache.fetch_nearest_cache = fetch_and_mark
    return found


server.load = load_and_look
sys.exit(main(["serve", *sys.argv[1:]]))
