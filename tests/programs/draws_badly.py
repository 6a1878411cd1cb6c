"""Before a server: its requests that are drawn fail, by an exception of their own."""

import mlx_lm.server as server


def fail(logprobs):
    raise LookupError


make = server._make_sampler


def made(args, tokenizer):
    sampler = make(args, tokenizer)
    return sampler if args.sampling.temperature == 0 else fail


server._make_sampler = made
