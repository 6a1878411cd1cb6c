"""The protected server; it writes which functions of mlx-lm are called."""

import sys

import mlx_lm.server as server
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_safe.cli import main


def note(owner, name, shown=None):
    call = getattr(owner, name)

    def noted(*args, **kwargs):
        found = None
        if name == "_next_request":
            found = call(*args, **kwargs)
            if found is None:
                return None
        sys.stderr.write(f"CALL {shown or name}\n")
        return call(*args, **kwargs) if found is None else found

    noted.__wrapped__ = call
    setattr(owner, name, noted)


for name in (
    "_next_request",
    "_is_batchable",
    "_tokenize",
    "_make_state_machine",
    "_serve_single",
):
    note(server.ResponseGenerator, name)
note(server.ModelProvider, "load")
note(server.LRUPromptCache, "fetch_nearest_cache")
note(server.BatchGenerator, "insert_segments")
note(server.GenerationContext, "__init__", "GenerationContext")
note(server, "_make_sampler")
note(server, "_make_logits_processors")
made = TokenizerWrapper.detokenizer.fget


def detokenizer(self):
    sys.stderr.write("CALL detokenizer\n")
    return made(self)


TokenizerWrapper.detokenizer = property(detokenizer)
sys.exit(main(["serve", *sys.argv[1:]]))
